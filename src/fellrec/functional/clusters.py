"""Clusters of clients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor


def is_divided(gram: Tensor, weights: Tensor, eps1: float, least: float) -> bool:
    """CFL's criterion: the mean update is short beside the longest one, which is longer than ``least``.

    Args:
        gram: ``[n, n]`` float64 inner products of the updates.
        weights: ``[n]`` not negative.
        eps1: Largest ratio of the two norms.
        least: Of the longest norm.

    Example:
        >>> opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> is_divided(opposite, torch.ones(2), eps1=0.4, least=0.5), is_divided(opposite, torch.ones(2), 0.4, 2.0)
        (True, False)
    """
    shares = weights.double() / weights.sum()
    longest = float(gram.diagonal().clamp_min(0).max().sqrt())
    mean = float((shares @ gram @ shares).clamp_min(0).sqrt())
    return longest > least and mean < eps1 * longest


def bipartition(similarities: Tensor, method: str) -> Tensor:
    """Two clusters by agglomeration on ``1 − similarity``.

    Args:
        similarities: ``[n, n]``, symmetric, n at least 2.
        method: ``"complete"``, as in the released program of CFL, or ``"single"``, which finds the two clusters with
            the lowest largest similarity between them.

    Returns:
        ``[n]`` bool: whether an item is in another cluster than the first item.

    Example:
        >>> bipartition(torch.tensor([[1.0, 0.9, -0.5], [0.9, 1.0, -0.4], [-0.5, -0.4, 1.0]]), "complete").tolist()
        [False, False, True]
    """
    distances = np.maximum(1 - similarities.double().numpy(), 0)
    np.fill_diagonal(distances, 0)
    labels = fcluster(linkage(squareform(distances, checks=False), method), 2, criterion="maxclust")
    return torch.from_numpy(labels != labels[0])


def within_clusters(clusters: Tensor, weights: Tensor) -> Tensor:
    """Mixing matrix in which each client gets the weighted mean of its cluster.

    Args:
        clusters: ``[N]`` numbers of clusters.
        weights: ``[N]`` not negative. Where those of a cluster are all 0, its clients count the same.

    Returns:
        ``[N, N]`` float64; rows sum to 1.

    Example:
        >>> within_clusters(torch.tensor([0, 1, 0]), torch.tensor([1.0, 5.0, 3.0]))
        tensor([[0.2500, 0.0000, 0.7500],
                [0.0000, 1.0000, 0.0000],
                [0.2500, 0.0000, 0.7500]], dtype=torch.float64)
    """
    same = (clusters[:, None] == clusters[None, :]).double()
    found = same * weights.double()[None, :]
    sums = found.sum(dim=1, keepdim=True)
    return torch.where(sums > 0, found / torch.where(sums > 0, sums, 1.0), same / same.sum(dim=1, keepdim=True))


def perturbed(adapter: Mapping[str, Tensor], noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """An adapter with Gaussian noise.

    Args:
        adapter: By parameter.
        noise: Standard deviation, as a part of the root mean square of the parameter; of all parameters together where
            that is 0, as for LoRA's factors B before training.
        generator: Of the noise.

    Example:
        >>> start = {"a": torch.full((1000,), 2.0), "b": torch.zeros(1000)}
        >>> found = perturbed(start, 0.1, torch.Generator().manual_seed(0))
        >>> {name: round(float((tensor - start[name]).std()), 2) for name, tensor in found.items()}
        {'a': 0.2, 'b': 0.14}
    """
    squares = {name: tensor.double().square().sum() for name, tensor in adapter.items()}
    whole = (sum(squares.values()) / max(1, sum(tensor.numel() for tensor in adapter.values()))) ** 0.5
    found = {}
    for name in sorted(adapter):
        tensor = adapter[name]
        own = (squares[name] / max(1, tensor.numel())) ** 0.5
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        found[name] = tensor + (noise * float(own or whole) * values).to(tensor.dtype)
    return found
