"""Time of the executed split relative to the unsplit run; traffic and accuracy by data type of hidden states.

python benchmarks/split_throughput.py [--rounds N] [--repeats N] [--parts inprocess,distributed,packing] [OVERRIDES…]

Rounds of all configurations are interleaved, so that other jobs on the machine affect all of them; results are medians.
``CPU ratio`` compares CPU time, which is less affected by other jobs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from fellrec.config.compose import compose
from fellrec.experiment import build_data, build_loop, build_recommender
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.report.costs import Rounds
from fellrec.report.tables import markdown
from fellrec.types import RoundRecord

IN_FLIGHT = (1, 2, 4)
PACKINGS = ("float32", "bfloat16", "int8")
NO_EVALUATION = ["trainer.num_rounds=1000", "trainer.evaluate_every=1000"]


class Records(FederatedCallback):
    """Stores the record and the CPU time of every round."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []
        self.rounds = Rounds()

    def on_round_start(self, loop: FederatedLoop, round_index: int) -> None:
        self._started = time.process_time()

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        self.records.append(record)
        self.rounds = self.rounds.plus(record, time.process_time() - self._started)

    def seconds(self) -> float:
        """Median of all rounds except the first."""
        return median(self.rounds.round_seconds[1:])

    def cpu_seconds(self) -> float:
        """Median of all rounds except the first; for rounds without an evaluation."""
        return median(self.rounds.cpu_seconds[1:])

    def busy_rate(self) -> float:
        """Busy rate of the server over all rounds."""
        return self.rounds.busy_rate("server") or 0.0


def new_loop(overrides: Sequence[str]) -> tuple[FederatedLoop, Records]:
    config, records = compose(overrides), Records()
    loop = build_loop(config, build_recommender(config, build_data(config)), [records])
    loop.execution.start(loop)
    return loop, records


def interleave(loops: Sequence[FederatedLoop], num_rounds: int) -> None:
    """Run one round of each loop in turn, every second time in reverse order."""
    for number in range(num_rounds):
        for loop in loops if number % 2 == 0 else reversed(loops):
            loop.run_round(loop.state.round_index)


def in_process(overrides: Sequence[str], options: argparse.Namespace) -> pd.DataFrame:
    """Compare an executed round with an unsplit one, both in this process."""
    base = [*overrides, *NO_EVALUATION]
    cuts = [["split.transport=inprocess", f"split.in_flight={number}"] for number in IN_FLIGHT]
    (whole, unsplit), *split = (new_loop([*base, *cut]) for cut in ([], *cuts))
    interleave([whole, *(loop for loop, _ in split)], options.rounds * options.repeats + 1)
    rows = []
    for in_flight, (_, records) in zip(IN_FLIGHT, split, strict=True):
        row = _row("1", in_flight, records.seconds(), unsplit.seconds(), records.busy_rate())
        rows.append({**row, "CPU ratio": f"{records.cpu_seconds() / unsplit.cpu_seconds():.2f}"})
    return pd.DataFrame(rows)


def distributed(overrides: Sequence[str], options: argparse.Namespace) -> pd.DataFrame:
    """Compare runs started by torchrun with unsplit rounds of this process, which run between the launches."""
    base = [*overrides, f"trainer.num_rounds={options.rounds + 1}", "trainer.evaluate_every=1000"]
    whole, unsplit = new_loop([*overrides, *NO_EVALUATION])
    interleave([whole], 1)
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _, processes, in_flight in itertools.product(range(options.repeats), (2, 3), IN_FLIGHT):
        interleave([whole], options.rounds)
        found.setdefault((processes, in_flight), []).append(_launch(base, processes, in_flight))
    interleave([whole], options.rounds)
    return pd.DataFrame(
        [
            _row(str(processes), in_flight, median(s for s, _ in runs), unsplit.seconds(), median(b for _, b in runs))
            for (processes, in_flight), runs in found.items()
        ]
    )


def _launch(overrides: Sequence[str], processes: int, in_flight: int) -> tuple[float, float]:
    """Median seconds of all rounds except the first, and the server's busy rate."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "fellrec", "train", *overrides, "split.transport=distributed", f"split.in_flight={in_flight}"]
        command += [f"run_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        measured = json.loads(Path(folder, "run", "results.json").read_text())["cost"]["measured"]
    seconds, busy = median(measured["round_seconds"][1:]), measured["server_busy_rate"]
    sys.stderr.write(f"{processes} processes, {in_flight} in flight: {seconds:.2f} s/round, server busy {busy:.2f}\n")
    return seconds, busy


def _row(processes: str, in_flight: int, seconds: float, unsplit: float, busy: float) -> dict[str, str]:
    return {
        "processes": processes,
        "in flight": str(in_flight),
        "s/round": f"{seconds:.2f}",
        "unsplit": f"{unsplit:.2f}",
        "ratio": f"{seconds / unsplit:.2f}",
        "server busy": f"{100 * busy:.0f} %",
    }


def packing(overrides: Sequence[str], options: argparse.Namespace) -> pd.DataFrame:
    """The same run with each data type of hidden states and gradients; accuracy on the test split."""
    base = [*overrides, "split.transport=inprocess", f"trainer.num_rounds={options.rounds}"]
    loops = [
        (name, *new_loop([*base, f"split.hidden_dtype={name}", f"split.gradient_dtype={name}"])) for name in PACKINGS
    ]
    for _, loop, _ in loops:
        loop.validate(-1)
    interleave([loop for _, loop, _ in loops], options.rounds)
    rows, plain = [], loops[0][2]
    for name, loop, records in loops:
        ledger, summary = loop.execution.ledger, loop.test().summary
        crossing = sum(ledger.total(kind=kind, phase="train") for kind in ("hidden_state", "gradient"))
        losses = [record.updates for record in (records.records[-1], plain.records[-1])]
        loss, plain_loss = (sum(update.loss for update in updates) / len(updates) for updates in losses)
        rows.append(
            {
                "data type": name,
                "MB a round": f"{crossing / options.rounds / 1e6:.1f}",
                "s/round": f"{records.seconds():.2f}",
                "last loss": f"{loss:.5f}",
                "difference": f"{loss - plain_loss:+.5f}",
                "NDCG@10": f"{summary['ndcg_at_10/mean']:.4f}",
            }
        )
    return pd.DataFrame(rows)


PARTS: dict[str, Callable[[Sequence[str], argparse.Namespace], pd.DataFrame]] = {
    "inprocess": in_process,
    "distributed": distributed,
    "packing": packing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each run")
    parser.add_argument("--repeats", type=int, default=2, help="launches of each distributed run")
    parser.add_argument("--parts", default=",".join(PARTS), help="tables to produce")
    parser.add_argument("overrides", nargs="*", help="overrides of fellrec train")
    options = parser.parse_args()
    for part in options.parts.split(","):
        sys.stdout.write(f"{part}\n\n{markdown(PARTS[part](options.overrides, options))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
