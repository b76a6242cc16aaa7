"""From a composed configuration to the objects of a run. The only place where configuration meets classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from omegaconf import DictConfig
from torch import Tensor

from fellrec.aggregation.build import build_aggregation
from fellrec.config import as_dict, make
from fellrec.data.datamodule import FellrecDataModule
from fellrec.data.prepared import DataSettings, PreparedData, prepare
from fellrec.errors import ConfigError
from fellrec.federated.client import LocalSettings
from fellrec.federated.hooks import FederatedCallback
from fellrec.federated.loop import FederatedLoop, LoopSettings
from fellrec.federated.state import RunState, Selection
from fellrec.functional.ranking import check_cutoffs
from fellrec.metrics.clients import ClientRankingMetrics
from fellrec.models.adapters import adapter_bytes
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.bank import AdapterBank
from fellrec.models.module import FellrecModule, Objective, OptimizerSettings
from fellrec.models.split import SplitModel
from fellrec.pretrained import tiny_backbone

_BANKS = 7
"""Copies of all adapters that a run holds: now, best, best per client, two AdamW moments, start and end of a round."""


@dataclass(frozen=True)
class Recommender:
    """What every rule of a comparison shares: one backbone, one data set, one starting adapter.

    Attributes:
        fabric: Device and precision.
        data: The prepared data set.
        datamodule: Batches by client.
        module: The recommender.
        initial: The adapter that every client starts from, by name.
        adapter: What is trained and travels; saves adapters to disk.
        backbone: The backbone with its tokenizer.
    """

    fabric: Fabric
    data: PreparedData
    datamodule: FellrecDataModule
    module: FellrecModule
    initial: dict[str, Tensor]
    adapter: Any
    backbone: Backbone


def cache_dir(config: DictConfig) -> Path:
    """The folder of prepared data and pretrained tiny backbones."""
    return Path(config.cache_dir or "~/.cache/fellrec").expanduser()


def build_data(config: DictConfig) -> PreparedData:
    """Read, filter, hold out and partition the data set, or take it from the cache.

    Raises:
        DataError: If the data cannot be used.
        ConfigError: If a cutoff is larger than the catalogue.
    """
    plain = as_dict(config.data)
    settings = DataSettings(**{name: plain[name] for name in DataSettings.__dataclass_fields__})
    data = prepare(
        reader=make(config.data.reader, "data.reader"),
        settings=settings,
        holdout=make(config.holdout, "holdout"),
        partition=make(config.partition, "partition"),
        cache=cache_dir(config) / "data",
    )
    check_cutoffs(list(config.trainer.cutoffs), len(data.catalogue))
    return data


def build_recommender(config: DictConfig, data: PreparedData) -> Recommender:
    """Load or pre-train the backbone, cut it, attach the adapter, and wire objective, ranker and metrics.

    Raises:
        ConfigError: If settings do not fit together.
        BackboneError: If the backbone cannot be loaded, cut, or adapted.
    """
    fabric = Fabric(accelerator=config.trainer.accelerator, devices=1, precision=config.trainer.precision)
    backbone = build_backbone(config, data)
    fabric.to_device(backbone.model)
    model = SplitModel(backbone.model, config.split.head_layers, config.split.tail_layers)
    objective = build_objective(config, backbone, data)
    objective.check(model)
    adapter = make(config.adapter, "adapter")
    adapter.attach(backbone.model, backbone.arch, config.seed, model.part_of)
    trainable = adapter.trainable(backbone.model)
    module = FellrecModule(
        model=model,
        trainable=trainable,
        objective=objective,
        ranker=_ranker(config, objective, backbone, data),
        metrics=ClientRankingMetrics(data.num_clients, tuple(config.trainer.cutoffs)),
        title_groups=torch.from_numpy(data.catalogue.title_groups),
        optimizer=OptimizerSettings(config.trainer.learning_rate, config.trainer.weight_decay),
    )
    initial = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    return Recommender(fabric, data, build_datamodule(config, data, objective), module, initial, adapter, backbone)


def build_backbone(config: DictConfig, data: PreparedData) -> Backbone:
    """The backbone of the configuration: a folder or hub name, or the tiny one, pre-trained once and cached."""
    settings = as_dict(config.backbone)
    if settings["name"] == "hf":
        return load_hf(settings["path"], dtype=settings["dtype"])
    shaping = {"backbone": settings, "objective": as_dict(config.objective)}
    return tiny_backbone(
        cache_dir(config) / "backbones", shaping, lambda backbone: build_objective(config, backbone, data), data
    )


def build_loop(config: DictConfig, recommender: Recommender, callbacks: Sequence[FederatedCallback]) -> FederatedLoop:
    """A federated loop before its first round, every client with the same starting adapter."""
    aggregation = build_aggregation(config.aggregation)
    num_clients = recommender.data.num_clients
    rows = 1 if aggregation.pools_clients else num_clients
    _check_memory(recommender.initial, num_clients)
    trainer = config.trainer
    return FederatedLoop(
        fabric=recommender.fabric,
        module=recommender.module,
        datamodule=recommender.datamodule,
        aggregation=aggregation,
        callbacks=callbacks,
        state=RunState(
            bank=AdapterBank.replicate(recommender.initial, rows),
            selection=Selection(
                metric=trainer.metric,
                bank=AdapterBank.replicate(recommender.initial, rows),
                client_bank=AdapterBank.replicate(recommender.initial, num_clients),
            ),
            local_steps=[0] * rows,
        ),
        settings=LoopSettings(
            num_rounds=trainer.num_rounds,
            evaluate_every=trainer.evaluate_every,
            patience=trainer.patience,
            select=trainer.select,
            reset_optimizer=trainer.reset_optimizer,
            participation_rate=config.participation.rate,
            seed=config.seed,
        ),
        local=LocalSettings(
            local_epochs=trainer.local_epochs,
            max_local_steps=trainer.max_local_steps,
            gradient_clip=trainer.gradient_clip,
            warmup_steps=trainer.warmup_steps,
            seed=config.seed,
        ),
    )


def build_objective(config: DictConfig, backbone: Backbone, data: PreparedData) -> Objective:
    """The local objective for a backbone's tokenizer and the catalogue."""
    objective: Objective = make(
        config.objective,
        "objective",
        tokenizer=backbone.tokenizer,
        catalogue=data.catalogue,
        max_history=data.max_history,
    )
    return objective


def _ranker(config: DictConfig, objective: Objective, backbone: Backbone, data: PreparedData) -> Any:
    return make(config.ranker, "ranker", objective=objective)


def build_datamodule(config: DictConfig, data: PreparedData, objective: Objective) -> FellrecDataModule:
    """Batches by client for an objective."""
    return FellrecDataModule(
        data,
        objective.collate,
        one_target_per_row=objective.one_target_per_row,
        batch_size=config.trainer.batch_size,
        eval_batch_size=config.trainer.eval_batch_size,
        seed=config.seed,
    )


def _check_memory(initial: dict[str, Tensor], num_clients: int) -> None:
    num_bytes = adapter_bytes(initial)
    needed = num_bytes * num_clients * _BANKS
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * present:
        raise ConfigError(
            f"{num_clients} clients with an adapter of {num_bytes / 1e6:.1f} MB each need about "
            f"{needed / 1e9:.1f} GB, this machine has {present / 1e9:.1f} GB; use adapter=lora or fewer clients"
        )
