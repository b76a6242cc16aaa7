"""Mixing matrices from distances between models."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(gram: Tensor) -> Tensor:
    """``‖x_i − x_j‖²`` from inner products.

    Args:
        gram: ``[N, N]`` float64.

    Returns:
        ``[N, N]`` float64, not negative, zeros on the diagonal.

    Example:
        >>> squared_distances(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([[0., 5.],
                [5., 0.]])
    """
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0).fill_diagonal_(0)


def message_passing(gram: Tensor, attention: float, sigma: float) -> Tensor:
    """FedAMP's mixing matrix: ``attention / (N − 1) · exp(−d / (sigma · m))`` for other clients, own weight the rest.

    d is the squared distance of two clients' models, m the median of it over all pairs. If m is 0, clients at distance
    0 count as equal and all others as infinitely far.

    Args:
        gram: ``[N, N]`` inner products of the clients' models.
        attention: In [0, 1], the largest sum of the others' weights.
        sigma: Positive.

    Returns:
        ``[N, N]`` float64, receiver by sender; rows sum to 1.

    Example:
        >>> gram = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> message_passing(gram, attention=1.0, sigma=1.0).numpy().round(4).tolist()
        [[0.6321, 0.3679], [0.3679, 0.6321]]
    """
    num_clients = len(gram)
    if num_clients == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    distances = squared_distances(gram.double())
    pairs = distances[~torch.eye(num_clients, dtype=torch.bool)]
    scale = sigma * pairs.quantile(0.5)
    closeness = torch.exp(-distances / scale) if scale > 0 else (distances == 0).double()
    weights = (attention / (num_clients - 1) * closeness).fill_diagonal_(0)
    return weights + torch.diag(1 - weights.sum(dim=1))


def first_order_weights(losses: Tensor, distances: Tensor) -> Tensor:
    """FedFomo's weights of a client's own model, which is the first, and of others.

    ``max(0, (losses[0] − losses[j]) / distances[j])`` for the others, divided by their sum; the own weight is then 0.
    Models with a loss that is not a number, or at distance 0, have weight 0; if all have, the own weight is 1.

    Args:
        losses: ``[M]``.
        distances: ``[M]`` to the own model.

    Returns:
        ``[M]`` float64, sum 1.

    Example:
        >>> first_order_weights(torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 0.5, 1.0])).tolist()
        [0.0, 0.5, 0.5, 0.0]
        >>> first_order_weights(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])).tolist()
        [1.0, 0.0]
    """
    gains = (losses[0] - losses).double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    weights = torch.where(distances > 0, gains / torch.where(distances > 0, distances, 1.0), 0.0)
    if weights.sum() > 0:
        return weights / weights.sum()
    return torch.eye(len(losses), dtype=torch.float64)[0]
