"""What robust rules have in common: how many clients they need, and the steps before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.errors import TrainingError
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional import robust
from fellrec.functional.mixing import gram_matrix
from fellrec.functional.rng import derive_seed
from fellrec.functional.stacks import Combinations, Differences, LazyStack


@dataclass(frozen=True)
class Rows:
    """What a robust rule works with instead of the clients' updates: R mixtures of them.

    Attributes:
        matrix: ``[R, N]`` float64; row r is what mixture r takes of each client's update.
        gram: ``[R, R]`` float64, inner products of the mixtures.
    """

    matrix: Tensor
    gram: Tensor


class RobustRule(AggregationCallback):
    """Base of rules that withstand f clients whose updates are arbitrary.

    A rule defines `row_weights`, or overrides `aggregate`. Clients are taken in ascending order, so that ties do not
    depend on the order in which they finish.

    Attributes:
        times: The rule needs at least ``times * f + more`` updates.
        more: See ``times``.
    """

    times: ClassVar[int] = 2
    more: ClassVar[int] = 1
    byzantine: int
    before: Sequence[str]
    bucket_size: int
    bucket_seed: int

    def __post_init__(self) -> None:
        """Find the smallest cohort that the settings allow."""
        super().__post_init__()  # type: ignore[misc]
        least = self.least_rows()
        if "bucketing" in self.before:
            least = self.bucket_size * (least - 1) + 1
            groups = "groups of bucketing are drawn by the numbers of clients"
            self.waived_laws = {**self.waived_laws, "permutation": groups}
        self.limits = replace(self.limits, least_clients=least, least_because=self._sizes())

    def least_rows(self) -> int:
        """Updates, or means of groups of them, that the rule needs."""
        return self.times * self.byzantine + self.more

    def row_weights(self, gram: Tensor) -> Tensor:
        """What the mixtures of updates are multiplied by; the shared model moves by their weighted sum.

        Args:
            gram: ``[R, R]`` inner products of the mixtures.

        Returns:
            ``[R]`` float64.
        """
        raise NotImplementedError

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """The weights of the mixtures, as weights ``[N]`` of the clients' updates."""
        rows = self.rows(updates, round_index)
        return self.row_weights(rows.gram) @ rows.matrix

    def rows(self, updates: Updates, round_index: int) -> Rows:
        """The mixtures that the steps in ``before`` make of the clients' updates.

        Raises:
            TrainingError: If fewer clients finished the round than the rule needs.
        """
        clients = updates.clients
        if len(clients) < self.limits.least_clients:
            raise TrainingError(
                f"aggregation {self.name} with {self.limits.least_because} needs at least {self.limits.least_clients} "
                f"clients in a round, {len(clients)} finished round {round_index}: {list(clients)}"
            )
        gram = gram_matrix(updates.end, updates.start)
        order = sorted(range(len(clients)), key=lambda row: clients[row])
        matrix = torch.eye(len(clients), dtype=torch.float64)[order]
        keys = [derive_seed(self.bucket_seed, "buckets", round_index, clients[row]) for row in order]
        for step in self.before:
            matrix = self._step(step, matrix @ gram @ matrix.T, keys) @ matrix
        return Rows(matrix, matrix @ gram @ matrix.T)

    def _step(self, step: str, gram: Tensor, keys: Sequence[int]) -> Tensor:
        if step == "bucketing":
            return robust.bucket_means(keys, self.bucket_size)
        return (robust.nearest_mixing if step == "nnm" else robust.adaptive_clipping)(gram, self.byzantine)

    def _sizes(self) -> str:
        steps = f", before={list(self.before)}, bucket_size={self.bucket_size}" if self.before else ""
        return f"byzantine={self.byzantine}{steps}"

    def move_entrywise(self, updates: Updates, matrix: Tensor, statistic: Callable[[Tensor], Tensor]) -> Aggregated:
        """Move the shared model by a statistic of the entries of mixtures of updates.

        Args:
            updates: All updates of the round.
            matrix: ``[R, N]``, the mixtures.
            statistic: ``[R, P]`` float64 → ``[P]``.
        """
        return self.moved_by(
            updates, _Entrywise(Combinations(matrix, Differences(updates.end, updates.start)), statistic)
        )


class _Entrywise(LazyStack):
    """One row: a statistic of each column of a stack."""

    def __init__(self, rows: LazyStack, statistic: Callable[[Tensor], Tensor]) -> None:
        super().__init__(rows.shapes, 1)
        self._rows, self._statistic = rows, statistic

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``; ``[1, columns]``."""
        return self._statistic(self._rows.block(name, columns))[None]
