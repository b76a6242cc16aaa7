"""The frozen records and aliases that travel between packages.

Shape letters used in names and comments: C clients, N clients of a cohort, U users, I items, B rows of a batch,
L tokens, T targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fellrec.functional.first_items import FirstItems

Adapter = Mapping[str, Tensor]
"""One client's adapter: parameter name → tensor of the parameter's own shape."""
PUBLIC = -1
"""Stands for a client where the data are those of public users, which belong to none."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation of all clients on one holdout.

    Attributes:
        stage: ``"val"`` or ``"test"``.
        round_index: Round after which the evaluation ran; -1 is before the first round.
        per_user: Metric name → ``[U_eval]`` float64, one value per evaluated user.
        client_of_user: ``[U_eval]`` int64, the client of each evaluated user.
        per_client: Metric name → ``[C]`` float64, mean over the client's users.
        summary: Flat MLflow-safe names without the stage, such as ``ndcg_at_10/mean``, ``ndcg_at_10/pooled``,
            ``ndcg_at_10/variance``, ``ndcg_at_10/worst``; and what the ranker says of itself, such as
            ``generation/in_catalogue_rate``.
        users: ``[U_eval]`` int64 index of each evaluated user, ascending.
        first_items: Their first items, as far as the largest cutoff; ``None`` where rankings are not kept.
        reported: What the ranker told of each user, name → ``[U_eval]`` float64.
        choice: Which of the ranker's choices these are the metrics of, from 0; see ``ReportingRanker``.
        poisoned: Clients that misbehave, see ``PoisonSettings``; ascending.
    """

    stage: str
    round_index: int
    per_user: Mapping[str, Tensor]
    client_of_user: Tensor
    per_client: Mapping[str, Tensor]
    summary: Mapping[str, float]
    users: Tensor
    first_items: FirstItems | None = None
    reported: Mapping[str, Tensor] = field(default_factory=dict)
    choice: int = 0
    poisoned: tuple[int, ...] = ()
