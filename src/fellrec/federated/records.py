"""The records of a round: jobs and their outcomes, what a rule sees, and, here, what it returns and what callbacks get.

All are frozen. Tensors of single clients are referred to by their stored version, so a "before" costs nothing.
Shape letters: N clients of the cohort, U users, C clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fellrec.federated.jobs import (
    NOTHING,
    SCALARS,
    Cohort,
    Failed,
    Job,
    LossJob,
    ScoreJob,
    Trained,
    not_finite,
    of_jobs,
)
from fellrec.federated.updates import LoraLayer, SumsOnly, Updates
from fellrec.functional.stacks import AdapterStack
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Evaluation

__all__ = [
    "Aggregated",
    "Cohort",
    "Failed",
    "FitResult",
    "FitStart",
    "Job",
    "LoraLayer",
    "LossJob",
    "NOTHING",
    "Received",
    "RoundRecord",
    "SCALARS",
    "ScoreJob",
    "SumsOnly",
    "Trained",
    "Updates",
    "not_finite",
    "of_jobs",
]


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
