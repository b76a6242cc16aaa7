"""Weighted distances of BIGRec's second grounding step.

Shape letters: B users, I items, G exponents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def min_max(values: Tensor) -> Tensor:
    """Min-max normalisation of each row to [0, 1]; a row of equal values becomes 0.

    Args:
        values: ``[..., I]`` floats.

    Example:
        >>> min_max(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])).tolist()
        [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]
    """
    low, high = values.aminmax(dim=-1, keepdim=True)
    return (values - low) / torch.where(high > low, high - low, 1)


def weighted_distances(distances: Tensor, prior: Tensor, gammas: Sequence[float]) -> Tensor:
    """Normalised distances, divided by a weight that grows with the items' prior.

    With D̂ and P̂ the min-max normalised rows of distances and priors, the result is D̂ / (1 + P̂)^γ (Bao et al., "A
    Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems", arXiv 2308.08434; with the sign of
    the exponent in its released code). The nearest item has D̂ = 0 and stays first for every γ.

    Args:
        distances: ``[B, I]`` floats, at least 0.
        prior: ``[B, I]`` or ``[1, I]`` floats, such as counts.
        gammas: G exponents, at least 0.

    Returns:
        ``[G, B, I]``.

    Example:
        >>> distances, counts = torch.tensor([[2.0, 6.0, 4.0]]), torch.tensor([[0.0, 10.0, 5.0]])
        >>> weighted_distances(distances, counts, [0, 1]).tolist()
        [[[0.0, 1.0, 0.5]], [[0.0, 0.5, 0.3333333432674408]]]
    """
    exponents = torch.tensor(list(gammas), dtype=distances.dtype, device=distances.device)
    return min_max(distances) / (1 + min_max(prior)) ** exponents[:, None, None]
