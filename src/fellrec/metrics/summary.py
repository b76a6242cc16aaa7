"""From one value per user to values per client and the flat summary that is logged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fellrec.functional.balance import balance
from fellrec.types import Evaluation

HONEST = "honest_clients"
"""Beginning of the names of figures of the clients that do not misbehave."""


def client_means(values: Tensor, client_of_user: Tensor, num_clients: int) -> Tensor:
    """Mean of each client's users.

    Args:
        values: ``[U]`` values, one per evaluated user.
        client_of_user: ``[U]`` int64 client of each.
        num_clients: C.

    Returns:
        ``[C]`` float64 on the CPU; NaN, not 0, for a client without evaluated users.

    Example:
        >>> client_means(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 0, 2]), num_clients=3)
        tensor([0.5000,    nan, 1.0000], dtype=torch.float64)
    """
    clients = client_of_user.cpu()
    counts = torch.bincount(clients, minlength=num_clients)
    return torch.bincount(clients, weights=values.cpu().double(), minlength=num_clients) / counts


def user_mean(values: Tensor) -> float:
    """Mean over users; each user counts once. NumPy's sum does not depend on the number of threads.

    Example:
        >>> user_mean(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        0.5
    """
    return float(np.mean(values.cpu().double().numpy())) if len(values) else float("nan")


def summarise(
    per_user: Mapping[str, Tensor],
    client_of_user: Tensor,
    num_clients: int,
    stage: str,
    round_index: int,
    users: Tensor | None = None,
) -> Evaluation:
    """Collect one evaluation of all clients.

    Args:
        per_user: Metric name → ``[U]``, one value per evaluated user.
        client_of_user: ``[U]`` int64 client of each user.
        num_clients: C.
        stage: ``"val"`` or ``"test"``.
        round_index: Round after which the evaluation ran; -1 is before the first.
        users: ``[U]`` int64 index of each user; ``None`` numbers them.

    Returns:
        The record. Its summary has for each metric ``/mean`` (each client counts once), ``/pooled`` (each user counts
        once) and all balance statistics, over the clients that have evaluated users; and ``num_users`` and
        ``num_clients_without_users``, the number of clients that were left out (their ``per_client`` is NaN).

    Example:
        >>> evaluation = summarise({"hr_at_1": torch.tensor([0.0, 1.0, 1.0])}, torch.tensor([0, 0, 1]), 2, "val", 0)
        >>> evaluation.summary["hr_at_1/mean"], evaluation.summary["hr_at_1/worst"]
        (0.75, 0.5)
    """
    client_of_user = client_of_user.cpu()
    per_client = {name: client_means(values, client_of_user, num_clients) for name, values in per_user.items()}
    has_users = torch.bincount(client_of_user, minlength=num_clients) > 0
    summary = {
        "num_users": float(len(client_of_user)),
        "num_clients_without_users": float((~has_users).sum()),
    }
    for name, values in per_client.items():
        evaluated = values[has_users]
        figures = {"mean": float(evaluated.mean()), "pooled": user_mean(per_user[name]), **balance(evaluated)}
        summary |= {f"{name}/{figure}": value for figure, value in figures.items()}
    users = torch.arange(len(client_of_user)) if users is None else users.cpu()
    return Evaluation(stage, round_index, dict(per_user), client_of_user, per_client, summary, users)


def group_figures(per_user: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of groups of users, each under the group's name.

    Args:
        per_user: Metric name → ``[U]``, one value per evaluated user.
        groups: Name → ``[U]`` bool, membership of each user.

    Returns:
        ``GROUP/num_users`` and, if there are any, ``GROUP/METRIC/pooled``: the mean over its users.

    Example:
        >>> groups = {"cold_users": torch.tensor([True, False, True]), "cold_items": torch.zeros(3).bool()}
        >>> group_figures({"hr_at_1": torch.tensor([0.0, 1.0, 1.0])}, groups)
        {'cold_users/num_users': 2.0, 'cold_users/hr_at_1/pooled': 0.5, 'cold_items/num_users': 0.0}
    """
    figures = {}
    for group, inside in groups.items():
        figures[f"{group}/num_users"] = float(inside.sum())
        if inside.any():
            figures |= {f"{group}/{name}/pooled": user_mean(values[inside]) for name, values in per_user.items()}
    return figures


def member_figures(evaluation: Evaluation, members: Mapping[str, range]) -> dict[str, float]:
    """Metrics of each data set of a federation.

    Args:
        evaluation: Of the clients of all.
        members: Name → its clients.

    Returns:
        ``member/NAME/num_users``, and for each metric ``member/NAME/METRIC/mean`` over its clients with users and
        ``/pooled`` over its users: those that a run on its data alone calls ``METRIC/mean`` and ``METRIC/pooled``.
    """
    found = [_figures_of_clients(evaluation, f"member/{name}", clients) for name, clients in members.items()]
    return {name: value for figures in found for name, value in figures.items()}


def honest_figures(evaluation: Evaluation, poisoned: Collection[int], num_clients: int) -> dict[str, float]:
    """Metrics of the clients that do not misbehave; empty if none does.

    Args:
        evaluation: Of all clients.
        poisoned: Clients that misbehave.
        num_clients: C.

    Returns:
        ``honest_clients/num_users``, and for each metric ``honest_clients/METRIC/mean`` over the honest clients with
        users and ``/pooled`` over their users.
    """
    honest = [client for client in range(num_clients) if client not in poisoned]
    return _figures_of_clients(evaluation, HONEST, honest) if poisoned else {}


def _figures_of_clients(evaluation: Evaluation, prefix: str, clients: Sequence[int]) -> dict[str, float]:
    """Number of users of some clients, and their metrics: means over these clients and over their users."""
    index = torch.tensor(clients, dtype=torch.int64)
    inside = torch.isin(evaluation.client_of_user, index)
    figures = {f"{prefix}/num_users": float(inside.sum())}
    if not inside.any():
        return figures
    for metric, values in evaluation.per_user.items():
        of_clients = evaluation.per_client[metric][index]
        figures[f"{prefix}/{metric}/mean"] = float(of_clients[~of_clients.isnan()].mean())
        figures[f"{prefix}/{metric}/pooled"] = user_mean(values[inside])
    return figures
