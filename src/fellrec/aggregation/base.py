"""The aggregation callback: turns the updates of one round into the next adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import TrainingError, unknown
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.population import Population
from fellrec.federated.records import Aggregated, Updates
from fellrec.federated.terms import LocalTerm
from fellrec.functional.mixing import Mixture, MixtureOfGroups
from fellrec.functional.stacks import AdapterStack

SEES = ("nothing", "sums", "adapters")
"""Values of ``AggregationCallback.sees``."""


class AggregationCallback(FederatedCallback):
    """Base of every aggregation rule; a run has exactly one.

    Most rules implement only `mixing_matrix`. A rule that cannot be written as a matrix overrides `aggregate`. A rule
    with state overrides `state_dict` and `load_state_dict`, whose values may be tensors. A rule of your own needs one
    class and the override ``aggregation._target_=my_package.MyRule``.

    Attributes:
        sees: What the rule reads of the clients' adapters: ``"adapters"``, all of them; ``"sums"``, only weighted sums
            (``updates.weighted_sums``), as under secure aggregation; ``"nothing"``: no client's adapter is needed by
            another, and none leaves its client.
        population: Models of the population: ``Population`` (one a client), ``OneForAll`` or ``SharedAndPersonal``.
        serves: With ``SharedAndPersonal``, the model that is evaluated and tested: ``"personal"`` or ``"shared"``.
        needs_start_loss: Whether clients measure their loss at the received adapter, for ``updates.start_losses``.
        local_terms: What is added to the clients' local objective.

    Example:
        >>> class FirstClient(AggregationCallback):
        ...     def mixing_matrix(self, updates, round_index):
        ...         n = len(updates.clients)
        ...         return torch.eye(n)[torch.zeros(n, dtype=torch.long)]
        >>> FirstClient().name
        'firstclient'
    """

    sees: str = "adapters"
    population: type[Population] = Population
    serves: str = "personal"
    needs_start_loss: bool = False
    local_terms: Sequence[LocalTerm] = ()
    """Made with the rule in every process: what changes from round to round goes to clients as tensors, not here."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a rule that defines neither `mixing_matrix` nor `aggregate`, or an unknown ``sees``.

        Raises:
            TypeError: See above.
        """
        super().__init_subclass__(**kwargs)
        if cls.sees not in SEES:
            raise TypeError(f"{cls.__name__}: {unknown('value of sees', cls.sees, SEES)}")
        if cls.mixing_matrix is AggregationCallback.mixing_matrix and cls.aggregate is AggregationCallback.aggregate:
            raise TypeError(f"{cls.__name__}: an aggregation rule defines mixing_matrix or aggregate")

    @property
    def name(self) -> str:
        """The rule's name in tables and messages: the class name in lower case."""
        return type(self).__name__.lower()

    def trains(self, name: str, round_index: int) -> bool:
        """Whether a parameter of the adapter is trained in a round; the others stay frozen and are not exchanged."""
        return True

    def exchanges(self, name: str, round_index: int) -> bool:
        """Whether a trained parameter leaves the clients; the others stay personal."""
        return True

    def group_of(self, name: str) -> str:
        """The group of a parameter; groups are mixed by matrices of their own, see `mixing_matrix`."""
        return ""

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor | Mapping[str, Tensor]:
        """How much of each sender's adapter each receiver takes.

        Args:
            updates: All updates of the round; not to be changed.
            round_index: From 0.

        Returns:
            ``[N, N]`` floats, receiver by sender, rows and columns as in ``updates.clients``; each row sums to 1. Or
            one for each group of parameters, see `group_of`.
        """
        raise NotImplementedError(f"{self.name} overrides aggregate and has no mixing matrix")

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The next adapters of the cohort, by METHOD (4) with this rule's mixing matrix.

        Args:
            updates: All updates of the round; not changed.
            round_index: From 0.

        Returns:
            New adapters and the matrix ``mixing``, or ``mixing_GROUP`` for each group; no adapters if the rule sees
            nothing: clients keep what they trained.

        Raises:
            TrainingError: If the rule's matrix has a wrong shape, is not finite, or has a row that does not sum to 1.
        """
        found = self.mixing_matrix(updates, round_index)
        if isinstance(found, Tensor):
            return self.combine(updates, found)
        if not isinstance(found, Mapping):
            raise TrainingError(
                f"aggregation {self.name}: mixing_matrix returned {type(found).__name__}; needed is a tensor [N, N], "
                "or one for each group of parameters"
            )
        for matrix in found.values():
            self._check(matrix, len(updates.clients))
        named = {f"mixing_{group}" if group else "mixing": matrix for group, matrix in found.items()}
        mixed = {} if self.sees == "nothing" else MixtureOfGroups(found, self.group_of, updates.end)
        return Aggregated(mixed, named)

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
        mixed = adapters
        if mixed is None:
            mixed = {} if self.sees == "nothing" else Mixture(matrix, updates.end)
        return Aggregated(mixed, {"mixing": matrix, **(matrices or {})}, dict(per_client or {}))

    def _check(self, matrix: Tensor, num_clients: int) -> None:
        problem = None
        if not isinstance(matrix, Tensor):
            problem = f"is of type {type(matrix).__name__}; needed is a tensor"
        elif tuple(matrix.shape) != (num_clients, num_clients):
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
