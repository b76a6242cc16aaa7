"""From a composed configuration and a recommender to the parts of a federated run, and to its loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import Any

from lightning import Fabric
from omegaconf import DictConfig

from fellrec.aggregation.base import AggregationCallback
from fellrec.config.instantiate import as_dict, instantiate, settings
from fellrec.config.members import with_totals
from fellrec.config.registry import own_settings
from fellrec.cut.client_model import CutClientModel
from fellrec.cut.link import InProcess, Transport
from fellrec.cut.server import BodyServer, ServerSettings
from fellrec.data.datamodule import FellrecDataModule
from fellrec.distributed.batch_sharing import BatchSharing
from fellrec.errors import ConfigError
from fellrec.experiment.build import Recommender, ServerPart, build_rule, build_sampler
from fellrec.experiment.privacy import build_privacy
from fellrec.federated.arrivals import Arrivals
from fellrec.federated.callback import Events, FederatedCallback
from fellrec.federated.checkpoint import Persisted
from fellrec.federated.client_model import ClientModel, WholeClientModel
from fellrec.federated.evaluator import Evaluator
from fellrec.federated.exchange import Exchange, Meter, Transform
from fellrec.federated.executor import Executor, SerialExecutor
from fellrec.federated.joint import JointTrainer
from fellrec.federated.kept import KeptOfPopulation
from fellrec.federated.ledger import Ledger
from fellrec.federated.local import LocalTrainer
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.participation import AllAtOnce, Clients, Participation
from fellrec.federated.poison import Poison, problems
from fellrec.federated.population import Population
from fellrec.federated.progress import Progress
from fellrec.federated.ranks import Ranks
from fellrec.federated.records import LoraLayer
from fellrec.federated.selection import Selection
from fellrec.federated.settings import ExchangeSettings, ParticipationSettings, PoisonSettings, TrainerSettings
from fellrec.functional.by_size import of_clients
from fellrec.functional.participation import cohort_size
from fellrec.functional.ranges import refuse
from fellrec.models.adapters import lora_layers
from fellrec.models.module import OptimizerSettings
from fellrec.types import PUBLIC


@dataclass(frozen=True)
class Federation:
    """The parts of a federated run before its first round.

    Attributes:
        rule: The aggregation rule.
        population: Every client with the same starting adapter.
        participation: Who trains in a round.
        executor: Where clients train.
        evaluator: Ranks users in this process, and so tells how far an evaluation is.
        exchange: What leaves a client and comes back.
        selection: The best adapters so far.
        progress: How far the run is.
        ledger: What crossed between clients and server.
        settings: Of the trainer.
        steps_per_round: Optimiser steps of a round in which every client trains.
        server_steps: Optimiser steps of the server's own training in a round.
        kept: Metrics of users that were ranked with the adapters that serve them.
    """

    rule: AggregationCallback
    population: Population
    participation: Participation
    executor: Executor
    evaluator: Evaluator
    exchange: Exchange
    selection: Selection
    progress: Progress
    ledger: Ledger
    settings: TrainerSettings
    steps_per_round: int
    server_steps: int
    kept: KeptOfPopulation

    @property
    def persisted(self) -> dict[str, Persisted]:
        """The parts with state that a resume needs, by name, in the order in which they are loaded."""
        parts: dict[str, Any] = {
            "progress": self.progress,
            "population": self.population,
            "participation": self.participation,
            "selection": self.selection,
            "rule": self.rule,
            "exchange": self.exchange,
            "ledger": self.ledger,
            "kept": self.kept,
        }
        return parts | ({"executor": self.executor} if hasattr(self.executor, "state_dict") else {})

    def loop(self, callbacks: Sequence[FederatedCallback] = ()) -> FederatedLoop:
        """The loop; the rule's own hooks are called before those of the callbacks."""
        events = Events([self.rule, *callbacks])
        self.evaluator.on_users_scored = partial(events.call, "on_users_scored")
        return FederatedLoop(
            population=self.population,
            participation=self.participation,
            executor=self.executor,
            exchange=self.exchange,
            rule=self.rule,
            selection=self.selection,
            progress=self.progress,
            events=events,
            settings=self.settings,
            steps_per_round=self.steps_per_round,
            server_steps=self.server_steps,
        )


def build_federation(config: DictConfig, recommender: Recommender, session: Any = None) -> Federation:
    """The parts of a run, every client with the same starting adapter.

    Args:
        config: The configuration.
        recommender: What all runs of a comparison share.
        session: The processes of the command (``Session``); ``None`` if there is one.
    """
    rule, ledger = build_rule(config), Ledger()
    trainer = settings(TrainerSettings, config.trainer, "trainer")
    rule.part_of = recommender.module.model.part_of
    num_clients = recommender.data.num_clients
    num_rows = max(num_clients, rule.new_population({}, num_clients).num_rows)  # whom a message can be about
    server = None
    if recommender.server is not None:
        server = build_server(config, recommender.server, num_rows, recommender.fabric)
    transport = InProcess(server) if server is not None else session.transport() if recommender.link else None
    local = build_serial(config, recommender, transport, ledger, session and session.sharing)
    body = recommender.server.initial if recommender.server is not None else {}
    executor: Executor = local
    meters: list[Meter] = []
    if session is not None:
        body = session.begin(config, recommender, num_rows)
        executor = pool = session.executor(local, ledger)
        meters.append(pool.costs)
    if recommender.link is not None:
        meters.append(recommender.link.costs)
    initial = {**recommender.initial, **body}
    initial = {name: initial[name].cpu() for name in sorted(initial)}  # rules compute there, whatever clients train on
    rule.begin(initial)
    ranks = ranks_of(recommender.adapter, recommender.datamodule, rule.changes_ranks)
    population = rule.new_population(initial, num_clients, trainer.reset_optimizer, ranks)
    if population.server_rows and not recommender.datamodule.num_samples(PUBLIC):
        rate = with_totals(as_dict(config))["data"]["public_user_rate"]
        raise ConfigError(
            f"aggregation {rule.name} trains on the public users at the server, and data.public_user_rate={rate} gives "
            "none with a training target: raise it"
        )
    poison = build_poison(config, num_clients)
    exchange = settings(ExchangeSettings, config.exchange, "exchange")
    transforms = [instantiate(node, "exchange.transforms", of=Transform) for node in config.exchange.transforms]
    trained = [row for participant in range(population.num_participants) for row in population.rows_of(participant)]
    return Federation(
        rule=rule,
        population=population,
        participation=_participation(config, rule, population, local.trainer),
        executor=executor,
        evaluator=local.evaluator,
        exchange=Exchange(
            rule=rule,
            ledger=ledger,
            transforms=transforms,
            at_server=_at_server(config, recommender),
            meters=meters,
            layers=_layers(recommender),
            num_clients=num_clients,
            ranks=ranks,
            privacy=build_privacy(config, num_clients),
            poison=poison,
            secure=exchange if exchange.secure else None,
        ),
        selection=Selection(population, trainer.metric, trainer.select, trainer.patience, trainer.frontier_floor),
        progress=Progress(),
        ledger=ledger,
        settings=trainer,
        steps_per_round=sum(local.trainer.num_steps(population.data_of(row)) for row in trained),
        server_steps=sum(local.trainer.num_steps(population.data_of(row)) for row in population.server_rows),
        kept=KeptOfPopulation(recommender.kept, population),
    )


def build_loop(
    config: DictConfig, recommender: Recommender, callbacks: Sequence[FederatedCallback] = (), session: Any = None
) -> FederatedLoop:
    """A federated loop before its first round, with these callbacks; see `build_federation`."""
    return build_federation(config, recommender, session).loop(callbacks)


def build_serial(
    config: DictConfig,
    recommender: Recommender,
    transport: Transport | None,
    ledger: Ledger,
    sharing: BatchSharing | None = None,
) -> SerialExecutor:
    """What trains and evaluates in this process.

    Args:
        config: The configuration.
        recommender: With the model of this process.
        transport: To the body server, if the recommender has a link.
        ledger: Records what crosses the cut.
        sharing: This process's part where several train one client together.
    """
    rule = build_rule(config)
    rule.part_of = recommender.module.model.part_of
    whole = WholeClientModel(recommender.module, recommender.base, rule.local_terms, rule.second_model)
    model: ClientModel = whole
    if recommender.link is not None:
        assert transport is not None
        recommender.link.connect(transport, ledger)
        model = CutClientModel(whole, recommender.link, head_layers_of(config, recommender.datamodule))
    fabric, module, datamodule = recommender.fabric, recommender.module, recommender.datamodule
    how = settings(TrainerSettings, config.trainer, "trainer")
    trainer = LocalTrainer(fabric, module, datamodule, model, how, config.seed, sharing, rule.held_out)
    joint = JointTrainer(trainer) if how.clients_per_step > 1 else None
    return SerialExecutor(trainer, Evaluator(fabric, module, datamodule, model, recommender.kept), joint)


def build_server(config: DictConfig, part: ServerPart, num_rows: int, fabric: Fabric) -> BodyServer:
    """The body server of a run."""
    trainer, split = config.trainer, config.split
    server = ServerSettings(
        seed=config.seed,
        optimizer=OptimizerSettings(trainer.learning_rate, trainer.weight_decay),
        hidden_dtype=split.hidden_dtype,
        gradient_dtype=split.gradient_dtype,
        num_rows=num_rows,
    )
    rule = build_rule(config)
    rule.part_of = part.model.part_of
    return BodyServer(part.model, part.trainable, server, fabric.autocast, part.base, rule.local_terms)


def build_poison(config: DictConfig, num_clients: int) -> Poison | None:
    """The clients that misbehave in what they send; ``None`` if there are none.

    Raises:
        ConfigError: If one of them does not exist, or all misbehave.
    """
    given = settings(PoisonSettings, config.poison, "poison")
    refuse(*problems(given, num_clients))
    return Poison(given) if given.clients else None


def _at_server(config: DictConfig, recommender: Recommender) -> Callable[[int, str], bool]:
    """Whether the server trains a parameter for a row of the population."""
    model, depths = recommender.module.model, head_layers_of(config, recommender.datamodule)
    if recommender.link is None:
        return lambda row, name: False
    return lambda row, name: model.cuts[depths[row % len(depths)]].part_of(name, model.arch) == "body"


def head_layers_of(config: DictConfig, batches: FellrecDataModule) -> list[int]:
    """Layers in the head of each client.

    Raises:
        ConfigError: If ``split.head_layers`` is a list with another number of clients.
    """
    sizes = [batches.num_samples(client) for client in range(batches.data.num_clients)]
    return of_clients(as_dict(config.split)["head_layers"], sizes, "split.head_layers")


def _layers(recommender: Recommender) -> list[LoraLayer]:
    """The layers that LoRA adapts, of both sides of a cut that are in this process."""
    models = [recommender.module.model.model, *([recommender.server.model.model] if recommender.server else [])]
    found = {layer.a: layer for model in models for layer in starmap(LoraLayer, lora_layers(model))}
    return list(found.values())  # layers of the deepest head may be on both sides


def ranks_of(adapter: Any, batches: FellrecDataModule, changes: bool = False) -> Ranks | None:
    """The LoRA ranks of the clients, if they differ or can change.

    Args:
        adapter: Of the run.
        batches: Training samples by client, for ranks by size.
        changes: Whether the rule changes them.
    """
    rank = getattr(adapter, "rank", None)
    if rank is None or (isinstance(rank, int) and not changes):
        return None
    return Ranks.of_setting(rank, [batches.num_samples(client) for client in range(batches.data.num_clients)])


def _participation(
    config: DictConfig, rule: AggregationCallback, population: Population, trainer: LocalTrainer
) -> Participation:
    """Who trains when; a run in which a round would have too few clients is refused."""
    how = settings(ParticipationSettings, own_settings(as_dict(config.participation), "participation"), "participation")
    rows = [population.rows_of(participant) for participant in range(population.num_participants)]
    num_steps = [sum(trainer.num_steps(population.data_of(row)) for row in own) for own in rows]
    if population.data_of(0) is None:
        return AllAtOnce(how, config.seed, num_steps)
    sizes = [trainer.datamodule.num_samples(population.data_of(own[0]), trainer.held_out) for own in rows]
    clients, sampler = Clients(how, config.seed, sizes, num_steps), build_sampler(config)
    participation = (
        Participation(how, config.seed, clients, sampler)
        if (buffer_size := rule.buffer_of(cohort_size(clients.num, how.rate))) is None
        else Arrivals(how, config.seed, clients, sampler, buffer_size)
    )
    participation.check(config.trainer.num_rounds, rule.limits.least_clients)
    return participation
