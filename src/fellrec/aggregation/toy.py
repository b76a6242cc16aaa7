"""A federation without a language model and without data, in which aggregation rules are checked in milliseconds.

Population, exchange, local slot and loop are those of real runs. A client's loss is ``1/2 ‖v − t‖²`` with a target t of
its own, which it minimises by a few steps of SGD.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fellrec.aggregation.base import AggregationCallback
from fellrec.federated.arrivals import Arrivals
from fellrec.federated.callback import Events
from fellrec.federated.exchange import Exchange
from fellrec.federated.ledger import Ledger
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.participation import AllAtOnce, Clients, Participation
from fellrec.federated.population import Population
from fellrec.federated.progress import Progress
from fellrec.federated.ranks import Ranks
from fellrec.federated.records import Aggregated, Cohort, Failed, Job, LoraLayer, LossJob, ScoreJob, Trained, Updates
from fellrec.federated.selection import Selection
from fellrec.federated.settings import ParticipationSettings, TrainerSettings
from fellrec.federated.slot import LocalSlot, second_slot
from fellrec.federated.slot_state import SlotState, new_parameters
from fellrec.functional.cores import CORES, SCALES, joined
from fellrec.functional.names import OWN, REST
from fellrec.functional.rng import derive_seed
from fellrec.metrics.summary import summarise
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Adapter, Evaluation

RANK, RATE, MOMENTUM = 2, 0.1, 0.5
"""Rank of the factors; learning rate and momentum of the clients' SGD."""
LAYERS = tuple(
    LoraLayer(f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight", f"{name}.base_layer.weight", scale, t)
    for name, scale, t in (("layers.0.q", 0.5, False), ("layers.1.v", 3.0, True))
)
"""Two layers that LoRA adapts; the weight of the second one is stored as ``[in, out]``."""
_SIZES = {"layers.0.q": (3, 4), "layers.1.v": (5, 3)}
"""Out, in."""
CORE_SHAPES = {f"layers.2.o.{CORES}": (2, 3, 3), f"layers.2.o.{SCALES}": (2,)}
"""Parameters of two heads between frozen factors and their shapes."""
MIXED_SHAPES = {f"layers.2.k.{which}{factor}": (2, 2) for which in (OWN, REST) for factor in "ab"}
"""Factors of a client's own and of the others, and their shapes."""
PLAIN = {"norm.weight": (4,), "score.weight": (2, 3)}
"""Parameters without factors and their shapes."""


def shapes(with_lora: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of the toy adapter's parameters, by name."""
    found: dict[str, tuple[int, ...]] = dict(PLAIN)
    for layer in LAYERS if with_lora else ():
        out, into = _SIZES[layer.a.partition(".lora_A")[0]]
        found |= {layer.a: (RANK, into), layer.b: (out, RANK), **CORE_SHAPES, **MIXED_SHAPES}
    return {name: found[name] for name in sorted(found)}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: the score is the tail."""
    return "tail" if name.startswith("score") else "body"


def random_adapter(label: str, seed: int, with_lora: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    """Normally distributed values that depend on label and seed only, float32."""
    random = np.random.default_rng(derive_seed(seed, "toy", label))
    return {
        name: torch.from_numpy(scale * random.standard_normal(shape)).float()
        for name, shape in shapes(with_lora).items()
    }


@dataclass(frozen=True)
class ToyClient:
    """What a client trains on.

    Attributes:
        target: What its parameters move to, by name.
        num_samples: Training targets.
        num_steps: Steps of a round.
        loss: Reported instead of the loss that was measured; also at the received adapter.
    """

    target: Mapping[str, Tensor]
    num_samples: int = 10
    num_steps: int = 2
    loss: float | None = None


def random_clients(num_clients: int, seed: int, with_lora: bool = True) -> list[ToyClient]:
    """Clients with targets, numbers of samples and of steps of their own."""
    return list(_random_clients(num_clients, seed, with_lora))


@cache
def _random_clients(num_clients: int, seed: int, with_lora: bool) -> Sequence[ToyClient]:
    """The same clients, made once: nothing changes them."""
    random = np.random.default_rng(derive_seed(seed, "toy", "clients"))
    return tuple(
        ToyClient(
            random_adapter(f"target {client}", seed, with_lora),
            num_samples=int(random.integers(1, 100)),
            num_steps=int(random.integers(1, 4)),
        )
        for client in range(num_clients)
    )


PUBLIC_USERS = ToyClient(random_adapter("public users", 0))
"""What the server trains on, where a rule needs it."""


def train(job: Job, client: ToyClient, rule: AggregationCallback) -> Trained:
    """A client's local training, with the rule's local terms."""
    begin = SlotState.of(job)
    parameters = new_parameters({name: nn.Parameter(value) for name, value in begin.adapter.items()}, begin)
    optimizer = _optimizer(parameters) if any(value.requires_grad for value in parameters.values()) else None
    second = second_slot(rule.second_model, begin, parameters, _optimizer, lambda _: nullcontext())
    slot = LocalSlot(parameters, begin, optimizer, rule.local_terms, second)
    losses = []
    for _ in range(client.num_steps):
        if second is not None:
            with second.at_point():
                _step(second, client)
        losses.append(_step(slot, client))
    found, measured = slot.state(), sum(losses) / len(losses)
    start_loss = (losses[0] if client.loss is None else client.loss) if job.needs_start_loss else None
    return Trained(
        job=job,
        adapter=StoredTensors(found.adapter),
        optimizer=StoredTensors(found.optimizer),
        loss=measured if client.loss is None else client.loss,
        num_samples=client.num_samples,
        num_steps=client.num_steps,
        seconds=0.0,
        start_loss=start_loss,
        tensors=StoredTensors(found.tensors),
    )


def _optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    trained = [value for value in parameters.values() if value.requires_grad]
    return torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM, foreach=False)


def _step(slot: LocalSlot, client: ToyClient) -> float:
    """One optimiser step; gives the loss before it."""
    differences = _differences(slot.parameters, client.target)
    loss = _half_squared(differences)
    slot.before_backward(False, RATE)
    for name, parameter in slot.parameters.items():
        if parameter.requires_grad:  # the gradient in closed form: autograd would take half of the time
            parameter.grad = differences[name].to(parameter.dtype)
    slot.step(1.0, RATE)
    return loss


def _distance(parameters: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> float:
    return _half_squared(_differences(parameters, target))


def _differences(parameters: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float() - target[name].float() for name, value in parameters.items()}


def _half_squared(differences: Mapping[str, Tensor]) -> float:
    return float(torch.stack([difference.square().sum() / 2 for difference in differences.values()]).sum())


@dataclass(frozen=True)
class ToyRound:
    """A round.

    Attributes:
        updates: What the rule saw.
        aggregated: What it returned.
    """

    updates: Updates
    aggregated: Aggregated


@dataclass
class ToyFederation:
    """A rule, its population, and clients.

    Attributes:
        rule: The rule, which belongs to this federation alone.
        clients: C of them.
        initial: Adapter that all clients start from.
        ranks: LoRA ranks of the clients, if they differ.
    """

    rule: AggregationCallback
    clients: Sequence[ToyClient]
    initial: Mapping[str, Tensor] = field(default_factory=lambda: random_adapter("initial", 0))
    ranks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Begin, and make population and exchange."""
        self.sent: Adapter = {}
        self.root: Trained | None = None
        self.loop = toy_loop(self.rule, self.clients, self.initial, of_client=self.ranks)
        self.population, self.exchange = self.loop.population, self.loop.exchange

    def trained(self, round_index: int, cohort: Collection[int] | None = None) -> list[Trained]:
        """Let the cohort train, all clients by default; gives the results of the rows that are exchanged."""
        participants = sorted(range(self.population.num_participants) if cohort is None else cohort)
        rows = sorted(row for participant in participants for row in self.population.rows_of(participant))
        self.sent = self.population.model()
        drawn = Cohort(round_index, tuple(rows), (round_index,) * len(rows), len(participants), oldest=round_index)
        found, self.root = self.loop.without_root(self.loop.train(self.loop.jobs(drawn)))
        return [result for result in found if isinstance(result, Trained) and self.population.is_exchanged(result.row)]

    def updates(
        self, round_index: int, cohort: Collection[int] | None = None, order: Sequence[int] | None = None
    ) -> Updates:
        """What the rule sees of a round; ``order`` are places of the cohort."""
        trained = self.trained(round_index, cohort)
        return self.up(trained if order is None else [trained[place] for place in order])

    def up(self, trained: Sequence[Trained]) -> Updates:
        """What the rule sees of results of `trained`."""
        return self.exchange.up(trained, self.sent, self.root)

    def finish(self, updates: Updates, round_index: int) -> Aggregated:
        """Aggregate, and let the clients have the result."""
        aggregated = self.rule.aggregate(updates, round_index)
        self.population.receive(self.exchange.down(updates, aggregated))
        return aggregated

    def round(self, round_index: int, cohort: Collection[int] | None = None) -> ToyRound:
        """One round of the cohort, of all clients by default."""
        updates = self.updates(round_index, cohort)
        return ToyRound(updates, self.finish(updates, round_index))

    def adapter(self, row: int) -> Adapter:
        """A row's adapter, by parameter."""
        return self.population.bank.versions[row].tensors()

    def model(self, row: int) -> dict[str, Tensor]:
        """What a row's model computes with: plain parameters, and the change of each weight ``[out, in]``, float64.

        The change is that of the adapter, ``scale * B @ A``, and of the frozen base together; between frozen factors it
        is the matrix of the heads.
        """
        adapter, base = self.adapter(row), self.population.base
        found = {n: value.double() for n, value in adapter.items() if "lora_" not in n or n in MIXED_SHAPES}
        for name in [name for name in adapter if name in CORE_SHAPES and name.endswith(CORES)]:
            found[name] = joined(adapter[name].double(), adapter[f"{name.removesuffix(CORES)}{SCALES}"].double())
        for layer in self.exchange.layers:
            weight = layer.scale * adapter[layer.b].double() @ adapter[layer.a].double()
            for change in base:
                found_of = change.tensors()
                if f"{layer.weight}|left" in found_of:
                    added = found_of[f"{layer.weight}|left"].double() @ found_of[f"{layer.weight}|right"].double()
                    weight = weight + (added.T if layer.is_transposed else added)
            found[layer.weight] = weight
        return found


class ToyExecutor:
    """Trains and evaluates the clients of a toy federation; a client's metric is ``1 / (1 + distance to the target)``.

    Args:
        rule: Has the local terms.
        clients: All of them.
    """

    def __init__(self, rule: AggregationCallback, clients: Sequence[ToyClient]) -> None:
        self.rule, self.clients = rule, clients

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        """See ``Executor``."""
        for job in jobs:
            events.client_starts(job)
            yield train(job, PUBLIC_USERS if job.is_at_server else self.clients[job.client], self.rule)

    def measure(self, jobs: Sequence[LossJob]) -> list[tuple[float, ...]]:
        """See ``Executor``."""
        return [
            tuple(
                _distance(adapter.tensors(), self.clients[job.client].target)
                if self.clients[job.client].loss is None
                else float(self.clients[job.client].loss or 0)
                for adapter in job.adapters
            )
            for job in jobs
        ]

    def score(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> Evaluation:
        """See ``Executor``."""
        found = {
            client: 1 / (1 + _distance(job.adapter.tensors(), self.clients[client].target))
            for job in jobs
            for client in job.clients
        }
        values = torch.tensor([found[client] for client in sorted(found)], dtype=torch.float64)
        return summarise({"ndcg_at_10": values}, torch.arange(len(values)), len(values), stage, round_index)

    def close(self) -> None:
        """Nothing to close."""


def toy_loop(
    rule: AggregationCallback,
    clients: Sequence[ToyClient],
    initial: Mapping[str, Tensor],
    num_rounds: int = 1,
    rate: float = 1.0,
    of_client: Sequence[int] | None = None,
) -> FederatedLoop:
    """The loop of a real run over toy clients, which may have ranks ``of_client``."""
    rule.part_of = part_of
    rule.begin(initial)
    if of_client is None and rule.changes_ranks:
        of_client = [RANK] * len(clients)
    ranks = None if of_client is None else Ranks(of_client, len(clients))
    population = rule.new_population(initial, len(clients), ranks=ranks)
    settings = TrainerSettings(num_rounds=num_rounds)
    layers = [layer for layer in LAYERS if layer.a in initial]
    return FederatedLoop(
        population=population,
        participation=_participation(rule, population, clients, rate),
        executor=ToyExecutor(rule, clients),
        exchange=Exchange(rule, Ledger(), layers=layers, num_clients=len(clients), ranks=ranks),
        rule=rule,
        selection=Selection(population, settings.metric),
        progress=Progress(),
        events=Events([rule]),
        settings=settings,
    )


def _participation(
    rule: AggregationCallback, population: Population, clients: Sequence[ToyClient], rate: float
) -> Participation:
    """Who trains when, as in a real run with this rule."""
    how, num_steps = ParticipationSettings(rate=rate), [client.num_steps for client in clients]
    if population.data_of(0) is None:
        return AllAtOnce(how, 0, num_steps[:1])
    known = Clients(how, 0, [client.num_samples for client in clients], num_steps)
    plain = Participation(how, 0, known)
    buffer_size = rule.buffer_of(plain.num_needed)
    return plain if buffer_size is None else Arrivals(how, 0, known, None, buffer_size)


def parts_of(loop: FederatedLoop) -> dict[str, Any]:
    """What a checkpoint of a loop holds, as in a real run."""
    return {
        "progress": loop.progress,
        "population": loop.population,
        "participation": loop.participation,
        "selection": loop.selection,
        "rule": loop.rule,
        "exchange": loop.exchange,
        "ledger": loop.exchange.ledger,
    }


def with_loss(clients: Sequence[ToyClient], loss: float) -> list[ToyClient]:
    """The same clients, which all report one loss."""
    return [replace(client, loss=loss) for client in clients]


def with_ranks(clients: Sequence[ToyClient], ranks: Sequence[int]) -> list[ToyClient]:
    """The same clients with targets of these ranks: what is beyond them has no gradient, as in a real adapter."""
    parts = Ranks(ranks, len(clients))
    return [
        replace(client, target={name: parts.cut(row, name, value) for name, value in client.target.items()})
        for row, client in enumerate(clients)
    ]
