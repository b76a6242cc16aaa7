"""Settings with the value ``auto``, chosen by a measurement: precision and attention of the training steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf

from fellrec.cut.settings import UNCHANGED
from fellrec.data.prepared import PreparedData
from fellrec.distributed.devices import matrix_rate, wait_for
from fellrec.experiment.build import Recommender, build_recommender, recommender_key
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.precision import AUTO, trains_all, weights_dtype
from fellrec.federated.trial import first_batch, trial_step
from fellrec.terminal import tell

TOLERANCE = 0.005
"""Largest relative difference of a loss from that of the reference; with a larger one a candidate is not chosen."""
LEAST_GAIN = 0.05
"""Fraction of the reference's seconds that a candidate must save; measurements differ by less."""
_REPEATS, _SECONDS = 3, 0.5
"""Steps that are timed, the first without time aside; one suffices if it takes so long."""
_RATE_SIZE = 256
"""Rows of the matrices whose product tells whether bfloat16 can pay: small, as it can be a hundred times as slow."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute.

    Attributes:
        precision: ``trainer.precision``.
        attention: ``trainer.attention``.
    """

    precision: str
    attention: str

    def __str__(self) -> str:
        return f"{self.precision} with {self.attention}"


@dataclass(frozen=True)
class Measured:
    """A training step of a candidate: forward and backward pass of one batch.

    Attributes:
        candidate: How it was computed.
        seconds: Of the fastest repetition.
        loss: Of the batch.
    """

    candidate: Candidate
    seconds: float
    loss: float


def is_auto(config: DictConfig) -> bool:
    """Whether a setting is to be chosen."""
    return AUTO in (config.trainer.precision, config.trainer.attention)


def chosen(config: DictConfig, candidate: Candidate) -> DictConfig:
    """A configuration with the candidate's values where it has ``auto``; the same if it has none."""
    found = {"precision": candidate.precision, "attention": candidate.attention}
    values = {name: value for name, value in found.items() if config.trainer[name] == AUTO}
    merged = OmegaConf.merge(config, {"trainer": values})
    assert isinstance(merged, DictConfig)
    return merged


def choose(configs: Sequence[DictConfig], data: PreparedData) -> list[DictConfig]:
    """Configurations without ``auto``, those that can share a recommender with the same choice.

    Args:
        configs: Composed configurations.
        data: The prepared data.
    """
    found: dict[str, Candidate] = {}
    for config in configs:
        if is_auto(config) and (key := recommender_key(config)) not in found:
            found[key] = _measured_choice(config, data)
    return [chosen(config, found[recommender_key(config)]) if is_auto(config) else config for config in configs]


def select(measured: Sequence[Measured]) -> Measured:
    """The fastest candidate whose loss is within `TOLERANCE`; the reference, the first, unless `LEAST_GAIN` is saved.

    Example:
        >>> reference = Measured(Candidate("32-true", "sdpa"), 1.0, loss=7.0)
        >>> fast = Measured(Candidate("bf16-mixed", "eager"), 0.5, loss=7.01)
        >>> wrong = Measured(Candidate("bf16-true", "eager"), 0.4, loss=7.1)
        >>> str(select([reference, fast, wrong]).candidate)
        'bf16-mixed with eager'
    """
    reference = measured[0]
    allowed = [found for found in measured if abs(found.loss - reference.loss) <= TOLERANCE * abs(reference.loss)]
    fastest = min(allowed, key=lambda found: found.seconds, default=reference)
    return fastest if fastest.seconds <= (1 - LEAST_GAIN) * reference.seconds else reference


def precisions(config: DictConfig, device: torch.device) -> list[str]:
    """Values of ``trainer.precision`` that are measured, float32 first.

    Those in bfloat16 only where the device multiplies matrices faster in it, and bf16-true only where no weight is
    trained that it would round.
    """
    if config.trainer.precision != AUTO:
        return [str(config.trainer.precision)]
    found = ["32-true"]
    if weights_dtype(config) != "float32" or not _is_fast_in_bf16(device):
        return found
    found.append("bf16-mixed")
    is_frozen = not trains_all(config) and not config.adapter.get("modules_to_save")
    if is_frozen and config.backbone.get("quantize") is None:
        found.append("bf16-true")
    return found


def _measured_choice(config: DictConfig, data: PreparedData) -> Candidate:
    alone = OmegaConf.merge(config, {"split": {"transport": "none", **UNCHANGED}, "trainer": {"compile": False}})
    assert isinstance(alone, DictConfig)
    fabric = build_fabric(alone, alone=True)
    names = precisions(config, fabric.device)
    attention = "sdpa" if config.trainer.attention == AUTO else str(config.trainer.attention)
    if len(names) == 1 and config.trainer.attention != AUTO:
        candidate = Candidate(names[0], attention)
        _tell(config, f"{candidate}: bfloat16 is not faster on this device")
        return candidate
    measured: list[Measured] = []
    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        recommender = build_recommender(alone, data, fabric)
        model = recommender.module.model
        attentions = [attention, "eager"] if config.trainer.attention == AUTO else [attention]
        if model.attention == "eager":
            attentions = ["eager"]
        for precision in names:
            in_precision = build_fabric(chosen(alone, Candidate(precision, attention)), alone=True)
            if precision == "bf16-true":
                _to_bf16(recommender)
            for name in attentions:
                model.use_attention(name)
                seconds, loss = measure(recommender, in_precision, config.seed)
                measured.append(Measured(Candidate(precision, name), seconds, loss))
    best = select(measured)
    reference = measured[0]
    shares = ", ".join(f"{found.candidate} {found.seconds / reference.seconds:.2f}" for found in measured[1:])
    _tell(config, f"{best.candidate}; seconds of a step relative to {reference.candidate}: {shares or 'no other'}")
    return best.candidate


def measure(recommender: Recommender, fabric: Fabric, seed: int) -> tuple[float, float]:
    """Train on the first batch of the first client without an optimiser step.

    Args:
        recommender: What is trained.
        fabric: Precision of the steps.
        seed: Of the run.

    Returns:
        Seconds of the fastest repetition after the first, and the loss.
    """
    batch = fabric.to_device(first_batch(recommender.datamodule, seed))
    loss = trial_step(fabric, recommender.module, batch, seed)
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _SECONDS:
        wait_for(fabric.device)
        started = time.perf_counter()
        trial_step(fabric, recommender.module, batch, seed)
        wait_for(fabric.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds), loss


def _to_bf16(recommender: Recommender) -> None:
    """Round the frozen weights, as if they had been loaded in bfloat16."""
    for name, parameter in recommender.backbone.model.named_parameters():
        if name not in recommender.module.trainable:
            parameter.data = parameter.data.to(torch.bfloat16)


def _is_fast_in_bf16(device: torch.device) -> bool:
    rates = {dtype: matrix_rate(device, dtype, _RATE_SIZE, repeats=5) for dtype in (torch.float32, torch.bfloat16)}
    return rates[torch.bfloat16] > rates[torch.float32]


def _tell(config: DictConfig, what: str) -> None:
    names = [f"trainer.{name}=auto" for name in ("precision", "attention") if config.trainer[name] == AUTO]
    tell(f"{', '.join(names)}: {what}")
