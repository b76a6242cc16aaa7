"""One GPU: seconds per round, peak memory, and model FLOP utilisation.

    python benchmarks/gpu.py --data-root ml-1m                  # needs a GPU with 80 GB, and 14 GB of disk in --work
    python benchmarks/gpu.py --dry-run                          # tiny shapes on the CPU, to test the script

Cases, each with five clients, the whole model, and with the executed split in one process:

- ``small``: ``experiment=ml_1m_small`` with ten local steps;
- ``smollm2``: a backbone of SmolLM2-135M's shape, LoRA, batches of 8 rows; also with ``trainer.clients_per_step=5``;
- ``nccl``: the same with one process, whose gradients are reduced over a group of itself by NCCL (on a CPU by gloo), as
  with ``trainer.devices_per_client`` above 1;
- ``large``: a backbone of LLaMA-7B's shape, LoRA, the generative objective.

Large backbones have random weights in bfloat16: speed does not depend on their values. A round is local training and
aggregation, without evaluation. The first round is a warm-up. ``--json`` is written after every case.

Model FLOP utilisation = required FLOPs (``fellrec.functional.cost.training_flops``, per token of the largest
micro-batch, times the padded tokens of the round) / seconds / FLOPs per second of one large matrix product of the
same type.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from fellrec.config.compose import compose
from fellrec.distributed.batch_sharing import BatchSharing
from fellrec.distributed.devices import matrix_rate, wait_for
from fellrec.distributed.meeting import use_loopback
from fellrec.distributed.memory import peak_bytes
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_loop, build_serial
from fellrec.federated.executor import SerialExecutor
from fellrec.federated.ledger import Ledger
from fellrec.federated.loop import FederatedLoop
from fellrec.functional.cost import human_bytes, training_flops
from fellrec.models.module import drawn
from fellrec.models.tiny import build_tokenizer
from fellrec.planning.plan import Planner
from fellrec.planning.shape import find_config, read_config

SHAPES = {"smollm2": "smollm2_135m", "nccl": "smollm2_135m", "large": "llama_2_7b"}
"""Shape of the backbone of each case that has random weights."""
RANDOM = ("backbone=hf", "backbone.dtype=bfloat16", "trainer.precision=bf16-mixed", "adapter=lora")
SMALL_BATCHES = (*RANDOM, "trainer.batch_size=8", "trainer.max_local_steps=10")
CASES = {
    "small": ("experiment=ml_1m_small", "trainer.max_local_steps=10"),
    "smollm2": SMALL_BATCHES,
    "nccl": SMALL_BATCHES,
    "large": (*RANDOM, "objective=generative", "trainer.batch_size=16", "trainer.max_local_steps=2"),
}
"""Overrides of each case."""
JOINT = "trainer.clients_per_step=5"
NCCL = ", NCCL"
"""End of the name of the case whose gradients are reduced."""
NO_EVALUATION = ("trainer.num_rounds=1000", "trainer.evaluate_every=1000")
CUT = ("split=executed", "split.head_layers=2", "split.tail_layers=1")
SYNTHETIC = ("data=synthetic", "data.reader.num_users=90", "data.reader.num_items=60")
DRY = (*SYNTHETIC, "data.reader.mean_length=12", "trainer.max_local_steps=2", "trainer.batch_size=4")
DRY_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


@dataclass(frozen=True)
class Result:
    """Result of one case.

    Attributes:
        case: Name of the case.
        device: Device of the run.
        dtype: Data type of the matrix products.
        seconds_per_round: Median over the timed rounds.
        steps: Local steps of the last round, all clients.
        tokens: Padded tokens of the last round.
        peak_bytes: Maximum memory of the device; on a CPU, of the process.
        flops_per_second: Required FLOPs per second.
        matrix_rate: FLOPs per second of one large matrix product.
    """

    case: str
    device: str
    dtype: str
    seconds_per_round: float
    steps: int
    tokens: int
    peak_bytes: int
    flops_per_second: float
    matrix_rate: float

    @property
    def utilisation(self) -> float:
        """Fraction of the matrix rate, in [0, 1]."""
        return self.flops_per_second / self.matrix_rate


def random_backbone(folder: Path, shape: str, texts: Sequence[str], changes: dict[str, int]) -> None:
    """Write a backbone of a known shape with random weights.

    Args:
        folder: Destination.
        shape: A name in ``conf/model_configs``.
        texts: Training texts of the tokenizer.
        changes: Sizes that differ from the shape.
    """
    config = read_config(find_config(shape))
    tokenizer = build_tokenizer(texts, vocab_size=4000)
    for name, value in {**changes, **({"num_key_value_heads": 2} if changes else {})}.items():
        setattr(config, name, value)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(case: str, config: DictConfig, rounds: int, matrix_size: int) -> Result:
    """Train several rounds and time all except the first."""
    data = build_data(config)
    plan = Planner().plan(config)
    parts = (plan.head, plan.body, plan.tail)
    rows, tokens = plan.micro_batch
    flops_per_token = sum(part.forward_flops for part in parts) / (rows * tokens)
    recommender = build_recommender(config, data)
    loop, device = build_loop(config, recommender), recommender.fabric.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, steps = [], 0
    with _group_of_one(device) if case.endswith(NCCL) else nullcontext() as sharing:
        if sharing is not None:
            loop.executor = build_serial(config, recommender, None, Ledger(), sharing)
        for round_index in range(rounds + 1):
            wait_for(device)
            started = time.perf_counter()
            steps = _round(loop, round_index)
            wait_for(device)
            seconds.append(time.perf_counter() - started)
    median = sorted(seconds[1:])[rounds // 2]
    seen = _tokens(loop, recommender, rounds)
    uses_bf16 = config.trainer.precision != "32-true"
    dtype = torch.bfloat16 if uses_bf16 else torch.float32
    trains_all = config.adapter["_target_"].endswith("FullAdapter")
    return Result(
        case=case,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        seconds_per_round=median,
        steps=steps,
        tokens=seen,
        peak_bytes=peak_bytes(),
        flops_per_second=training_flops(flops_per_token * seen, trains_all) / median,
        matrix_rate=matrix_rate(device, dtype, matrix_size),
    )


@contextmanager
def _group_of_one(device: torch.device) -> Iterator[BatchSharing]:
    """This process as a group that trains each client together; gradients go through NCCL, on a CPU through gloo."""
    use_loopback()
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield BatchSharing((0,), 0, device, timeout_seconds=60)
    finally:
        dist.destroy_process_group()


def _round(loop: FederatedLoop, round_index: int) -> int:
    """Run a round; returns the number of local steps of all clients."""
    return sum(trained.num_steps for trained in loop.run_round(round_index).trained)


def _tokens(loop: FederatedLoop, recommender: Recommender, round_index: int) -> int:
    """Padded tokens of a round: batches are a function of seed, round and client."""
    objective, streams = recommender.module.objective, recommender.module.model.streams
    executor = loop.executor
    assert isinstance(executor, SerialExecutor)
    return sum(
        ids.numel()
        for row in loop.participation.draw(loop.population, round_index).rows
        for batches in executor.trainer.batches(loop.population.job(row, round_index))
        for batch in batches
        for ids in objective.inputs(drawn(objective, batch, streams))
    )


def cases(options: argparse.Namespace) -> dict[str, DictConfig]:
    """Configurations by name; writes backbones with random weights."""
    data = ["data=ml_1m", f"data.root={options.data_root}"] if options.data_root else list(SYNTHETIC[:1])
    common = [f"cache_dir={options.work / 'cache'}", *NO_EVALUATION]
    cut = list(CUT)
    if options.dry_run:
        data += [*DRY, "trainer.accelerator=cpu"]
        cut = [*CUT[:1], "split.head_layers=1", CUT[2]]
    found = {}
    for case in CASES if options.case == "all" else [options.case]:
        name, given = SHAPES.get(case, "ml_1m_small"), [*CASES[case], *data, *common]
        if case in SHAPES:
            folder = options.work / (f"{name}-dry" if options.dry_run else name)
            given.append(f"backbone.path={_backbone(folder, name, [*data, *common], options.dry_run)}")
        elif options.dry_run:
            given.append("backbone.pretrain.steps=3")
        whole = [*given, "split.transport=none"]
        if case == "nccl":
            found[f"{name}{NCCL}"] = compose(whole)
            continue
        found[name] = compose(whole)
        if case == "smollm2":
            found[f"{name}, clients_per_step=5"] = compose([*whole, JOINT])
        found[f"{name}, cut"] = compose([*given, *cut])
    return found


def _backbone(folder: Path, shape: str, data: Sequence[str], is_dry: bool) -> Path:
    """The folder of a backbone with random weights, whose tokenizer is trained on the titles of the data."""
    if not (folder / "tokenizer.json").is_file():
        texts = build_data(compose(list(data))).catalogue.texts()
        random_backbone(folder, shape, texts, DRY_SHAPE if is_dry else {})
    return folder


def show(results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table(title=f"{results[0].device}; seconds per round of local training and aggregation")
    for column in ("case", "type", "steps", "tokens", "s/round", "tokens/s", "peak memory", "TFLOP/s", "utilisation"):
        table.add_column(column, justify="left" if column in ("case", "type") else "right")
    for result in results:
        table.add_row(
            *(result.case, result.dtype, str(result.steps), f"{result.tokens:,}", f"{result.seconds_per_round:.2f}"),
            *(f"{result.tokens / result.seconds_per_round:,.0f}", human_bytes(result.peak_bytes)),
            *(f"{result.flops_per_second / 1e12:.2f}", f"{100 * result.utilisation:.1f} %"),
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; ``--json FILE`` writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="directory of MovieLens-1M (default: embedded data)")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"), help="folder for backbones and caches")
    parser.add_argument("--case", choices=("all", *CASES), default="all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to time after the first")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU found; --dry-run tests the script on the CPU")
    found = cases(options)
    size, rounds = (256, 1) if options.dry_run else (8192, options.rounds)
    results: list[Result] = []
    for name, config in found.items():
        results.append(measure(name, config, rounds, size))
        if options.json:
            rows = [asdict(result) | {"utilisation": result.utilisation} for result in results]
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
