"""The aggregation callback: turns the updates of one round into the next adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.federated.callback import FederatedCallback
from fellrec.functional.mixing import Mixture
from fellrec.functional.stacks import AdapterStack
from fellrec.types import Aggregated, Updates


class AggregationCallback(FederatedCallback):
    """Base of every aggregation rule; a run has exactly one.

    Most rules implement only `mixing_matrix`. A rule that cannot be written as a matrix overrides `aggregate`. A rule
    with memory overrides `state_dict` and `load_state_dict`. A rule of your own needs one class and the override
    ``aggregation._target_=my_package.MyRule``.

    Attributes:
        pools_clients: If true, the loop trains one client that holds the data of all of them.
        exchanges_adapters: If false, no client's adapter is needed by another, and none leaves its client.

    Example:
        >>> class FirstClient(AggregationCallback):
        ...     def mixing_matrix(self, updates, round_index):
        ...         n = len(updates.clients)
        ...         return torch.eye(n)[torch.zeros(n, dtype=torch.long)]
        >>> FirstClient().name
        'firstclient'
    """

    pools_clients: bool = False
    exchanges_adapters: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a rule that defines neither `mixing_matrix` nor `aggregate`.

        Raises:
            TypeError: See above.
        """
        super().__init_subclass__(**kwargs)
        if cls.mixing_matrix is AggregationCallback.mixing_matrix and cls.aggregate is AggregationCallback.aggregate:
            raise TypeError(f"{cls.__name__}: an aggregation rule defines mixing_matrix or aggregate")

    @property
    def name(self) -> str:
        """The rule's name in tables and messages: the class name in lower case."""
        return type(self).__name__.lower()

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """How much of each sender's adapter each receiver takes.

        Args:
            updates: All updates of the round; not to be changed.
            round_index: From 0.

        Returns:
            ``[N, N]`` floats, receiver by sender, rows and columns as in ``updates.clients``; each row sums to 1.
        """
        raise NotImplementedError(f"{self.name} overrides aggregate and has no mixing matrix")

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The next adapters of the cohort, by METHOD (4) with this rule's mixing matrix.

        Args:
            updates: All updates of the round; not changed.
            round_index: From 0.

        Returns:
            New adapters and the matrix ``mixing``.

        Raises:
            TrainingError: If the rule's matrix has a wrong shape, is not finite, or has a row that does not sum to 1.
        """
        return self.combine(updates, self.mixing_matrix(updates, round_index))

    def sample_shares(self, updates: Updates) -> Tensor:
        """Each client's share of all training targets, ``[N]`` float64: FedAvg's weights.

        Raises:
            TrainingError: If a number of samples is negative, or all are 0.
        """
        samples = updates.num_samples.double()
        if (samples < 0).any() or samples.sum() <= 0:
            raise TrainingError(
                f"aggregation {self.name}: num_samples is {samples.tolist()} for clients {list(updates.clients)}; "
                "needed are numbers of at least 0 that are not all 0"
            )
        return samples / samples.sum()

    def combine(
        self,
        updates: Updates,
        matrix: Tensor,
        matrices: Mapping[str, Tensor] | None = None,
        per_client: Mapping[str, Tensor] | None = None,
        adapters: AdapterStack | None = None,
    ) -> Aggregated:
        """Check ``matrix``, mix with it, and record it as ``mixing`` beside ``matrices`` and ``per_client``.

        Args:
            updates: All updates of the round.
            matrix: ``[N, N]``, see `mixing_matrix`.
            matrices: Other matrices worth looking at.
            per_client: Vectors worth logging.
            adapters: The next adapters, of a rule that does something else with its matrix than METHOD (4).

        Raises:
            TrainingError: If the matrix cannot be used; the message names the rule.
        """
        self._check(matrix, len(updates.clients))
        mixed = Mixture(matrix, updates.end) if adapters is None else adapters
        return Aggregated(mixed, {"mixing": matrix, **(matrices or {})}, dict(per_client or {}))

    def _check(self, matrix: Tensor, num_clients: int) -> None:
        problem = None
        if tuple(matrix.shape) != (num_clients, num_clients):
            problem = f"has shape {tuple(matrix.shape)}; needed is {(num_clients, num_clients)}, receiver by sender"
        elif not torch.isfinite(matrix).all():
            problem = "has entries that are not finite"
        else:
            sums = matrix.double().sum(dim=1)
            row = int((sums - 1).abs().argmax())
            if abs(float(sums[row]) - 1) > 1e-6:
                problem = f"has row {row} that sums to {float(sums[row]):.8g}; needed is 1"
        if problem is not None:
            raise TrainingError(f"aggregation {self.name}: the mixing matrix {problem}")
