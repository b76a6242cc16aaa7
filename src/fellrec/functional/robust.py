"""Robust statistics of vectors: from their inner products where that is enough, else entry by entry.

``[R, R]`` and ``[R]`` tensors are float64; f is the number of vectors that may be arbitrary. Among equal distances the
earlier row counts as nearer.

Shape letters: R vectors, N clients, P entries of one parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fellrec.functional.mixing import cosine

_SETTLED = 1e-13
"""Change of the weights at which Weiszfeld's iteration has converged."""


def squared_norms(gram: Tensor) -> Tensor:
    """Squared norms from inner products ``[R, R]``, never below 0.

    Example:
        >>> squared_norms(torch.tensor([[4.0, 0.0], [0.0, -1e-20]]))
        tensor([4., 0.])
    """
    return gram.diagonal().clamp_min(0)


def squared_distances(gram: Tensor) -> Tensor:
    """Squared distances between vectors from their inner products, ``[R, R]``, symmetric with a zero diagonal.

    Example:
        >>> squared_distances(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    squares, symmetric = squared_norms(gram), (gram + gram.T) / 2
    return (squares[:, None] + squares[None, :] - 2 * symmetric).clamp_min(0).fill_diagonal_(0)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Which of the scores along the last dimension are the ``count`` lowest: ones, the others zeros.

    Example:
        >>> lowest(torch.tensor([3.0, 1.0, 1.0, 0.0]), 2)
        tensor([0., 1., 0., 1.])
    """
    chosen = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores).scatter_(-1, chosen, 1)


def krum_scores(distances: Tensor, byzantine: int) -> Tensor:
    """Krum's score of each vector: the sum of its R − f − 2 smallest squared distances to others, at least one.

    Args:
        distances: ``[R, R]`` squared distances.
        byzantine: f.

    Example:
        >>> krum_scores(squared_distances(torch.tensor([[0.0], [1.0], [9.0]]) @ torch.tensor([[0.0, 1.0, 9.0]])), 0)
        tensor([ 1.,  1., 64.])
    """
    num_rows = len(distances)
    others = distances.clone().fill_diagonal_(float("inf")).sort(dim=1).values[:, : num_rows - 1]
    return others[:, : max(1, num_rows - byzantine - 2)].sum(dim=1)


def krum_order(distances: Tensor, byzantine: int) -> list[int]:
    """Rows from the best to the worst of `krum_scores`.

    With one neighbour, two vectors that are nearest to each other have the same score. Of equal scores, that whose next
    neighbour is nearer is better, and so on; if all distances are the same, the earlier one.

    Example:
        >>> values = torch.tensor([[0.0, 1.0, 9.0]])
        >>> krum_order(squared_distances(values.T @ values), 0)
        [1, 0, 2]
    """
    ascending = distances.sort(dim=1).values.tolist()
    scores = krum_scores(distances, byzantine).tolist()
    return sorted(range(len(distances)), key=lambda row: (scores[row], *ascending[row]))


def bulyan_selection(gram: Tensor, byzantine: int) -> Tensor:
    """Bulyan's first stage: R − 2f vectors, one after the other the best by Krum among those that are left.

    The last scores are often of one neighbour, and equal for two vectors that are nearest to each other: that one is
    taken that is better among all vectors, see `krum_order`.

    Returns:
        ``[R - 2f]`` int64, ascending.

    Example:
        >>> values = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.5, 99.0]])
        >>> bulyan_selection(values.T @ values, 1)
        tensor([0, 1, 2, 3, 4])
    """
    distances, chosen = squared_distances(gram), list[int]()
    left = krum_order(distances, byzantine)
    while len(chosen) < len(gram) - 2 * byzantine:
        best = left[int(krum_scores(distances[left][:, left], byzantine).argmin())]  # the first of several
        left.remove(best)
        chosen.append(best)
    return torch.tensor(sorted(chosen))


def geometric_median_weights(gram: Tensor, smoothing: float, num_steps: int) -> Tensor:
    """Weights of the geometric median, the point with the least sum of distances, by Weiszfeld's iteration.

    It starts at the mean: ``z ← Σ β_k x_k / Σ β_k``, ``β_k = 1 / max(smoothing, ‖x_k − z‖)``, where z is known by the
    weights of the vectors in it.

    Args:
        gram: ``[R, R]`` inner products.
        smoothing: Least distance that is divided by.
        num_steps: After which it ends, if the weights have not settled.

    Returns:
        ``[R]``, sum 1.

    Example:
        >>> values = torch.tensor([[0.0, 1.0, 50.0]], dtype=torch.float64)
        >>> float((geometric_median_weights(values.T @ values, 1e-9, 1000) @ values.T).round(decimals=6))
        1.0
    """
    weights = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    for _ in range(num_steps):
        inverse = 1 / distances_to(gram, weights).clamp_min(smoothing)
        last, weights = weights, inverse / inverse.sum()
        if float((weights - last).abs().max()) < _SETTLED:
            break
    return weights


def distances_to(gram: Tensor, weights: Tensor) -> Tensor:
    """Distances of all vectors to their weighted sum, ``[R]``.

    Example:
        >>> distances_to(torch.tensor([[0.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.5]))
        tensor([1., 1.])
    """
    inner = gram @ weights
    return (squared_norms(gram) - 2 * inner + weights @ inner).clamp_min(0).sqrt()


def clip_factors(norms: Tensor, largest: float) -> Tensor:
    """``min(1, largest / norm)``, and 1 for the norm 0.

    Example:
        >>> clip_factors(torch.tensor([0.0, 1.0, 4.0]), 2.0)
        tensor([1.0000, 1.0000, 0.5000])
    """
    return torch.where(norms > largest, largest / norms, 1)


def trust_weights(gram: Tensor) -> tuple[Tensor, Tensor]:
    """FLTrust's scores of vectors, and what they are multiplied by in its mean, with the length of the reference.

    ``T_k = max(0, cos(x_k, x_0))`` and ``T_k ‖x_0‖ / (‖x_k‖ Σ T)``; the cosine with a zero vector is 0.

    Args:
        gram: ``[R + 1, R + 1]`` inner products of R vectors and the reference x_0, which is the last one.

    Returns:
        Two ``[R]``; both are zeros if no cosine is positive.

    Example:
        >>> values = torch.tensor([[100.0, -1.0, 0.0, 2.0]], dtype=torch.float64)
        >>> trust, weights = trust_weights(values.T @ values)
        >>> trust.tolist(), weights.tolist()
        ([1.0, 0.0, 0.0], [0.02, 0.0, 0.0])
    """
    norms = squared_norms(gram).sqrt()
    trust = cosine(gram)[:-1, -1].clamp_min(0)
    scaled = torch.where(trust > 0, trust * norms[-1] / norms[:-1], 0)
    return trust, scaled / trust.sum() if trust.any() else scaled


def middle(values: Tensor) -> float:
    """The median of ``[R]``; of an even number, the mean of the two in the middle.

    Example:
        >>> middle(torch.tensor([4.0, 1.0, 2.0, 9.0]))
        3.0
    """
    return float(entrywise_median(values[:, None]))


def centered_clipping_weights(gram: Tensor, radius: float | None, num_steps: int) -> Tensor:
    """Weights of the vectors after steps of ``u ← u + mean of clip(x_k − u)``; u is the last vector at the start.

    Args:
        gram: ``[R + 1, R + 1]`` inner products of R vectors and u.
        radius: τ, what differences are clipped to; ``None``: their median norm, in every step.
        num_steps: Number of steps.

    Returns:
        ``[R + 1]``, sum 1: what u is made of.

    Example:
        >>> values = torch.tensor([[1.0, 8.0, 0.0]], dtype=torch.float64)
        >>> centered_clipping_weights(values.T @ values, 2.0, 1) @ values.T
        tensor([1.5000], dtype=torch.float64)
    """
    num_rows = len(gram) - 1
    weights = torch.zeros(num_rows + 1, dtype=torch.float64)
    weights[-1] = 1
    for _ in range(num_steps):
        norms = distances_to(gram, weights)[:num_rows]
        factors = clip_factors(norms, middle(norms) if radius is None else radius) / num_rows
        weights = weights * (1 - factors.sum())
        weights[:num_rows] += factors
    return weights


def nearest_mixing(gram: Tensor, byzantine: int) -> Tensor:
    """Nearest-neighbour mixing: each vector becomes the mean of the R − f vectors nearest to it, itself among them.

    Returns:
        ``[R, R]``; rows sum to 1.

    Example:
        >>> values = torch.tensor([[0.0, 1.0, 9.0]])
        >>> nearest_mixing(values.T @ values, 1)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    nearest = squared_distances(gram).fill_diagonal_(-1)  # itself before others at the same place
    count = len(gram) - byzantine
    return lowest(nearest, count) / count


def bucket_means(keys: Sequence[int], size: int) -> Tensor:
    """Bucketing: rows in the order of their keys, in groups of ``size``; the last group may be smaller.

    Args:
        keys: Of R rows.
        size: Rows in a group.

    Returns:
        ``[ceil(R / size), R]``; each row is the mean of a group.

    Example:
        >>> bucket_means([30, 10, 20], 2)
        tensor([[0.0000, 0.5000, 0.5000],
                [1.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """
    order = sorted(range(len(keys)), key=lambda row: keys[row])
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    matrix = torch.zeros(len(groups), len(keys), dtype=torch.float64)
    for number, rows in enumerate(groups):
        matrix[number, rows] = 1 / len(rows)
    return matrix


def adaptive_clipping(gram: Tensor, byzantine: int) -> Tensor:
    """Adaptive robust clipping: the ⌊2f(R − f)/R⌋ longest vectors are shortened to the longest of the others.

    Returns:
        ``[R, R]``, diagonal.

    Example:
        >>> adaptive_clipping(torch.diag(torch.tensor([1.0, 4.0, 16.0])), 1)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.5000]])
    """
    norms, num_rows = squared_norms(gram).sqrt(), len(gram)
    num_clipped = 2 * byzantine * (num_rows - byzantine) // num_rows
    return torch.diag(clip_factors(norms, float(norms.sort().values[num_rows - num_clipped - 1])))


def entrywise_median(rows: Tensor) -> Tensor:
    """The median of each column; of an even number of rows, the mean of the two in the middle.

    Args:
        rows: ``[R, P]``.

    Returns:
        ``[P]``.

    Example:
        >>> entrywise_median(torch.tensor([[1.0, 5.0], [2.0, 7.0], [8.0, 6.0], [4.0, 0.0]]))
        tensor([3.0000, 5.5000])
    """
    return trimmed_mean(rows, (len(rows) - 1) // 2)


def trimmed_mean(rows: Tensor, count: int) -> Tensor:
    """The mean of each column without its ``count`` lowest and highest entries.

    Args:
        rows: ``[R, P]``.
        count: Below R / 2.

    Returns:
        ``[P]``.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0, 5.0], [2.0, 70.0], [-8.0, 6.0]]), 1)
        tensor([1., 6.])
    """
    return rows.sort(dim=0).values[count : len(rows) - count].mean(dim=0)


def mean_near_median(rows: Tensor, count: int) -> Tensor:
    """The mean of those ``count`` entries of each column that are nearest to its median.

    Among equal distances the lower entry counts as nearer.

    Args:
        rows: ``[R, P]``.
        count: From 1 to R.

    Returns:
        ``[P]``.

    Example:
        >>> mean_near_median(torch.tensor([[0.0], [1.0], [3.0], [9.0], [4.0]]), 3)
        tensor([2.6667])
    """
    ascending = rows.sort(dim=0).values
    distances = (ascending - entrywise_median(ascending)).abs()
    return ascending.gather(0, distances.argsort(dim=0, stable=True)[:count]).mean(dim=0)
