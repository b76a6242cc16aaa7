"""Which attacks fit a run; without PyTorch, so that a wrong one is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from fellrec.attacks import ON_CUT, check_names
from fellrec.config.members import is_federation
from fellrec.errors import ConfigError
from fellrec.models.settings import parts_of


def check_attacks(config: DictConfig, names: Sequence[str]) -> None:
    """Refuse attacks that do not exist or do not fit a run, before anything expensive.

    Raises:
        ConfigError: Saying which, and what is allowed.
    """
    check_names(names)
    if is_federation(config):
        raise ConfigError("data=federation cannot be attacked: attack a run on one of its data sets")
    on_text = [name for name in names if name in ON_CUT]
    if config.backbone.name == "sasrec" and on_text:
        raise ConfigError(
            f"attack={','.join(on_text)} recovers text, and backbone=sasrec reads item ids: attack a run with "
            "backbone=tiny or backbone=hf"
        )
    if "update_rows" in names and "rank" in config.adapter:
        raise ConfigError(
            "attack=update_rows reads the rows of the token embedding, which adapter=lora does not train: use "
            "attack=update_scores"
        )
    trained = parts_of(config.adapter.get("layers", "head+body+tail"))
    if on_text and ("head" in trained) != ("body" in trained):
        raise ConfigError(
            f"attack={','.join(on_text)} cuts the model at several depths, and adapter.layers={config.adapter.layers} "
            "trains only one of head and body: attack a run that trains both or none of them"
        )
