"""A finished run with the adapters that it selected, for evaluation, recommendations and export."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from fellrec.cut.settings import is_changed
from fellrec.data.prepared import PreparedData
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.classes import check_classes
from fellrec.experiment.federation import Federation, build_federation
from fellrec.experiment.run_dir import check_backbone, check_finished, check_prompt, check_same_data
from fellrec.federated.checkpoint import CHECKPOINTS, CheckpointFolder


def data_of(run_dir: Path, config: DictConfig) -> PreparedData:
    """The data of a finished run, before anything expensive.

    Args:
        run_dir: Of the run.
        config: Its configuration, see ``read_config``.

    Raises:
        ConfigError: If it is not the directory of a finished run, or the data differ from those of training.
    """
    check_classes(config)
    check_finished(run_dir, config.trainer.num_rounds)
    data = build_data(config)
    check_same_data(run_dir, data)
    return data


def restore(
    run_dir: Path, config: DictConfig, data: PreparedData | None = None, transport: str | None = None
) -> tuple[Recommender, Federation]:
    """Build a finished run again in this process, and load its last checkpoint.

    Args:
        run_dir: Of the run.
        config: Its configuration, see ``read_config``; ``split.transport`` is changed to what one process can do.
        data: From `data_of`; ``None`` to read them.
        transport: ``"none"`` or ``"inprocess"``; ``None`` for the one that gives the figures of the run.

    Raises:
        ConfigError: If it is not the directory of a finished run, or data, backbone or prompt differ from those of
            training.
    """
    data = data_of(run_dir, config) if data is None else data
    # In one process, with the same figures: one model, unless what is sent is rounded, clipped or noised.
    config.split.transport = transport or _transport(config)
    recommender = build_recommender(config, data)
    check_prompt(run_dir, recommender.module.objective)
    check_backbone(run_dir, recommender.fingerprint, recommender.backbone.name)
    federation = build_federation(config, recommender)
    parts = {name: part for name, part in federation.persisted.items() if name != "kept"}  # all users are ranked again
    CheckpointFolder(run_dir / CHECKPOINTS).load(parts)
    return recommender, federation


def _transport(config: DictConfig) -> str:
    return "inprocess" if config.split.transport != "none" and is_changed(config.split) else "none"
