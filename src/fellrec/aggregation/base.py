"""The aggregation callback: turns the updates of one round into the next adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.settings.about import About, Limits
from fellrec.errors import TrainingError, unknown
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.population import JobNeeds, Population
from fellrec.federated.populations import SharedAndPersonal, SharedModel
from fellrec.federated.ranks import Ranks
from fellrec.federated.records import Aggregated, Updates
from fellrec.federated.terms import LocalTerm, SecondModel
from fellrec.functional.mixing import Mixture, MixtureOfGroups
from fellrec.functional.stacks import AdapterStack, Repeated, as_lazy, first_row
from fellrec.state.tensor_store import StoredTensors

_WAYS = ("mixing_matrix", "update_weights", "aggregate")
SEES = ("nothing", "sums", "adapters")
"""Values of ``AggregationCallback.sees``."""


class AggregationCallback(FederatedCallback):
    """Base of every aggregation rule; a run has exactly one.

    A rule defines one of three methods: `mixing_matrix`, where each client gets a mixture of the clients' adapters;
    `update_weights`, where the server has one model that moves by a weighted sum of the clients' updates; or
    `aggregate`, for everything else. A rule with state overrides `state_dict` and `load_state_dict`, whose values may
    be tensors. A rule of your own needs one class and the override ``aggregation=my_package.MyRule``.

    Attributes:
        sees: What the rule reads of the clients' adapters: ``"adapters"``, all of them; ``"sums"``, only weighted sums
            (``updates.weighted_sums``), as under secure aggregation; ``"nothing"``: no client's adapter is needed by
            another, and none leaves its client.
        population: Models of the population: ``Population`` (one a client; clients that miss a round keep theirs),
            ``SharedModel`` (the server's, which every cohort starts from; the default of rules that define
            `update_weights`), ``ModelVersions`` (the server's, for asynchronous rules, see `buffer_of`),
            ``SharedAndPersonal`` (both), or ``OneForAll`` (trained on pooled data).
        serves: With ``SharedAndPersonal``, the model that is evaluated and tested: ``"personal"`` or ``"shared"``.
        keeps_trained: Whether clients keep the adapter that they trained, whatever else it is used for.
        needs_start_loss: Whether clients measure their loss at the received adapter, for ``updates.start_losses``.
        local_terms: What is added to the clients' local objective.
        second_model: A model that clients train beside their adapter, see `SecondModel`; not with an executed cut.
        changes_ranks: Whether the rule changes the ranks of the clients' adapters, by ``Aggregated.ranks``.
        client_tensors: Names of the clients' tensors that are sent with each update, for ``updates.tensors``; others
            stay at their client.
        part_of: Gives the part of the model, ``"head"``, ``"body"`` or ``"tail"``, that a parameter belongs to; set
            before `begin`, in every process.
        held_out: Fraction of each client's training rows that are not trained on; on them losses of
            `candidates` are measured, or on the training rows if it is 0.
        limits: What the rule cannot be combined with; refused before data and models are loaded.
        waived_laws: Laws of ``fellrec check-rule`` that cannot hold for the rule: name of the law → why.

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
    keeps_trained: bool = False
    needs_start_loss: bool = False
    changes_ranks: bool = False
    held_out: float = 0.0
    limits: Limits = Limits()
    waived_laws: Mapping[str, str] = {}
    own_about: About | None = None
    local_terms: Sequence[LocalTerm] = ()
    """Made with the rule in every process: what changes from round to round goes to clients as tensors, not here."""
    second_model: SecondModel | None = None
    client_tensors: Sequence[str] = ()
    part_of: Callable[[str], str] = staticmethod(lambda name: "body")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a rule that defines no way to aggregate, or an unknown ``sees``; take over what ``about`` says.

        Raises:
            TypeError: See above.
        """
        super().__init_subclass__(**kwargs)
        # Only where a class has the settings as a base of its own: a rule derived from it is another rule.
        about = next((vars(kind)["about"] for kind in (cls, *cls.__bases__) if "about" in vars(kind)), None)
        cls.own_about = about
        if about is not None:
            cls.sees, cls.limits = vars(cls).get("sees", about.sees), vars(cls).get("limits", about.limits)
        elif "sees" not in vars(cls) and cls.sees == "sums" and cls._changes_a_rule_of_the_package():
            cls.sees = AggregationCallback.sees  # it may read more than the rule that it is derived from
        if cls.sees not in SEES:
            raise TypeError(f"{cls.__name__}: {unknown('value of sees', cls.sees, SEES)}")
        defined = [name for name in _WAYS if getattr(cls, name) is not getattr(AggregationCallback, name)]
        if not defined:
            raise TypeError(f"{cls.__name__}: an aggregation rule defines {', '.join(_WAYS[:-1])} or {_WAYS[-1]}")
        if "update_weights" in defined and cls.population is Population:
            cls.population = SharedModel

    @classmethod
    def _changes_a_rule_of_the_package(cls) -> bool:
        is_derived = any(getattr(kind, "own_about", None) is not None for kind in cls.__bases__)
        return is_derived and any(name in vars(cls) for name in _WAYS)

    @property
    def name(self) -> str:
        """The rule's name in tables and messages: that of ``about``, or the class name in lower case."""
        return self.own_about.name if self.own_about is not None else type(self).__name__.lower()

    def begin(self, initial: Mapping[str, Tensor]) -> None:
        """Called before the first round, and before a state is restored.

        Args:
            initial: The adapter that every client starts from, by parameter; not to be changed.

        Raises:
            ConfigError: If the rule cannot work with an adapter that has these parameters.
        """

    def candidates(self, row: int, adapters: Sequence[StoredTensors], round_index: int) -> Sequence[StoredTensors]:
        """Adapters whose losses a client measures before it trains; none by default. See `start`.

        Args:
            row: Of the client.
            adapters: The current adapter of each row of the population.
            round_index: From 0.
        """
        return ()

    def start(self, row: int, candidates: Sequence[StoredTensors], losses: Tensor) -> Mapping[str, Tensor]:
        """What a client trains from, once it has measured.

        Args:
            row: Of the client.
            candidates: What was measured.
            losses: ``[M]`` float64, one for each; NaN where the client failed.
        """
        return candidates[0].tensors()

    def buffer_of(self, num_training: int) -> int | None:
        """Updates after which the server's model changes, if the rule is asynchronous; ``None`` if it is not.

        Args:
            num_training: Clients that train at the same time.
        """
        return None

    def new_population(
        self,
        initial: Mapping[str, Tensor],
        num_clients: int,
        reset_optimizer: bool = False,
        ranks: Ranks | None = None,
    ) -> Population:
        """The models of a run before its first round, with what this rule needs of every job.

        Args:
            initial: Adapter that every row starts from, by parameter.
            num_clients: C.
            reset_optimizer: Whether clients forget their optimiser state at the start of a round.
            ranks: LoRA ranks of the clients, if they differ.
        """
        needs = self.job_needs(reset_optimizer, ranks)
        if issubclass(self.population, SharedAndPersonal):
            return self.population(initial, num_clients, needs, self.serves)
        return self.population(initial, num_clients, needs)

    def job_needs(self, reset_optimizer: bool, ranks: Ranks | None) -> JobNeeds:
        """What this rule needs of every job; the arguments are those of `new_population`."""
        has_trains = type(self).trains is not AggregationCallback.trains
        keeps = type(self).exchanges is not AggregationCallback.exchanges
        return JobNeeds(
            trains=self.trains if has_trains else None,
            start_loss=self.needs_start_loss,
            reset_optimizer=reset_optimizer,
            is_personal=(lambda name: not self.exchanges(name, 0)) if keeps else None,
            ranks=ranks,
        )

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
        raise NotImplementedError(f"aggregation {self.name} has no mixing matrix")

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """What each client's update is multiplied by; the shared model moves by their weighted sum.

        Args:
            updates: All updates of the round; not to be changed.
            round_index: From 0.

        Returns:
            ``[N]`` finite floats, with any sum.
        """
        raise NotImplementedError(f"aggregation {self.name} has no weights of updates")

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
        if type(self).update_weights is not AggregationCallback.update_weights:
            return self.move(updates, self.update_weights(updates, round_index))
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

    def received_losses(self, updates: Updates) -> Tensor:
        """The clients' losses at the adapters that they received, ``[N]`` float64, for rules with ``needs_start_loss``.

        Raises:
            TrainingError: If they were not measured, or one is not finite or negative.
        """
        losses = updates.start_losses
        if losses is None or losses.shape != (len(updates.clients),):
            raise TrainingError(f"aggregation {self.name} needs the clients' losses at the adapters that they received")
        if not bool((losses.isfinite() & (losses >= 0)).all()):
            raise TrainingError(
                f"aggregation {self.name}: losses at the received adapter are {losses.tolist()} for clients "
                f"{list(updates.clients)}; needed are finite numbers of at least 0"
            )
        return losses.double()

    def client_weights(self, updates: Updates, weights: str) -> Tensor:
        """Each client's weight in a mean, ``[N]`` float64 with sum 1: its share of all samples, or the same for all.

        Args:
            updates: All updates of the round.
            weights: ``"samples"`` or ``"equal"``.

        Raises:
            TrainingError: See `sample_shares`.
        """
        if weights == "samples":
            return self.sample_shares(updates)
        return torch.full((len(updates.clients),), 1 / len(updates.clients), dtype=torch.float64)

    def move(
        self,
        updates: Updates,
        weights: Tensor,
        per_client: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
        model: Mapping[str, Tensor] | None = None,
    ) -> Aggregated:
        """Move the shared model by a weighted sum of updates, and record the weights as ``update_weight``.

        Args:
            updates: All updates of the round.
            weights: ``[N]``, see `update_weights`.
            per_client: Other vectors worth logging.
            metrics: Figures worth logging.
            model: The server's model, of which clients may have received earlier versions; ``None`` for the model that
                all of them received.

        Raises:
            TrainingError: If the weights cannot be used, or clients started the round with different adapters; the
                message names the rule.
        """
        if not isinstance(weights, Tensor) or weights.shape != (len(updates.clients),):
            found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise TrainingError(
                f"aggregation {self.name}: the weights of updates are {found}, needed is [{len(updates.clients)}]"
            )
        if not torch.isfinite(weights).all():
            raise TrainingError(
                f"aggregation {self.name}: the weights of updates are not finite: {weights.tolist()} for clients "
                f"{list(updates.clients)}"
            )
        if model is None:
            updates.check_common_start(self.name)
        vectors = {"update_weight": weights.double(), **(per_client or {})}
        return self.shared(updates, updates.moved(weights, model), vectors, metrics)

    def moved_by(
        self,
        updates: Updates,
        steps: AdapterStack,
        per_client: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Aggregated:
        """Move the shared model by a sum of steps, for a rule whose step is not a weighted sum of updates.

        Args:
            updates: All updates of the round.
            steps: Name → ``[any, *shape]``; their sum is added to the clients' common start.
            per_client: Vectors worth logging.
            metrics: Figures worth logging.

        Raises:
            TrainingError: If clients started the round with different adapters.
        """
        updates.check_common_start(self.name)
        start, lazy = first_row(updates.start), as_lazy(steps)
        moved = {}
        for name in lazy:
            flat = start[name].double().cpu().reshape(-1).clone()
            for columns, block in lazy.blocks(name):
                flat[columns] += block.sum(dim=0)
            moved[name] = flat.reshape(lazy.shapes[name])
        return self.shared(updates, moved, per_client, metrics)

    def shared(
        self,
        updates: Updates,
        adapter: Mapping[str, Tensor],
        per_client: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Aggregated:
        """The result of a rule with one model for all clients.

        Args:
            updates: All updates of the round.
            adapter: The next shared adapter, name → ``[*shape]``; cast to the type of the clients' adapters.
            per_client: Vectors worth logging.
            metrics: Figures worth logging.
        """
        rows = Repeated(updates.like_adapters(adapter), len(updates.clients))
        return Aggregated(rows, per_client=dict(per_client or {}), metrics=dict(metrics or {}))

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
        if mixed is None and self.sees != "nothing" and bool((matrix == matrix[0]).all()):
            mixed = Repeated(updates.weighted_sums(matrix[0]), len(updates.clients))
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
