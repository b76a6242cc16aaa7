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
