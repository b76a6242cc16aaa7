"""The first lines of a run: what is trained on what, and about how long it takes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from fellrec.distributed.devices import wait_for
from fellrec.experiment.build import Recommender
from fellrec.experiment.privacy import introduction
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.trial import first_batch, trial_step
from fellrec.models.adapters import plain_name
from fellrec.terminal import duration, is_shown, tell

_MOST_MODULES = 8
"""Names of modules in the line."""
_MOST_STEPS = 5
"""Steps that are timed, after the first one."""


def introduce(config: DictConfig, recommender: Recommender, loop: FederatedLoop, rule: str, num_runs: int = 1) -> None:
    """Print the lines, unless the command is quiet.

    Args:
        config: Of the run.
        recommender: What is trained.
        loop: The run, before its first step.
        rule: The rule's name in tables.
        num_runs: Runs of the command; all of them are taken to be as long.
    """
    if is_shown():
        tell("\n".join(_lines(config, recommender, loop, rule, num_runs)))


def _lines(
    config: DictConfig, recommender: Recommender, loop: FederatedLoop, rule: str, num_runs: int
) -> Iterator[str]:
    data, trainer = recommender.data, config.trainer
    num_users = int((data.client_of_user >= 0).sum())
    clients, rounds = _counted(data.num_clients, "client"), _counted(trainer.num_rounds, "round")
    yield f"{rule} on {data.name}: {clients}, {num_users:,} users, {len(data.catalogue):,} items; {rounds}"
    yield f"backbone {recommender.backbone.name}: {_trained(recommender)}"
    if private := introduction(loop.exchange.privacy):
        yield private
    lengths = recommender.datamodule.input_lengths("val")
    unit = "items" if recommender.backbone.name == "sasrec" else "tokens"
    if len(lengths):
        yield f"input of a user: {lengths.mean():.0f} {unit} on average, at most {lengths.max()}"
    start = loop.start()
    num_left = max(0, start.num_steps - start.steps_done)
    seconds = _step_seconds(recommender, config.seed) if num_left else None
    if seconds is not None:
        total = seconds * num_left / max(1, recommender.fabric.world_size)
        runs = f" a run, {num_runs} runs" if num_runs > 1 else ""
        steps = f"{num_left:,} steps of {seconds:.2g} s"
        yield f"training: about {duration(total)}{runs} ({steps}); evaluations come on top"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _trained(recommender: Recommender) -> str:
    """How many parameters train, and in which modules."""
    trainable = recommender.module.trainable
    count = sum(parameter.numel() for parameter in trainable.values())
    total = sum(parameter.numel() for parameter in recommender.backbone.model.parameters())
    if count == total:
        return f"all {total:,} parameters are trained"
    names = sorted({_module(name) for name in trainable})
    more = f" and {len(names) - _MOST_MODULES} others" if len(names) > _MOST_MODULES else ""
    return (
        f"{count:,} of {total:,} parameters are trained ({count / total:.2%}), in "
        f"{', '.join(names[:_MOST_MODULES])}{more}"
    )


def _module(name: str) -> str:
    """The last part of the name of the module that a parameter belongs to.

    Example:
        >>> _module("base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"), _module("model.norm.weight")
        ('q_proj', 'norm')
    """
    path = re.sub(r"\.(lora_\w+|base_layer)\b.*", "", plain_name(name))
    return re.sub(r"\.(weight|bias)$", "", path).rpartition(".")[2]


def _step_seconds(recommender: Recommender, seed: int) -> float | None:
    """Seconds of a training step, by some that change nothing; ``None`` with an executed cut, where it is counted."""
    module, fabric = recommender.module, recommender.fabric
    if recommender.link is not None:
        return None
    batch = fabric.to_device(first_batch(recommender.datamodule, seed))

    def step() -> None:
        """One training step, until the device has finished it."""
        trial_step(fabric, module, batch, seed)
        wait_for(fabric.device)

    return typical_seconds(step)


def typical_seconds(step: Callable[[], object], long_seconds: float = 3.0) -> float:
    """The median of the times of a few calls, without the first one, which may compile, or allocate.

    A single call may wait for another process; the median is not changed by it.

    Args:
        step: What is timed.
        long_seconds: After so long, without the first call, it is not called again; nor if the first call takes ten
            times as long.
    """
    measured: list[float] = []
    while len(measured) <= _MOST_STEPS and sum(measured[1:]) < long_seconds and sum(measured[:1]) < 10 * long_seconds:
        started = time.perf_counter()
        step()
        measured.append(time.perf_counter() - started)
    return statistics.median(measured[1:] or measured)
