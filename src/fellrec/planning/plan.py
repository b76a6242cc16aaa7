"""The cost of a run, computed from its configuration: no weights are loaded and nothing is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from omegaconf import DictConfig

from fellrec.aggregation.base import AggregationCallback
from fellrec.config.instantiate import as_dict
from fellrec.data.datamodule import FellrecDataModule
from fellrec.errors import ConfigError
from fellrec.experiment.build import (
    build_adapter,
    build_batches,
    build_data,
    build_rule,
    build_sampler,
    head_depths,
)
from fellrec.experiment.federation import head_layers_of, ranks_of
from fellrec.experiment.privacy import build_privacy, introduction
from fellrec.federated.population import Population
from fellrec.federated.settings import TrainerSettings
from fellrec.functional.cost import (
    PartCost,
    RoundLoad,
    Traffic,
    TrafficSettings,
    checkpoint_bytes,
    fraction,
    total_cost,
    traffic,
    training_flops,
)
from fellrec.functional.participation import cohort_size
from fellrec.models.adapters import FullAdapter
from fellrec.models.module import Objective
from fellrec.models.remote import PARTS
from fellrec.models.settings import EVERY_STEP
from fellrec.models.split import SplitModel, bytes_of_parts
from fellrec.planning.load import Load, count_load, count_pass, count_work
from fellrec.planning.losses import Losses, losses_of, with_losses
from fellrec.planning.measure import measure_parts
from fellrec.planning.probe import seconds_per_step
from fellrec.planning.shape import empty_backbone, has_weights

T = TypeVar("T")


@dataclass(frozen=True)
class PlanSettings:
    """Settings that the notes below the tables depend on.

    Attributes:
        precision: ``trainer.precision``; its casts are not part of the activations.
        transport: ``split.transport``; with ``none`` a run keeps all parts in one process.
        clients_at_once: Clients that the server trains at the same time, one for each client process.
        clients_per_step: ``trainer.clients_per_step``: clients that one process trains at the same time.
        keeps_item_vectors: Whether the objective caches item vectors across steps in some rounds.
    """

    precision: str
    transport: str
    clients_at_once: int
    clients_per_step: int
    keeps_item_vectors: bool


@dataclass(frozen=True)
class ClientPlan:
    """A client's part of the adapter.

    Attributes:
        rank: LoRA rank.
        num_samples: Training samples.
        head_bytes: Adapter in the head.
        body_bytes: Adapter in the body, at the server.
        tail_bytes: Adapter in the tail.
    """

    rank: int
    num_samples: int
    head_bytes: int
    body_bytes: int
    tail_bytes: int


@dataclass(frozen=True)
class Plan:
    """The cost of one configuration.

    Attributes:
        data: Name of the data set.
        backbone: Name of the backbone.
        num_parameters: Number of parameters of the backbone.
        num_clients: C.
        cohort_size: Number of clients per round.
        head: The client's first part.
        body: The server's part.
        tail: The client's last part.
        load: Steps and tokens of a round.
        traffic: Traffic per client and round, mean over clients.
        checkpoint_bytes: Size of one checkpoint on disk.
        micro_batch: Rows and tokens of the largest micro-batch, for which activations are counted.
        settings: Settings that the notes below the tables depend on.
        has_own_tokenizer: Whether tokens were counted with the backbone's own tokenizer.
        seconds_per_round: Training time of a round with clients one after another; ``None`` without a probe.
        clients: What the clients have of the adapter, where LoRA ranks may differ; empty otherwise.
        clients_by_head: Clients by the number of layers in their head; this plan has the head with ``head.num_layers``.
        noise_multiplier: Standard deviation of the noise of the sum of updates divided by the clipping norm, with
            ``privacy``; ``None`` without.
        privacy: The same in words, with what is protected; empty without.
    """

    data: str
    backbone: str
    num_parameters: int
    num_clients: int
    cohort_size: int
    head: PartCost
    body: PartCost
    tail: PartCost
    load: Load
    traffic: Traffic
    checkpoint_bytes: int
    micro_batch: tuple[int, int]
    settings: PlanSettings
    has_own_tokenizer: bool
    seconds_per_round: float | None = None
    clients: tuple[ClientPlan, ...] = ()
    clients_by_head: Mapping[int, int] = field(default_factory=dict)
    noise_multiplier: float | None = None
    privacy: str = ""

    @property
    def client(self) -> PartCost:
        """Head and tail."""
        return total_cost([self.head, self.tail])

    @property
    def server(self) -> PartCost:
        """The body."""
        return self.body

    @property
    def client_peak_bytes(self) -> int:
        """Peak memory of one client, or of the ``clients_per_step`` that a process trains at once."""
        return self.client.peak_bytes(self.settings.clients_per_step)

    @property
    def server_peak_bytes(self) -> int:
        """Peak memory of the server with ``clients_at_once``; 0 without a body."""
        return self.server.peak_bytes(self.settings.clients_at_once)

    @property
    def client_weight_share(self) -> float:
        """Fraction of the backbone's weights that the client stores, in [0, 1]."""
        return fraction(self.client.weight_bytes, self.client.weight_bytes + self.server.weight_bytes)

    @property
    def client_compute_share(self) -> float:
        """Fraction of the forward FLOPs on the client, in [0, 1]."""
        return fraction(self.client.forward_flops, self.client.forward_flops + self.server.forward_flops)

    @property
    def round_bytes(self) -> float:
        """Traffic of all clients of a round."""
        return self.traffic.total_bytes * self.cohort_size

    @property
    def cut_to_adapter_ratio(self) -> float | None:
        """Traffic through the cuts divided by traffic of adapters; ``None`` if the client has no adapter."""
        if not self.traffic.adapter_bytes:
            return None
        return (self.traffic.hidden_bytes + self.traffic.gradient_bytes) / self.traffic.adapter_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values: bytes, counts, seconds, and fractions in [0, 1]."""
        return {
            "data": self.data,
            "backbone": self.backbone,
            "num_parameters": self.num_parameters,
            "num_clients": self.num_clients,
            "cohort_size": self.cohort_size,
            "layers": {"head": self.head.num_layers, "body": self.body.num_layers, "tail": self.tail.num_layers},
            "client": _with_derived(self.client, self.client_peak_bytes),
            "server": _with_derived(self.server, self.server_peak_bytes),
            "client_weight_share": self.client_weight_share,
            "storage_saved": 1 - self.client_weight_share,
            "client_compute_share": self.client_compute_share,
            "micro_batch": {"rows": self.micro_batch[0], "tokens": self.micro_batch[1]},
            "steps_per_client": self.load.mean.num_steps,
            "tokens_per_client": self.load.mean.num_tokens,
            "measured_losses_per_client": self.load.mean.num_losses,
            "measured_tokens_per_client": self.load.mean.measured_tokens,
            "traffic_per_client": {**asdict(self.traffic), "total_bytes": self.traffic.total_bytes},
            "traffic_per_round_bytes": self.round_bytes,
            "cut_to_adapter_ratio": self.cut_to_adapter_ratio,
            "checkpoint_bytes": self.checkpoint_bytes,
            "seconds_per_round": self.seconds_per_round,
            **asdict(self.settings),
            "clients": [asdict(client) for client in self.clients],
            "clients_by_head": dict(self.clients_by_head),
            "noise_multiplier": self.noise_multiplier,
            "privacy": self.privacy,
            "is_sampled": self.load.is_sampled,
            "has_own_tokenizer": self.has_own_tokenizer,
        }


def _with_derived(part: PartCost, peak_bytes: int) -> dict[str, int]:
    derived = {"gradient_bytes": part.gradient_bytes, "optimizer_bytes": part.optimizer_bytes}
    return {**asdict(part), **derived, "peak_bytes": peak_bytes}


class Planner:
    """Plans several configurations; data and load that they have in common are computed once."""

    def __init__(self) -> None:
        self._cache: dict[str, Any] = {}

    def plans(self, config: DictConfig, probe_steps: int | None = None) -> list[Plan]:
        """Compute the cost of one configuration: for each number of layers in clients' heads, as if all had it.

        Args:
            config: Composed configuration; ``backbone.path`` may be missing if ``backbone.config`` is given.
            probe_steps: See `plan`.
        """
        return [self.plan(config, probe_steps, depth) for depth in head_depths(config)]

    def plan(self, config: DictConfig, probe_steps: int | None = None, head_layers: int | None = None) -> Plan:
        """Compute the cost of one configuration.

        Args:
            config: Composed configuration; ``backbone.path`` may be missing if ``backbone.config`` is given.
            head_layers: Layers in the head of all clients; ``None`` for ``split.head_layers``, the smallest of several.
            probe_steps: Local steps to time; ``None`` for none.

        Raises:
            ConfigError: If settings contradict each other, or ``probe_steps`` is given for a backbone without weights.
            DataError: If the data cannot be used.
            BackboneError: If the backbone cannot be read, split, or adapted.
        """
        if config.backbone.get("quantize") is not None:
            raise ConfigError("plan counts weights in backbone.dtype; leave out backbone.quantize")
        if probe_steps is not None:
            _check_probe(config, probe_steps)
        data = self._once(config, ("data", "holdout", "partition"), lambda: build_data(config))
        private = build_privacy(config, data.num_clients)
        backbone, is_own = empty_backbone(config, data.catalogue)
        num_parameters = backbone.num_parameters  # without those of the adapter
        depth = head_depths(config)[0] if head_layers is None else head_layers
        model = SplitModel(backbone.model, depth, config.split.tail_layers)
        objective, batches = build_batches(config, backbone, data)
        objective.check(model)
        rule = build_rule(config)
        population = rule.new_population({}, data.num_clients)
        load = self._load(config, objective, batches, rule, population)
        adapter = build_adapter(config)
        parts = measure_parts(model, adapter, objective, load.largest_batch)
        clients = _clients(adapter, model, batches)
        num_training = cohort_size(data.num_clients, config.participation.rate)
        num_updates = rule.buffer_of(num_training) or num_training
        seconds = None
        if probe_steps is not None:
            per_step = seconds_per_step(config, data, load.largest_client, probe_steps)
            per_step /= _models_in_step(rule)
            seconds = _seconds(config, per_step, load.mean, num_updates, _server_steps(config, population, batches))
        rows, tokens = load.largest_batch["input_ids"].shape
        return Plan(
            data=data.name,
            backbone=backbone.name,
            num_parameters=num_parameters,
            num_clients=data.num_clients,
            cohort_size=num_updates,
            **parts,
            load=load,
            traffic=traffic(
                **_with_mean_adapter(parts, clients),
                load=load.mean,
                settings=_traffic_settings(config, backbone.model, rule),
            ),
            checkpoint_bytes=checkpoint_bytes(total_cost(parts.values()), data.num_clients, population.num_rows),
            micro_batch=(rows, tokens),
            settings=_settings(config),
            has_own_tokenizer=is_own,
            seconds_per_round=seconds,
            clients=clients,
            clients_by_head=Counter(head_layers_of(config, batches)),
            noise_multiplier=None if private is None else private.multiplier,
            privacy=introduction(private),
        )

    def _load(
        self,
        config: DictConfig,
        objective: Objective,
        batches: FellrecDataModule,
        rule: AggregationCallback,
        population: Population,
    ) -> Load:
        """The load of a client with all that it trains: a second row of its own, a second model in each step."""
        groups = ("data", "holdout", "partition", "backbone", "objective", "trainer", "seed")
        trainer, held_out = TrainerSettings(**as_dict(config.trainer)), rule.held_out

        def count(is_start: bool) -> tuple[float, float]:
            """Micro-batches and tokens of one pass, over the training rows or the held-out ones."""
            of_held_out = held_out > 0 and not is_start
            passed = (batches, objective, held_out, of_held_out)
            return self._once(config, groups, lambda: count_pass(*passed), "pass", held_out, of_held_out)

        load = self._once(
            config,
            groups,
            lambda: count_load(batches, objective, trainer, config.seed, held_out),
            held_out,
        )
        times = len(population.rows_of(0)) * _models_in_step(rule)
        trained = replace(load.mean, num_steps=times * load.mean.num_steps, num_tokens=times * load.mean.num_tokens)
        return replace(load, mean=with_losses(trained, _losses(config, rule, batches.data.num_clients), count))

    def _once(self, config: DictConfig, groups: tuple[str, ...], function: Callable[[], T], *more: Any) -> T:
        """Call a function once for all configurations with the same values in these groups."""
        plain = as_dict(config)
        key = repr([*more, *((name, plain[name]) for name in groups)])
        if key not in self._cache:
            self._cache[key] = function()
        found: T = self._cache[key]
        return found


def _losses(config: DictConfig, rule: AggregationCallback, num_clients: int) -> Losses:
    """What clients measure in a round."""
    how = config.participation
    needed = cohort_size(num_clients, how.rate)
    num_drawn = min(num_clients, math.ceil(how.over_selection * needed - 1e-9))
    return losses_of(rule, build_sampler(config), num_clients, num_drawn, needed)


def _seconds(config: DictConfig, per_step: float, load: RoundLoad, num_updates: int, server_steps: int) -> float:
    """Time of a round; a forward pass takes that part of a step that it has of the step's operations."""
    in_step = config.trainer.accumulate_grad_batches
    per_batch = per_step / in_step / training_flops(1.0, isinstance(build_adapter(config), FullAdapter))
    return num_updates * (per_step * load.num_steps + per_batch * load.measured_batches) + per_step * server_steps


def _models_in_step(rule: AggregationCallback) -> int:
    """Models that take an optimiser step, each with a pass of its own, in every local step that is timed."""
    return 1 if rule.second_model is None else 2


def _server_steps(config: DictConfig, population: Population, batches: FellrecDataModule) -> int:
    """Steps of the server's own training in a round."""
    trainer = TrainerSettings(**as_dict(config.trainer))
    return sum(count_work(batches.num_batches(population.data_of(row)), trainer)[0] for row in population.server_rows)


def _check_probe(config: DictConfig, num_steps: int) -> None:
    if not has_weights(config):
        raise ConfigError(
            f"--probe {num_steps} needs weights, and backbone.config={config.backbone.config} has none; "
            "give backbone.path=… or leave out --probe"
        )
    if config.split.transport == "distributed":
        raise ConfigError(
            f"--probe {num_steps} runs in one process; use split.transport=none or inprocess, not distributed"
        )


def _clients(adapter: Any, model: SplitModel, batches: FellrecDataModule) -> tuple[ClientPlan, ...]:
    """What each client has of an adapter that is attached to the model; empty if all have the same."""
    ranks = ranks_of(adapter, batches)
    if ranks is None:
        return ()
    parameters = adapter.trainable(model.model)
    found = []
    for client, rank in enumerate(ranks.of_client):
        sizes = bytes_of_parts(model, {name: ranks.narrow(client, name, p) for name, p in parameters.items()})
        found.append(ClientPlan(rank, batches.num_samples(client), *(sizes[part] for part in PARTS)))
    return tuple(found)


def _with_mean_adapter(parts: Mapping[str, PartCost], clients: Sequence[ClientPlan]) -> dict[str, PartCost]:
    """The parts with the adapter's mean size over clients, rounded to bytes: traffic is the mean over clients."""
    if not clients:
        return dict(parts)
    means = {name: round(sum(getattr(c, f"{name}_bytes") for c in clients) / len(clients)) for name in parts}
    return {name: replace(part, adapter_bytes=means[name]) for name, part in parts.items()}


def _settings(config: DictConfig) -> PlanSettings:
    objective = config.objective
    kept = objective.get("refresh_items", EVERY_STEP) != EVERY_STEP or objective.get("freeze_items_after") is not None
    devices, transport = config.trainer.devices, config.split.transport
    several = transport == "distributed" and devices != "auto"
    per_step = config.trainer.clients_per_step
    at_once = max(1, devices * config.trainer.num_nodes - 1) if several else per_step
    return PlanSettings(config.trainer.precision, transport, at_once, per_step, kept)


def _traffic_settings(config: DictConfig, model: Any, rule: AggregationCallback) -> TrafficSettings:
    own = str(model.dtype).removeprefix("torch.")
    hidden, gradient = config.split.hidden_dtype, config.split.gradient_dtype
    return TrafficSettings(
        hidden_size=model.config.hidden_size,
        hidden_dtype=own if hidden == "float32" else hidden,  # never cast to a wider type
        gradient_dtype=own if gradient == "float32" else gradient,
        clips_gradients=config.trainer.gradient_clip is not None,
        exchanges_adapters=rule.sees != "nothing",
        has_local_terms=bool(rule.local_terms),
    )
