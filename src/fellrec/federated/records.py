"""The records of a round: what is asked of a client, what comes back, what a rule sees and returns.

All are frozen. Tensors of single clients are referred to by their stored version, so a "before" costs nothing.
Shape letters: N clients of the cohort, U users, C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.functional.stacks import AdapterStack, LazyStack, as_lazy, first_row
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import PUBLIC, Adapter, Evaluation

NOTHING = StoredTensors({})
"""No tensors: the optimiser state before the first step, or a client without tensors of its own."""


@dataclass(frozen=True)
class Cohort:
    """Who trains in a round, and when on the simulated clock.

    Attributes:
        round_index: From 0.
        rows: Rows of the population that train, ascending.
        start_rounds: For each, the round whose model it received: this one, or an earlier one if the rule is
            asynchronous.
        num_needed: Clients of whom a quorum must finish.
        begun: Simulated seconds from the start of the run to that of the round.
        seconds: Simulated seconds from the start of the run to the end of the round.
        dropped: Clients that were drawn and dropped out.
        late: Clients that were drawn, and would have finished after the cohort was complete.
        oldest: The oldest round whose model a client may still be training from when this round is over.
        measured: Clients that measured their loss, to be chosen by it.
    """

    round_index: int
    rows: tuple[int, ...]
    start_rounds: tuple[int, ...]
    num_needed: int
    begun: float = 0.0
    seconds: float = 0.0
    dropped: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    oldest: int = 0
    measured: tuple[int, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Figures worth logging, by MLflow-safe names."""
        staleness = [self.round_index - start for start in self.start_rounds]
        return {
            "participation/simulated_seconds": self.seconds,
            "participation/num_models": float(len(self.rows)),
            "participation/num_dropped": float(len(self.dropped)),
            "participation/num_late": float(len(self.late)),
            "participation/staleness_mean": sum(staleness) / max(1, len(staleness)),
            "participation/staleness_max": float(max(staleness, default=0)),
        }


@dataclass(frozen=True)
class Job:
    """The local training of one row of the population in one round.

    Attributes:
        row: Row of the population.
        data_of: Client whose data are used; ``None`` for the pooled data of all clients, `PUBLIC` for those of the
            public users, on which the server trains.
        round_index: From 0.
        first_step: Optimiser steps of this row in earlier rounds.
        adapter: Adapter that training starts from.
        optimizer: Optimiser state, tensors by ``parameter|key``.
        anchors: Other adapters that a local term needs, by name.
        tensors: Tensors of the client by ``name|parameter``, such as control variates.
        trains: Names of the parameters that are trained; ``None`` for all.
        needs_start_loss: Whether the mean training loss at ``adapter`` is measured before the first step.
        base: Changes of the frozen base that must be applied, the oldest first; see ``BaseChange``.
    """

    row: int
    data_of: int | None
    round_index: int
    first_step: int
    adapter: StoredTensors
    optimizer: StoredTensors = NOTHING
    anchors: Mapping[str, StoredTensors] = field(default_factory=dict)
    tensors: StoredTensors = NOTHING
    trains: tuple[str, ...] | None = None
    needs_start_loss: bool = False
    base: tuple[StoredTensors, ...] = ()

    @property
    def client(self) -> int:
        """The client that trains; 0 for the pooled data, `PUBLIC` for the server."""
        return self.data_of or 0

    @property
    def is_at_server(self) -> bool:
        """Whether the server trains, and no client does."""
        return self.data_of == PUBLIC

    @property
    def who(self) -> str:
        """Who trains, for messages."""
        return "the server" if self.is_at_server else f"client {self.client}"


@dataclass(frozen=True)
class Trained:
    """A finished local training.

    Attributes:
        job: What was asked for; its ``round_index`` is the round that training started from.
        adapter: Adapter after training.
        optimizer: Optimiser state after training, as in ``Job``.
        loss: Mean loss over all targets of the local steps, METHOD (2).
        num_samples: Training targets of the client.
        num_steps: Optimiser steps.
        seconds: Wall seconds.
        start_loss: Mean training loss at the received adapter; ``None`` if it was not asked for.
        tensors: Tensors of the client after training, as in ``Job``.
        peak_bytes: Largest memory so far of the process that trained the client.
        traffic: Rows of the ledger with what crossed a cut in this training.
    """

    job: Job
    adapter: StoredTensors
    optimizer: StoredTensors
    loss: float
    num_samples: int
    num_steps: int
    seconds: float
    start_loss: float | None = None
    tensors: StoredTensors = NOTHING
    peak_bytes: int = 0
    traffic: Sequence[Sequence[Any]] = ()

    @property
    def row(self) -> int:
        """Row of the population."""
        return self.job.row

    @property
    def scalars(self) -> dict[str, Any]:
        """Everything that is neither the job nor a tensor, by the names of the constructor."""
        return {name: getattr(self, name) for name in SCALARS}


SCALARS = ("loss", "num_samples", "num_steps", "seconds", "start_loss", "peak_bytes", "traffic")
"""Fields of `Trained` that are neither the job nor a tensor."""


@dataclass(frozen=True)
class Failed:
    """A local training that did not finish: an exception, a loss that is not finite, or a lost process.

    Attributes:
        job: What was asked for.
        reason: One sentence for the user.
    """

    job: Job
    reason: str

    @property
    def row(self) -> int:
        """Row of the population."""
        return self.job.row


@dataclass(frozen=True)
class LossJob:
    """Adapters whose mean loss one client measures before a round, without training.

    Attributes:
        row: Row of the population.
        data_of: As in ``Job``.
        round_index: From 0.
        adapters: What is measured, in this order.
        own: The client's own adapter, which need not be sent if it is one of them.
        base: As in ``Job``.
    """

    row: int
    data_of: int | None
    round_index: int
    adapters: tuple[StoredTensors, ...]
    own: StoredTensors | None = None
    base: tuple[StoredTensors, ...] = ()

    @property
    def sent(self) -> list[StoredTensors]:
        """Adapters that the client does not have."""
        return [adapter for adapter in self.adapters if adapter is not self.own]

    @property
    def client(self) -> int:
        """The client that measures; 0 for the pooled data."""
        return self.data_of or 0

    def training(self, adapter: StoredTensors) -> Job:
        """The job of a training with one of the adapters in which nothing is trained."""
        return Job(self.row, self.data_of, self.round_index, 0, adapter, trains=(), base=self.base)


@dataclass(frozen=True)
class ScoreJob:
    """The users of some clients, to be ranked with one adapter.

    Attributes:
        row: Row of the population that the adapter belongs to.
        adapter: The adapter.
        clients: Clients whose users are ranked.
        base: As in ``Job``.
    """

    row: int
    adapter: StoredTensors
    clients: tuple[int, ...]
    base: tuple[StoredTensors, ...] = ()


@dataclass(frozen=True)
class LoraLayer:
    """A layer that LoRA adapts: ``scale * B @ A`` is added to its weight ``[out, in]``.

    Attributes:
        a: Name of the parameter A, ``[rank, in]``.
        b: Name of the parameter B, ``[out, rank]``.
        weight: Name of the frozen weight.
        scale: α / rank.
        is_transposed: Whether the frozen weight is stored as ``[in, out]``, as in GPT-2's Conv1D.
    """

    a: str
    b: str
    weight: str
    scale: float
    is_transposed: bool = False

    def base_change(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """``left @ right`` ``[out, in]`` as an entry of ``Aggregated.base``; see there.

        Args:
            left: ``[out, R]``; the scale is not applied here.
            right: ``[R, in]``.

        Example:
            >>> layer = LoraLayer("a", "b", "w", 2.0, is_transposed=True)
            >>> {name: list(t.shape) for name, t in layer.base_change(torch.ones(3, 1), torch.ones(1, 2)).items()}
            {'w|left': [2, 1], 'w|right': [1, 3]}
        """
        if self.is_transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        return {f"{self.weight}|left": left, f"{self.weight}|right": right}


@dataclass(frozen=True)
class Updates:
    """What an aggregation rule sees of a round; row ``n`` of everything belongs to ``clients[n]``.

    Attributes:
        clients: Rows of the population, ascending, N of them.
        start: Adapters that the clients received, name → ``[N, *shape]``; only parameters that are exchanged.
        end: Adapters after local training, as in ``start``.
        losses: ``[N]`` float64, the local losses of METHOD (2).
        num_samples: ``[N]`` float64, training targets per client.
        start_losses: ``[N]`` float64, losses at the received adapters; ``None`` unless the rule asks for them.
        start_rounds: Round in which each client received its adapter.
        tensors: Tensors of the clients that the rule reads (``client_tensors``), by name: name → parameter →
            ``[N, *shape]``.
        start_tensors: The same before local training; zeros for clients that had none.
        num_steps: ``[N]`` float64, optimiser steps that clients took in this round.
        num_clients: C, clients of the population; 0 if it is not known.
        layers: Layers that LoRA adapts; none with ``adapter=full``.
        model: The server's model now, which the clients received, or with an asynchronous rule earlier versions of it;
            also parameters that are not trained in this round, and of all ranks; name → ``[*shape]``. Empty where
            clients have models of their own.
        ranks: ``[N]`` integers, LoRA ranks of the clients, beyond which their factors are 0; ``None`` if all have the
            same.
        root: What the server made of its model on the public users, by the same local training; name → ``[*shape]``.
            Empty unless the population is `SharedAndRoot`.
    """

    clients: tuple[int, ...]
    start: AdapterStack
    end: AdapterStack
    losses: Tensor
    num_samples: Tensor
    start_losses: Tensor | None = None
    start_rounds: tuple[int, ...] = ()
    tensors: Mapping[str, AdapterStack] = field(default_factory=dict)
    start_tensors: Mapping[str, AdapterStack] = field(default_factory=dict)
    num_steps: Tensor | None = None
    num_clients: int = 0
    layers: tuple[LoraLayer, ...] = ()
    model: Adapter = field(default_factory=dict)
    ranks: Tensor | None = None
    root: Adapter = field(default_factory=dict)

    def staleness(self, round_index: int) -> Tensor:
        """``[N]`` int64, rounds since each client received its start; 0 for all where that is not known."""
        starts = self.start_rounds or (round_index,) * len(self.clients)
        return round_index - torch.tensor(starts)

    def check_finite(self, round_index: int) -> None:
        """Refuse adapters, and tensors of clients, with infinite or undefined entries.

        Raises:
            TrainingError: Naming the parameter, the client and the round.
        """
        for stack in (self.end, *self.tensors.values()):
            _check_finite(as_lazy(stack), self.clients, round_index)

    def weighted_sums(self, weights: Tensor) -> dict[str, Tensor]:
        """``sum over n of weights[n] * end[n]`` for each parameter: all that a rule may read that sees sums only.

        Args:
            weights: ``[N]`` floats.

        Returns:
            Name → tensor of the parameter's own shape and type, computed in float64.
        """
        end, wide = _visible(self.end), weights.double()
        return {name: _joined(end, name, lambda _, block: wide @ block.double()) for name in end}

    def moved(self, weights: Tensor, model: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """``model + sum over n of weights[n] * (end[n] - start[n])``.

        Args:
            weights: ``[N]`` floats, with any sum.
            model: What is moved; ``None`` for the clients' common start.

        Returns:
            As `weighted_sums`.
        """
        start, end, wide = _visible(self.start), _visible(self.end), weights.double()

        def block_of(name: str, columns: slice, block: Tensor) -> Tensor:
            """Some columns of the result, float64."""
            origin = start.block(name, columns).double()
            return _model_block(model, start, name, columns) + wide @ (block.double() - origin)

        return {name: _joined(end, name, partial(block_of, name)) for name in end}

    def mixed(self, weights: Tensor, model: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """``(1 - sum of weights) * model + sum over n of weights[n] * end[n]``.

        Args:
            weights: ``[N]`` floats.
            model: As for `moved`.

        Returns:
            As `weighted_sums`.
        """
        start, end, wide = _visible(self.start), _visible(self.end), weights.double()

        def block_of(name: str, columns: slice, block: Tensor) -> Tensor:
            """Some columns of the result, float64."""
            before = _model_block(model, start, name, columns)
            return before + wide @ (block.double() - before)

        return {name: _joined(end, name, partial(block_of, name)) for name in end}

    def mean_update(self, rule: str, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The common start, and the weighted sum of updates, for a rule with one model.

        Args:
            rule: Name of the rule.
            weights: ``[N]`` floats, which sum to 1 for a mean.

        Returns:
            Two mappings name → tensor of the parameter's shape, both float64.

        Raises:
            TrainingError: See `check_common_start`.
        """
        self.check_common_start(rule)
        start, end, wide = _visible(self.start), _visible(self.end), weights.double()
        first = {name: start[name][0].double() for name in end}
        mean = {name: torch.zeros(start.shapes[name], dtype=torch.float64) for name in end}
        for name in end:
            flat = mean[name].view(-1)
            for columns, block in end.blocks(name):
                flat[columns] = wide @ (block.double() - start.block(name, columns).double()).cpu()
        return first, mean

    def like_adapters(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One adapter's tensors in the types of the clients' own."""
        end = _visible(self.end)
        like = {name: end.block(name, slice(0, 1)) if name in end.shapes else self.model[name] for name in adapter}
        return {name: tensor.to(like[name].dtype) for name, tensor in adapter.items()}

    def check_common_start(self, rule: str) -> None:
        """Refuse clients that started the round with different adapters.

        Args:
            rule: Name of the rule that assumes one common start.

        Raises:
            TrainingError: Naming the rule, a parameter and the clients.
        """
        try:
            first_row(_visible(self.start))
        except ValueError as error:
            raise TrainingError(
                f"aggregation {rule} needs clients that start a round with the same adapter, but {error} differs "
                f"between clients {list(self.clients)}"
            ) from None


def _check_finite(stack: LazyStack, clients: Sequence[int], round_index: int) -> None:
    for name in stack:
        finite = torch.ones(stack.num_rows, dtype=torch.bool)
        for _, block in stack.blocks(name):
            finite &= block.isfinite().all(dim=1).cpu()
        if not bool(finite.all()):
            client = clients[int(finite.logical_not().nonzero()[0])]
            raise TrainingError(not_finite(name, f"client {client}", round_index))


def _visible(stack: AdapterStack) -> LazyStack:
    """A stack for sums, which may be hidden from the rule."""
    return stack.hidden if isinstance(stack, SumsOnly) else as_lazy(stack)


def _model_block(model: Mapping[str, Tensor] | None, start: LazyStack, name: str, columns: slice) -> Tensor:
    """Entries of a model, or of the first start, float64."""
    block = start.block(name, columns)
    found = block[0] if model is None else model[name].reshape(-1)[columns]
    return found.to(block.device).double()


def _joined(stack: LazyStack, name: str, row_of: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """One tensor of a parameter's shape and type, from a row of values for each block of columns."""
    rows = [row_of(columns, block).to(block.dtype) for columns, block in stack.blocks(name)]
    return torch.cat(rows).reshape(stack.shapes[name]) if rows else torch.empty(stack.shapes[name])


class SumsOnly(Mapping[str, Tensor]):
    """Adapters of which only weighted sums may be read, see ``Updates.weighted_sums``.

    Args:
        stack: The adapters.
        rule: Name of the rule, for the error message.
    """

    def __init__(self, stack: AdapterStack, rule: str) -> None:
        self.hidden = as_lazy(stack)
        self.rule = rule

    def __getitem__(self, name: str) -> Tensor:
        """Refuse.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError(
            f"aggregation {self.rule} declares sees='sums' and reads single adapters; use updates.weighted_sums"
        )

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.hidden)

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True)
class Aggregated:
    """What an aggregation rule returns.

    Attributes:
        adapters: Next adapters, name → ``[N, *shape]``, rows as in ``Updates.clients``; parameters that are absent stay
            at the client as they were trained. What callbacks get may be read from files on access; copy what is needed
            before the round ends.
        matrices: ``[N, N]`` matrices worth logging (``mixing``, ``similarity``), by name.
        per_client: ``[N]`` vectors worth logging (``learning_speed``, …), by name.
        tensors: Tensors for the clients, as in ``Updates.tensors``; they come with the clients' next jobs.
        base: Change of the frozen base by two factors per weight: ``name|left`` ``[out, R]`` and ``name|right``
            ``[R, in]``, whose product is added to the weight ``name``.
        metrics: Other figures of the round worth logging, by MLflow-safe names.
        resets: Parameters whose optimiser state no longer fits their values (after an SVD, a rotation, or a new
            initialisation): all clients forget it.
        anchors: Adapters of the server that come with the jobs of all clients from now on, absent ones too, as
            ``Job.anchors``: name → parameter → tensor. One of the same name replaces the last one.
        ranks: Rows whose LoRA rank changes → the new one; of rules with ``changes_ranks``.
    """

    adapters: AdapterStack
    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    per_client: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, AdapterStack] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    resets: tuple[str, ...] = ()
    anchors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Received:
    """What comes back to the clients after an aggregation.

    Attributes:
        rows: Rows of the population.
        adapters: As in ``Aggregated``.
        tensors: As in ``Aggregated``.
        base: As in ``Aggregated``.
        resets: As in ``Aggregated``.
        anchors: As in ``Aggregated``.
        ranks: As in ``Aggregated``.
    """

    rows: tuple[int, ...]
    adapters: AdapterStack
    tensors: Mapping[str, AdapterStack] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)
    resets: tuple[str, ...] = ()
    anchors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """A finished round.

    Attributes:
        round_index: From 0.
        trained: One record per row that finished, ascending.
        failed: Those that did not.
        aggregated: Result of the aggregation.
        evaluation: Validation after the aggregation; ``None`` if this round was not evaluated.
        seconds: Wall seconds of training and aggregation.
        costs: Bytes that were exchanged and figures of the processes, under MLflow-safe names.
        is_last: Whether the run ends with this round.
        clients: Rows that were aggregated, as in ``Updates``: those of the matrices and of ``per_client``.
        cohort: Who was drawn, and when on the simulated clock.
    """

    round_index: int
    trained: tuple[Trained, ...]
    aggregated: Aggregated
    evaluation: Evaluation | None
    seconds: float
    costs: Mapping[str, float] = field(default_factory=dict)
    failed: tuple[Failed, ...] = ()
    is_last: bool = False
    clients: tuple[int, ...] = ()
    cohort: Cohort | None = None


@dataclass(frozen=True)
class FitStart:
    """The start of a run, or of its continuation.

    Attributes:
        num_rounds: Rounds of the run.
        round_index: The next round, from 0.
        num_clients: C.
        num_steps: Optimiser steps of the whole run, if no client fails.
        steps_done: Optimiser steps taken in earlier rounds.
    """

    num_rounds: int
    round_index: int
    num_clients: int
    num_steps: int = 0
    steps_done: int = 0


@dataclass(frozen=True)
class FitResult:
    """A finished run.

    Attributes:
        evaluation: Evaluation on the test data of the selected adapters.
        num_rounds: Rounds that were trained.
        best_round: Round that validation selected; -1 is the start.
        best_value: Mean over clients of the selection metric in that round.
        served: The selected adapter of each client, and whether all clients have one and the same row.
        is_shared: See ``served``.
        bases: For each client, the changes of the base that its selected adapter belongs to.
        failed_clients: Round → clients that did not finish it.
    """

    evaluation: Evaluation
    num_rounds: int
    best_round: int
    best_value: float
    served: Sequence[StoredTensors] = ()
    is_shared: bool = False
    bases: Sequence[tuple[StoredTensors, ...]] = ()
    failed_clients: Mapping[str, Sequence[int]] = field(default_factory=dict)


def not_finite(name: str, who: str, round_index: int) -> str:
    """The message for a parameter that local training made infinite or undefined."""
    return f"{name} of {who} is not finite after local training in round {round_index}; lower trainer.learning_rate"
