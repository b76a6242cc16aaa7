"""What ``trainer.clients_per_step`` cannot be combined with."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from fellrec.aggregation.base import AggregationCallback
from fellrec.config.instantiate import import_target
from fellrec.models.adapters import LoraAdapter
from fellrec.models.module import PreparesSteps
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.settings import EVERY_STEP


def joint_problems(config: DictConfig, rule: AggregationCallback) -> list[str]:
    """What of a configuration excludes training several clients at once; one line each, before anything is loaded.

    Args:
        config: The configuration of a run.
        rule: Its aggregation rule.
    """
    number = _at(config, "trainer.clients_per_step", 1)
    if number == 1:
        return []
    found = [*_of_models(config), *_of_training(config, rule)]
    return [f"trainer.clients_per_step={number} {problem}" for problem in found if problem]


def _of_models(config: DictConfig) -> list[str | None]:
    adapter, saved = _at(config, "adapter._target_", ""), _at(config, "adapter.modules_to_save", ())
    transport, quantize = _at(config, "split.transport", "none"), _at(config, "backbone.quantize", None)
    is_lora = adapter and issubclass(import_target(adapter, "adapter"), LoraAdapter)
    return [
        None if is_lora else f"needs adapter=lora, it is {adapter}: other adapters cannot differ between rows",
        f"needs adapter.modules_to_save=[], it is {list(saved)}: these modules cannot differ between rows"
        if saved
        else None,
        f"needs split.transport=none, it is {transport}: through the cut each client has messages of its own"
        if transport != "none"
        else None,
        f"needs backbone.quantize=null, it is {quantize}: it is not tested with quantised weights"
        if quantize
        else None,
    ]


def _of_training(config: DictConfig, rule: AggregationCallback) -> list[str | None]:
    together, precision = _at(config, "trainer.devices_per_client", 1), _at(config, "trainer.precision", "32-true")
    return [
        f"needs trainer.devices_per_client=1, it is {together}" if together != 1 else None,
        "needs another trainer.precision than 16-mixed, whose one scale of the loss would be that of all clients"
        if precision == "16-mixed"
        else None,
        f"is not available with aggregation={rule.name}, whose clients train a second model beside the adapter"
        if rule.second_model is not None
        else None,
        _keeping_from_step_to_step(config),
    ]


def _keeping_from_step_to_step(config: DictConfig) -> str | None:
    target = _at(config, "objective._target_", "")
    kind = import_target(target, "objective") if target else object
    if not issubclass(kind, RetrievalObjective):
        return f"is not available with {target}, which prepares steps" if issubclass(kind, PreparesSteps) else None
    refresh = _at(config, "objective.refresh_items", EVERY_STEP)
    after = _at(config, "objective.freeze_items_after", None)
    if refresh == EVERY_STEP and after is None:
        return None
    given = f"objective.refresh_items={refresh}" if refresh != EVERY_STEP else f"objective.freeze_items_after={after}"
    return f"is not available with {given}: kept item vectors are those of one client"


def _at(config: DictConfig, key: str, default: Any) -> Any:
    """The value under a dotted key, or a default."""
    return OmegaConf.select(config, key, default=default)
