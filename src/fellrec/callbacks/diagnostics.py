"""What an aggregation did to the clients' adapters, in figures of every round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import Aggregated, FitStart, SumsOnly, Updates
from fellrec.functional.mixing import gram_matrix
from fellrec.functional.ranges import Count, Natural
from fellrec.tracking.headline import client_name
from fellrec.tracking.run_log import RunLog


class Diagnostics(FederatedCallback):
    """Logs how far clients drift apart, whether their updates agree, and how many clients a client listens to.

    - ``aggregation/drift``: root mean square distance of the adapters after local training to their mean, divided by
      the norm of the mean update; 0 for equal adapters;
    - ``aggregation/cosine_to_mean``, mean and of each client: cosine of its update to the plain mean of updates;
    - ``aggregation/effective_senders``, mean and of each client: ``1 / Σ_n W[c, n]²`` of the mixing matrix's rows, from
      1 (one sender) to N (all alike); of a rule with one model ``(Σ|c_n|)² / Σ c_n²`` of the updates' weights;

    These are figures of the simulation: a server that sees sums only could not compute them.

    Args:
        log: Of the run.
        every: Rounds between two of them.
        max_logged_clients: In a larger population no figures of single clients are logged.
        max_clients: In a larger cohort nothing is logged: inner products of all pairs are needed.
    """

    def __init__(
        self, log: RunLog, every: Count = 1, max_logged_clients: Natural = 100, max_clients: Natural = 100
    ) -> None:
        self.log = log
        self.every = every
        self.max_logged_clients = max_logged_clients
        self.max_clients = max_clients
        self._names_clients = True
        self._round = 0
        self._metrics: dict[str, float] = {}
        self._clients: tuple[int, ...] = ()

    def on_fit_start(self, fit: FitStart) -> None:
        """Count the clients, and start at the first round of this run, or where it is resumed."""
        self._round = fit.round_index
        self._names_clients = fit.num_clients <= self.max_logged_clients

    def on_round_start(self, round_index: int) -> None:
        """Remember the round."""
        self._round = round_index

    def on_aggregate_start(self, updates: Updates) -> None:
        """Compare the clients' adapters and updates."""
        self._metrics, self._clients = {}, updates.clients
        if self._round % self.every or not 1 < len(updates.clients) <= self.max_clients:
            return
        start, end = (s.hidden if isinstance(s, SumsOnly) else s for s in (updates.start, updates.end))
        if not end:
            return
        changes = gram_matrix(end, start)
        cosines = cosines_to_mean(changes)
        self._metrics = {"drift": drift(gram_matrix(end), changes), **self._per_client("cosine_to_mean", cosines)}

    def on_aggregate_end(self, aggregated: Aggregated) -> None:
        """Log the round."""
        if self._round % self.every:
            return
        metrics = dict(self._metrics)
        senders = effective_senders(aggregated)
        if senders is not None and len(senders) <= self.max_clients:
            metrics |= self._per_client("effective_senders", senders)
        if metrics:
            named = {f"aggregation/{name}": value for name, value in metrics.items()}
            self.log.log_metrics(named, self._round, once="diagnostics")

    def _per_client(self, name: str, values: Tensor) -> Mapping[str, float]:
        has_each = self._names_clients and len(values) == len(self._clients)
        each = zip(self._clients, values.tolist(), strict=True) if has_each else ()
        return {name: float(values.mean()), **{client_name(name, client): value for client, value in each}}


def drift(adapters: Tensor, changes: Tensor) -> float:
    """Root mean square distance of vectors to their mean, divided by the norm of the mean update.

    Args:
        adapters: ``[N, N]`` inner products of the adapters after training.
        changes: ``[N, N]`` inner products of the updates.

    Returns:
        0 if all adapters are equal; infinite distances relative to a mean update of 0 are reported as the distance.

    Example:
        >>> drift(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        1.0
    """
    spread = (adapters.diagonal().mean() - adapters.mean()).clamp_min(0).sqrt()
    moved = changes.mean().clamp_min(0).sqrt()
    return float(spread / moved) if moved > 0 else float(spread)


def cosines_to_mean(changes: Tensor) -> Tensor:
    """Cosine of each vector to the mean of all; 0 where one of the two is 0.

    Args:
        changes: ``[N, N]`` inner products.

    Returns:
        ``[N]`` in [-1, 1].

    Example:
        >>> cosines_to_mean(torch.eye(2).double()).numpy().round(4).tolist()
        [0.7071, 0.7071]
    """
    product = changes.mean(dim=1)
    norms = changes.diagonal().clamp_min(0).sqrt() * changes.mean().clamp_min(0).sqrt()
    return torch.where(norms > 0, product / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0).clamp(-1, 1)


def effective_senders(aggregated: Aggregated) -> Tensor | None:
    """How many clients each client's next adapter comes from, ``[N]``; one value ``[1]`` for a rule with one model."""
    matrix = aggregated.matrices.get("mixing")
    if matrix is not None:
        return inverse_concentration(matrix.double())
    weights = aggregated.per_client.get("update_weight")
    return None if weights is None else inverse_concentration(weights.double()[None])


def inverse_concentration(weights: Tensor) -> Tensor:
    """``(Σ|w|)² / Σ w²`` of each row; 0 for a row of zeros.

    Example:
        >>> inverse_concentration(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])).tolist()
        [2.0, 1.0, 0.0]
    """
    squares = weights.square().sum(dim=1)
    return torch.where(squares > 0, weights.abs().sum(dim=1) ** 2 / squares.clamp_min(1e-300), 0)
