"""Where the seconds of a run go, and how much of what the device can do is used."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from lightning import Fabric
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fellrec.data.datamodule import FellrecDataModule
from fellrec.distributed.devices import matrix_rate
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import Aggregated, FitResult, FitStart, RoundRecord, Updates
from fellrec.federated.trial import first_batch, trial_step
from fellrec.functional.cost import fraction
from fellrec.models.module import FellrecModule
from fellrec.models.times import NO_TIMES, PartTimes
from fellrec.tracking.run_log import RunLog
from fellrec.types import Evaluation

OF_STEPS = ("head", "body", "tail", "logits", "optimiser", "data")
"""Parts of local training; those of the model in both directions, and everything else of the loss is of the logits."""
PARTS = (*OF_STEPS, "evaluation", "aggregation", "logging")
_MATRIX_ROWS = {"cpu": 1024, "cuda": 8192}


class Profile(FederatedCallback):
    """Measures the parts of every round, logs them as metrics, and prints a table of the run when it is over.

    - ``profile/NAME_seconds`` for each of `PARTS`, and ``other``, the rest of the round. ``logging`` is what all
      callbacks take, those of progress and checkpoints too; ``aggregation`` is the rule and the exchange;
    - ``profile/tokens_per_second``: with padding, over the seconds of local training;
    - ``profile/padding_rate``: part of the tokens that is padding, where every row of a batch is one text;
    - ``profile/utilisation``: FLOPs of the matrix products of local training, by those of a step of the first batch
      for each token, over its seconds and the FLOPs per second of one large product in the same type.

    Only what this process does is seen, and a resumed run is measured from there.

    Args:
        log: Of the run.
        module: What is trained.
        datamodule: Its batches.
        fabric: Device and precision.
        seed: Of the run.
    """

    def __init__(
        self, log: RunLog, module: FellrecModule, datamodule: FellrecDataModule, fabric: Fabric, seed: int
    ) -> None:
        self.log = log
        self.module = module
        self.datamodule = datamodule
        self.fabric = fabric
        self.seed = seed
        self.console = Console(stderr=True)
        self.times = PartTimes(fabric.device)
        self.flops_per_token: float | None = None
        self.matrix_rate = float("nan")
        self._own = {"aggregation": 0.0, "evaluation": 0.0}
        self._since = self._logged_before = self._logged_at_start = self._round_begun = 0.0
        self._begun: float | None = None
        self._at_round: dict[str, float] = {}

    def on_fit_start(self, fit: FitStart) -> None:
        """Measure the device, and count the FLOPs of a step."""
        device, weight = self.fabric.device, next(self.module.model.parameters())
        with self.fabric.autocast():
            ones = torch.ones(2, 2, dtype=weight.dtype, device=device)
            dtype = (ones @ ones).dtype
        self.matrix_rate = matrix_rate(device, dtype, _MATRIX_ROWS.get(device.type, 1024))
        if not self.module.model.is_cut:
            self.flops_per_token = flops_per_token(self.fabric, self.module, self.datamodule, self.seed)
        self.module.model.times = self.times

    def on_round_start(self, round_index: int) -> None:
        """Begin the round."""
        self._start()
        self._round_begun, self._at_round = time.perf_counter(), self.figures()

    def on_aggregate_start(self, updates: Updates) -> None:
        """Begin the aggregation."""
        self._begin()

    def on_aggregate_end(self, aggregated: Aggregated) -> None:
        """End it."""
        self._end("aggregation")

    def on_evaluate_start(self, stage: str) -> None:
        """Begin the evaluation."""
        self._begin()

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """End it."""
        self._end("evaluation")

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the round."""
        now = self.figures()
        found = {name: now[name] - self._at_round[name] for name in now}
        metrics = self.metrics(found, time.perf_counter() - self._round_begun)
        named = {f"profile/{name}": value for name, value in metrics.items()}
        self.log.log_metrics(named, step=record.round_index, once="profile")

    def on_fit_end(self, result: FitResult) -> None:
        """Print the run."""
        self.module.model.times = NO_TIMES
        begun = time.perf_counter() if self._begun is None else self._begun
        metrics = self.metrics(self.figures(), time.perf_counter() - begun)
        self.console.print(table(metrics))
        self.console.print(summary(metrics), highlight=False, soft_wrap=True)

    def on_exception(self, error: BaseException) -> None:
        """Leave the model as it was."""
        self.module.model.times = NO_TIMES

    def figures(self) -> dict[str, float]:
        """Seconds of each of `PARTS` so far, and tokens."""
        tokens = {"num_tokens": self.times.num_tokens, "num_inside": self.times.num_inside}
        logging = self.events.seconds - self._logged_at_start
        of_steps = {name: self.times.seconds[name] for name in OF_STEPS}
        return {**of_steps, **self._own, "logging": logging, **tokens}

    def metrics(self, found: Mapping[str, float], total_seconds: float) -> dict[str, float]:
        """The figures that are logged, by name.

        Args:
            found: As of `figures`.
            total_seconds: In which they were found.
        """
        seconds = {f"{name}_seconds": found[name] for name in PARTS}
        metrics = {**seconds, "other_seconds": total_seconds - sum(seconds.values()), "total_seconds": total_seconds}
        in_steps, tokens = sum(found[name] for name in OF_STEPS), found["num_tokens"]
        metrics["tokens_per_second"] = fraction(tokens, in_steps)
        if found["num_inside"] and getattr(self.module.objective, "item_encoder", "tokens") == "tokens":
            metrics["padding_rate"] = 1 - found["num_inside"] / tokens
        if self.flops_per_token is not None:
            metrics["utilisation"] = fraction(self.flops_per_token * tokens, in_steps) / self.matrix_rate
        return metrics

    def _start(self) -> None:
        """Begin the run, in the first hook after those of its start."""
        if self._begun is None:
            self._begun, self._logged_at_start = time.perf_counter(), self.events.seconds

    def _begin(self) -> None:
        self._start()
        self._since, self._logged_before = time.perf_counter(), self.events.seconds

    def _end(self, name: str) -> None:
        """Add the seconds since `_begin`, without those of other callbacks."""
        logged = self.events.seconds - self._logged_before
        self._own[name] += time.perf_counter() - self._since - logged


def flops_per_token(fabric: Fabric, module: FellrecModule, datamodule: FellrecDataModule, seed: int) -> float:
    """FLOPs of a forward and backward pass of the first batch, divided by its tokens with padding.

    PyTorch counts those of matrix products; attention is computed by them here, and what a causal mask hides counts.
    """
    model, times = module.model, PartTimes(fabric.device)
    attention, before = model.attention, model.times
    batch = fabric.to_device(first_batch(datamodule, seed))
    try:
        model.use_attention("eager")
        model.times = times
        times.enter("logits")
        with FlopCounterMode(display=False) as counter:
            trial_step(fabric, module, batch, seed)
    finally:
        model.use_attention(attention)
        model.times = before
    return float(counter.get_total_flops() / times.num_tokens)


def table(metrics: dict[str, float]) -> Table:
    """The figures of a run for people."""
    found = Table(title="Profile of this process")
    for column in ("part", "seconds", "share"):
        found.add_column(column, justify="left" if column == "part" else "right")
    for name in (*PARTS, "other", "total"):
        seconds = metrics[f"{name}_seconds"]
        found.add_row(name, f"{seconds:.2f}", f"{100 * fraction(seconds, metrics['total_seconds']):.1f} %")
    return found


def summary(metrics: dict[str, float]) -> str:
    """The rates of a run for people."""
    parts = [f"{metrics['tokens_per_second']:,.0f} tokens/s in local training"]
    if "padding_rate" in metrics:
        parts.append(f"{100 * metrics['padding_rate']:.1f} % padding")
    if "utilisation" in metrics:
        parts.append(f"{100 * metrics['utilisation']:.1f} % of the rate of a large matrix product")
    return ", ".join(parts)
