"""From a composed configuration to a recommender: data, backbone, adapter, objective, ranker, metrics."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fellrec.aggregation.base import AggregationCallback
from fellrec.config.instantiate import as_dict, instantiate, settings
from fellrec.config.members import is_federation, with_totals
from fellrec.config.paths import cache_dir
from fellrec.config.registry import kind_of_data, own_settings
from fellrec.cut.link import ServerLink
from fellrec.cut.noise import CutNoise, Disturbance
from fellrec.cut.settings import SplitSettings
from fellrec.data.cold import ColdStart
from fellrec.data.datamodule import FellrecDataModule
from fellrec.data.federation import join
from fellrec.data.holdout import Holdout
from fellrec.data.partition import Partition
from fellrec.data.prepare import prepare
from fellrec.data.prepared import PreparedData
from fellrec.data.schema import Reader
from fellrec.errors import ConfigError
from fellrec.experiment.backbones import sasrec_backbone, tiny_backbone
from fellrec.experiment.compiled import compile_layers, compile_problems
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.joint import joint_problems
from fellrec.experiment.objectives import build_objective, build_ranker, check_all_prompts, of_members
from fellrec.experiment.precision import use_precision, weights_dtype
from fellrec.experiment.privacy import privacy_problems
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.kept import KeptUsers
from fellrec.federated.poison import relabelled
from fellrec.federated.ranks import Ranks
from fellrec.federated.samplers import Sampler
from fellrec.federated.secure_sum import secure_problems
from fellrec.federated.settings import PoisonSettings
from fellrec.functional.by_size import check_length, distinct_numbers
from fellrec.functional.candidates import SampledCandidates
from fellrec.functional.ranges import refuse
from fellrec.functional.ranking import check_cutoffs
from fellrec.metrics.clients import ClientRankingMetrics
from fellrec.models.adapters import AdapterKind, FullAdapter, plain_name
from fellrec.models.architectures import decoder_layers
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.conversion import model_folder
from fellrec.models.fingerprint import fingerprint
from fellrec.models.module import (
    FellrecModule,
    MeasuresHistories,
    Objective,
    OptimizerSettings,
    Ranker,
    ReportingRanker,
)
from fellrec.models.partial import read_body
from fellrec.models.remote import Cut, server_shell
from fellrec.models.split import SplitModel

log = logging.getLogger(__name__)

_BACKBONES = "backbones"
"""The kind of entries of the cache that are model folders."""

_OF_TRAINING = (
    "num_rounds", "local_epochs", "max_local_steps", "batch_size", "accumulate_grad_batches", "learning_rate",
    "weight_decay", "warmup_steps", "learning_rate_decay", "gradient_clip", "reset_optimizer", "evaluate_every",
    "patience", "select", "frontier_floor", "checkpoint_every", "checkpoints_kept", "clients_per_step",
)  # fmt: skip
"""Settings of ``trainer`` that no ranking depends on."""


_OF_MODEL = ("backbone", "adapter", "objective", "ranker", "seed")
"""Groups and settings that decide what an adapter is part of."""


@dataclass(frozen=True)
class ServerPart:
    """The server's part of a recommender.

    Attributes:
        model: The body.
        adapter: What is trained.
        trainable: The adapter's parameters in the body, by name.
        initial: The body's adapter that every client starts from.
        base: Its frozen weights.
    """

    model: SplitModel
    adapter: Any
    trainable: dict[str, nn.Parameter]
    initial: dict[str, Tensor]
    base: BaseWeights


@dataclass(frozen=True)
class Recommender:
    """What all runs of a comparison share: one backbone, one data set, one starting adapter.

    Attributes:
        fabric: Device and precision.
        data: The prepared data set.
        cold: Its cold items and users.
        datamodule: Batches by client.
        module: The recommender.
        initial: The adapter that every client starts from, by name; with an executed cut, that of head and tail.
        adapter: What is trained and exchanged; saves adapters to disk.
        backbone: The backbone with its tokenizer; with an executed cut, the client's partial model.
        base: Its frozen weights.
        fingerprint: Of the backbone, see ``fellrec.models.fingerprint``.
        link: To the server; ``None`` if the cut is not executed.
        server: The server's part, if it is in this process.
        kept: Metrics of users that were ranked with it.
    """

    fabric: Fabric
    data: PreparedData
    cold: ColdStart
    datamodule: FellrecDataModule
    module: FellrecModule
    initial: dict[str, Tensor]
    adapter: Any
    backbone: Backbone
    base: BaseWeights
    fingerprint: dict[str, Any]
    link: ServerLink | None = None
    server: ServerPart | None = None
    kept: KeptUsers = field(default_factory=KeptUsers)


def backbone_path(config: DictConfig) -> tuple[str, str | None]:
    """The folder or hub name of ``backbone=hf``, and its short name if that is not the folder's; see `model_folder`."""
    return model_folder(config.backbone.path, cache_dir(config) / _BACKBONES)


def build_data(config: DictConfig) -> PreparedData:
    """Read, filter, hold out and partition the data set, or take it from the cache.

    Raises:
        DataError: If the data cannot be used.
        ConfigError: If a cutoff is larger than the catalogue.
    """
    if is_federation(config):
        return join(config.data.name, of_members(config, lambda own, _: build_data(own)))
    shaping = own_settings(as_dict(config.data), "data")
    data = prepare(
        reader=instantiate(config.data.reader, "data.reader", of=Reader),
        settings=settings(kind_of_data(shaping), shaping, "data"),
        holdout=instantiate(config.holdout, "holdout", of=Holdout),
        partition=instantiate(config.partition, "partition", of=Partition),
        cache=cache_dir(config) / "data",
    )
    try:
        check_cutoffs(list(config.trainer.cutoffs), len(data.catalogue))
    except ConfigError as error:
        raise ConfigError(f"trainer.cutoffs={list(config.trainer.cutoffs)}: {error}") from error
    return data


def log_notes(config: DictConfig, data: PreparedData) -> None:
    """Warn of what a user may not expect of the data: ties in time, repeated interactions, absent clients or items."""
    for note in data.notes:
        log.warning("data: %s", note)
    num, num_items = config.trainer.sampled_candidates, max(np.diff(data.places.items))
    if num is not None and num >= num_items:
        log.warning("trainer.sampled_candidates=%d: there are %d items, and all of them are candidates", num, num_items)


def build_recommender(config: DictConfig, data: PreparedData, fabric: Fabric | None = None) -> Recommender:
    """Load or pre-train the backbone, cut it, attach the adapter, and connect objective, ranker and metrics.

    With ``split.transport=inprocess`` the cut is executed: the recommender has the client's partial model, and
    ``Recommender.server`` the server's. With ``distributed`` this is a client's process, with the client's part.

    Args:
        config: The configuration.
        data: The prepared data.
        fabric: Device and precision; ``None`` makes one for this process alone.

    Raises:
        ConfigError: If settings do not fit together.
        BackboneError: If the backbone cannot be loaded, cut, or adapted.
    """
    fabric = fabric or build_fabric(config, alone=True)
    use_precision(fabric, config)
    backbone, split, transport = build_backbone(config, data), config.split, config.split.transport
    loaded = fingerprint(backbone)
    body = _server_model(config, backbone) if transport == "inprocess" else None
    adapter = build_adapter(config)
    link = None
    if transport != "none":
        link = ServerLink(split.hidden_dtype, split.gradient_dtype, "body" in adapter.parts, _cut_noise(config))
    model = SplitModel(backbone.model, head_depths(config, adapter.parts), split.tail_layers, link)
    cold = ColdStart.of(data, config.trainer.cold_users_below)
    module = build_module(config, data, backbone, model, adapter, fabric, cold)
    return Recommender(
        fabric=fabric,
        data=data,
        cold=cold,
        datamodule=build_datamodule(config, data, module.objective),
        module=module,
        initial=copy_adapter(module.trainable),
        adapter=adapter,
        backbone=backbone,
        base=BaseWeights(backbone.model, is_whole=link is None),
        fingerprint=loaded,
        link=link,
        server=None if body is None else attach_server(config, body, fabric),
    )


def build_module(
    config: DictConfig,
    data: PreparedData,
    backbone: Backbone,
    model: SplitModel,
    adapter: Any,
    fabric: Fabric,
    cold: ColdStart,
) -> FellrecModule:
    """Attach the adapter to a backbone and connect objective, ranker and metrics.

    Args:
        config: The configuration.
        data: The prepared data; without users, as where a model is served, nothing can be trained or evaluated.
        backbone: The backbone.
        model: The same, cut.
        adapter: Not yet attached.
        fabric: The device.
        cold: Cold items and users of the data.

    Raises:
        ConfigError: If settings do not fit together.
        BackboneError: If the backbone cannot be adapted.
    """
    model.use_attention(config.trainer.attention)
    objective = build_objective(config, backbone, data)
    objective.check(model)
    if len(data.users):
        check_all_prompts(objective, data)
    fabric.to_device(backbone.model)
    adapter.attach(backbone.model, backbone.arch, config.seed, model.part_of)
    if config.trainer.compile:
        compile_layers(model, fabric.device)
    ranker = build_ranker(config, objective, data)
    return FellrecModule(
        model=model,
        trainable=adapter.trainable(backbone.model),
        objective=objective,
        ranker=ranker,
        metrics=_metrics(config, data, ranker, cold.groups(data)),
        title_groups=torch.from_numpy(data.catalogue.title_groups),
        optimizer=OptimizerSettings(config.trainer.learning_rate, config.trainer.weight_decay),
        candidates=_candidates(config),
        choice_metric=config.trainer.metric,
        places=data.places if data.members else None,
    )


def build_sampler(config: DictConfig) -> Sampler:
    """Who is drawn for a round.

    Raises:
        ConfigError: If it is not a subclass of `Sampler`, or does not take its settings.
        DataError: If its file cannot be used.
    """
    sampler: Sampler = instantiate(config.participation.sampler, "participation.sampler", of=Sampler)
    return sampler


def build_rule(config: DictConfig) -> AggregationCallback:
    """The aggregation rule of the configuration.

    Raises:
        ConfigError: If it is not a subclass of `AggregationCallback`, does not take its settings, or cannot be combined
            with other settings.
    """
    rule: AggregationCallback = instantiate(config.aggregation, "aggregation", of=AggregationCallback)
    limits = rule.limits if rule.second_model is None else replace(rule.limits, whole_model=True)
    plain = with_totals(as_dict(config))
    refuse(
        *limits.problems(rule.name, plain),
        *joint_problems(config, rule),
        *privacy_problems(config, rule),
        *secure_problems(rule, plain),
        *compile_problems(config),
    )
    ranks, num_clients = OmegaConf.select(config, "adapter.rank"), plain.get("partition", {}).get("num_clients")
    if OmegaConf.is_list(ranks) and isinstance(num_clients, int):
        Ranks(ranks, num_clients)  # refuses other numbers of ranks
    return rule


def build_adapter(config: DictConfig) -> Any:
    """The adapter of the configuration, not yet attached; see `AdapterKind`.

    Raises:
        ConfigError: If it is not one, or does not take its settings.
    """
    return instantiate(config.adapter, "adapter", of=AdapterKind)


def recommender_key(config: DictConfig) -> str:
    """The same for configurations that can share a recommender: they differ in nothing but the rule."""
    plain = as_dict(config)
    return repr([plain[name] for name in (*_OF_MODEL, "split", "trainer", "poison")])


def evaluation_key(config: DictConfig) -> str:
    """The same for configurations whose recommenders rank alike with one adapter: they differ in training or the cut.

    What an executed cut evaluates is not kept.
    """
    plain = as_dict(config)
    trainer = {name: value for name, value in plain["trainer"].items() if name not in _OF_TRAINING}
    return repr([trainer, *(plain[name] for name in _OF_MODEL)])


def build_backbone(config: DictConfig, data: PreparedData) -> Backbone:
    """The backbone of the configuration: a folder or hub name, or one that is created once and cached.

    With ``split.transport=distributed`` it is the client's share.
    """
    split = config.split
    if OmegaConf.is_list(split.head_layers):
        check_length(split.head_layers, data.num_clients, "split.head_layers")
    cut = (split.head_layers, split.tail_layers) if split.transport == "distributed" else None
    name, dtype = config.backbone.name, weights_dtype(config)
    if name == "hf":
        path, short = backbone_path(config)
        backbone = load_hf(path, dtype, cut, config.backbone.get("quantize"))
        return backbone if short is None else replace(backbone, name=short)
    for depth in head_depths(config):
        Cut(depth, split.tail_layers, config.backbone.num_layers)  # refused before anything is pre-trained
    shaping = {"backbone": as_dict(config.backbone), "objective": as_dict(config.objective)}
    if data.members:
        shaping["of_members"] = of_members(config, lambda own, _: as_dict(own.objective))
    cache = cache_dir(config) / _BACKBONES
    if name == "sasrec":
        return sasrec_backbone(cache, shaping, data, dtype, cut)
    return tiny_backbone(cache, shaping, lambda backbone: _checked_objective(config, backbone, data), data, dtype, cut)


def attach_server(config: DictConfig, model: SplitModel, fabric: Fabric) -> ServerPart:
    """Attach the adapter to the server's partial model, as a whole model would get it."""
    model.use_attention(config.trainer.attention)
    adapter = build_adapter(config)
    adapter.attach(model.model, model.arch, config.seed, model.part_of)
    fabric.to_device(model.model)
    trainable = adapter.trainable(model.model)
    return ServerPart(model, adapter, trainable, copy_adapter(trainable), BaseWeights(model.model, is_whole=True))


def frozen_parameters(recommender: Recommender) -> dict[str, Tensor]:
    """The original weights of the whole backbone that are not trained, by their names without an adapter.

    Those of a server in another process come from the backbone's files.
    """
    client, server = recommender.backbone.model, recommender.server
    found = {name: p for name, p in client.named_parameters() if name not in recommender.module.trainable}
    if server is not None:
        shell = server.model.model
        found |= {name: p for name, p in shell.named_parameters() if name not in server.trainable}
    weights = {plain_name(name): parameter.detach() for name, parameter in found.items()}
    is_body_trained = isinstance(recommender.adapter, FullAdapter) and "body" in recommender.adapter.parts
    is_elsewhere = server is None and recommender.link is not None
    if is_elsewhere and not is_body_trained and (folder := recommender.backbone.folder) is not None:
        cut = recommender.module.model.cut
        weights |= read_body(folder, cut.head_layers, cut.tail_layers)
    return weights


def copy_adapter(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values that an adapter's parameters have now."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def head_depths(config: DictConfig, trained_parts: Collection[str] = ()) -> tuple[int, ...]:
    """The numbers of layers that clients' heads have, ascending.

    Args:
        config: The configuration.
        trained_parts: Those of head, body and tail that have an adapter.

    Raises:
        ConfigError: If there are several, and head and body are not trained alike.
    """
    depths = distinct_numbers(as_dict(config.split)["head_layers"])
    if len(depths) > 1 and ("head" in trained_parts) != ("body" in trained_parts):
        raise ConfigError(
            f"split.head_layers={config.split.head_layers} gives clients different heads, and adapter.layers="
            f"{config.adapter.layers} trains only one of head and body: give both or none of them"
        )
    return depths


def _server_model(config: DictConfig, backbone: Backbone) -> SplitModel:
    """The body's layers, before they leave the client's model."""
    depths, tail = head_depths(config), config.split.tail_layers
    cut = Cut(depths[0], tail, len(decoder_layers(backbone.model, backbone.arch)))
    shell = server_shell(backbone.model, cut)
    layers = decoder_layers(shell, backbone.arch)
    for number in range(depths[0], depths[-1]):  # the server has them for some clients, and others have them too
        layers[number] = copy.deepcopy(layers[number])
    return SplitModel(shell, depths, tail)


def _checked_objective(config: DictConfig, backbone: Backbone, data: PreparedData) -> Objective:
    """The objective to pre-train with; a ranker that cannot be is refused before that."""
    objective = build_objective(config, backbone, data)
    build_ranker(config, objective, data)
    return objective


def _candidates(config: DictConfig) -> SampledCandidates | None:
    num = config.trainer.sampled_candidates
    return None if num is None else SampledCandidates(num, config.seed)


def _metrics(
    config: DictConfig, data: PreparedData, ranker: Ranker, groups: Mapping[str, Mapping[str, Tensor]]
) -> list[ClientRankingMetrics]:
    """One for each of the ranker's choices."""
    reported, choices = (ranker.reported, ranker.choices) if isinstance(ranker, ReportingRanker) else ((), ())
    return [
        ClientRankingMetrics(
            data.num_clients,
            tuple(config.trainer.cutoffs),
            groups,
            reported,
            config.trainer.sampled_candidates,
            members=_clients_of_members(data),
            poisoned=config.poison.clients,
            sync_on_compute=False,  # the coordinator collects the metrics of all processes
        )
        for _ in choices or (None,)
    ]


def _cut_noise(config: DictConfig) -> CutNoise:
    split, seed = settings(SplitSettings, config.split, "split"), config.seed
    return CutNoise(
        Disturbance(split.hidden_clip, split.hidden_noise, seed),
        Disturbance(split.gradient_clip, split.gradient_noise, seed),
    )


def _clients_of_members(data: PreparedData) -> dict[str, range]:
    """The clients of each member of a federation; empty for one data set."""
    bounds = data.places.clients
    return {name: range(bounds[place], bounds[place + 1]) for place, name in enumerate(data.members)}


def build_datamodule(config: DictConfig, data: PreparedData, objective: Objective) -> FellrecDataModule:
    """Batches of an objective by client."""
    measured = {"history_lengths": objective.history_lengths} if isinstance(objective, MeasuresHistories) else {}
    return FellrecDataModule(
        data,
        objective.collate,
        one_target_per_row=objective.one_target_per_row,
        batch_size=config.trainer.batch_size,
        eval_batch_size=config.trainer.eval_batch_size,
        seed=config.seed,
        lengths=objective.lengths,
        relabelled=relabelled(settings(PoisonSettings, config.poison, "poison"), data.places.items),
        **measured,
    )


def build_batches(config: DictConfig, backbone: Backbone, data: PreparedData) -> tuple[Objective, FellrecDataModule]:
    """The local objective and its batches by client; for counting, the backbone needs no weights."""
    objective = build_objective(config, backbone, data)
    return objective, build_datamodule(config, data, objective)
