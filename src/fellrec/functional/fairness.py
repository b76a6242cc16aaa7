"""Weights of clients' updates that favour clients who fare worse, from losses and inner products.

All tensors are float64. N clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST_LOSS = 1e-10
"""Added to losses, so that they are above 0."""
_ROUNDING = 1e-14
"""Squared length of a sum, relative to that of the longest vector, at which it is rounding error."""
_RIDGE = 1e-8
"""What is added to the diagonal of unit vectors' inner products, so that a least norm has one solution."""


def tilted_weights(losses: Tensor, shares: Tensor, tilt: float) -> Tensor:
    """TERM: weights in proportion to ``share * exp(tilt * loss)``; their sum is 1.

    Args:
        losses: ``[N]`` finite.
        shares: ``[N]``, at least 0, not all 0.
        tilt: t; 0 gives the shares.

    Returns:
        ``[N]``.

    Example:
        >>> tilted_weights(torch.tensor([0.0, 1e4]), torch.tensor([0.5, 0.5]), 0.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> tilted_weights(torch.tensor([0.0, 1e4]), torch.tensor([0.5, 0.5]), 2.0)
        tensor([0., 1.], dtype=torch.float64)
    """
    return torch.softmax(tilt * losses.double() + shares.double().log(), dim=0)


def q_fair_weights(losses: Tensor, squared_norms: Tensor, q: float, lipschitz: float) -> Tensor:
    """q-FedAvg: what updates are multiplied by.

    With ``g_k = −L Δ_k`` the step is ``−Σ F_k^q g_k / Σ (q F_k^{q−1} ‖g_k‖² + L F_k^q)``, that is ``Σ c_k Δ_k`` with
    ``c_k = F_k^q / Σ F_j^q (1 + q L ‖Δ_j‖² / F_j)``. Losses are divided by the largest before they are raised to q.

    Args:
        losses: ``[N]``, at least 0; 1e-10 is added.
        squared_norms: ``[N]`` squared norms of the updates.
        q: At least 0; 0 gives ``1 / N``.
        lipschitz: L, above 0.

    Returns:
        ``[N]``, at least 0, with a sum of at most 1.

    Example:
        >>> q_fair_weights(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), 1.0, 1.0)
        tensor([0.2500, 0.7500], dtype=torch.float64)
        >>> q_fair_weights(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0, 1.0)
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    lifted = losses.double() + _LEAST_LOSS
    powers = (lifted / lifted.max()) ** q
    return powers / (powers * (1 + q * lipschitz * squared_norms.double() / lifted)).sum()


def project_to_simplex(values: Tensor, total: float = 1.0) -> Tensor:
    """The nearest point with entries of at least 0 and the given sum.

    Args:
        values: ``[N]``.
        total: At least 0.

    Returns:
        ``[N]``.

    Example:
        >>> project_to_simplex(torch.tensor([0.5, 1.0, -1.0]))
        tensor([0.2500, 0.7500, 0.0000], dtype=torch.float64)
    """
    wide = values.double()
    descending = wide.sort(descending=True).values
    levels = (total - descending.cumsum(0)) / torch.arange(1, len(wide) + 1, dtype=torch.float64)
    last = int((descending + levels > 0).nonzero().max()) if total > 0 else 0
    return (wide + levels[last]).clamp_min(0)


def least_norm_weights(gram: Tensor, centre: Tensor, radius: float) -> Tensor:
    """FedMGDA+: the weights of unit vectors whose sum is shortest, near given weights.

    Minimises ``λᵀ G λ`` with ``Σ λ = 1``, ``λ ≥ 0`` and ``|λ_k − centre_k| ≤ radius``, exactly, by an active-set
    method. Where several weights are best, the one nearest to ``centre`` is taken.

    Args:
        gram: ``[N, N]`` inner products of unit vectors, or zeros.
        centre: ``[N]`` at least 0 with sum 1.
        radius: ε in [0, 1]; 0 gives ``centre``.

    Returns:
        ``[N]``.

    Example:
        >>> opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> least_norm_weights(opposite, torch.tensor([0.6, 0.4]), 1.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> least_norm_weights(opposite, torch.tensor([0.8, 0.2]), 0.1)
        tensor([0.7000, 0.3000], dtype=torch.float64)
    """
    num_clients, weights = len(gram), centre.double().clone()
    if radius == 0:
        return weights
    hessian = gram.double() + _RIDGE * torch.eye(num_clients, dtype=torch.float64)
    lower, upper = (weights - radius).clamp_min(0), (weights + radius).clamp_max(1)
    target = _RIDGE * weights
    at_bound = torch.zeros(num_clients, dtype=torch.int64)  # -1: at the lower bound, 1: at the upper one
    at_bound[upper == lower] = -1
    is_fixed = upper == lower
    for _ in range(20 * num_clients + 20):
        free = (at_bound == 0).nonzero().flatten()
        step, level = _equality_step(hessian, hessian @ weights - target, free)
        if not len(free) or float(step.abs().max()) < 1e-12:
            multipliers = (hessian @ weights - target - level) * -at_bound
            multipliers[is_fixed] = 0
            worst = int(multipliers.argmin())
            if float(multipliers[worst]) >= -1e-12:
                break
            at_bound[worst] = 0
            continue
        room = torch.where(step > 0, upper[free] - weights[free], lower[free] - weights[free])
        lengths = torch.where(step == 0, float("inf"), room / step)
        blocking = int(lengths.argmin())
        length = min(1.0, max(0.0, float(lengths[blocking])))
        weights[free] += length * step
        if length < 1:
            row = int(free[blocking])
            at_bound[row] = 1 if step[blocking] > 0 else -1
            weights[row] = upper[row] if step[blocking] > 0 else lower[row]
    return weights


def _equality_step(hessian: Tensor, gradient: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The step of the free weights to their minimum at the same sum, and the level of the gradient there."""
    if not len(free):
        return gradient[:0], gradient.max()
    size = len(free)
    system = torch.ones(size + 1, size + 1, dtype=torch.float64)
    system[:size, :size] = hessian[free][:, free]
    system[size, size] = 0
    right = torch.cat([-gradient[free], torch.zeros(1, dtype=torch.float64)])
    solution = torch.linalg.solve(system, right)
    return solution[:size], -solution[size]


def kept_directions(order: Sequence[int], rate: float) -> list[int]:
    """FedFV: the clients with the largest losses, whose updates are not projected.

    Args:
        order: Clients by ascending loss.
        rate: α in [0, 1]; above 0, at least one client is kept.

    Example:
        >>> kept_directions([2, 0, 1], 0.1), kept_directions([2, 0, 1], 0.0)
        ([1], [])
    """
    first = -(-round((len(order) - 1) * (1 - rate) * 1e9) // 10**9)
    return list(order[first:]) if rate > 0 else []


def without_conflicts(gram: Tensor, order: Sequence[int], kept: Sequence[int]) -> Tensor:
    """FedFV: each update projected, one after the other, on the normal plane of those that it conflicts with.

    Args:
        gram: ``[N, N]`` inner products of updates.
        order: In which the others are looked at: ascending losses.
        kept: Updates that are not projected.

    Returns:
        ``[N, N]``; row i is what the projected update i is made of.

    Example:
        >>> without_conflicts(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), [0, 1], [1])
        tensor([[1.0000, 0.5000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    wide = gram.double()
    found = torch.eye(len(wide), dtype=torch.float64)
    is_projected = torch.ones(len(wide), dtype=torch.bool)
    is_projected[list(kept)] = False
    for other in order:
        if not float(wide[other, other]) > 0:
            continue
        inner = found @ wide[:, other]
        conflicts = is_projected & (inner < 0)
        conflicts[other] = False
        found[conflicts, other] -= inner[conflicts] / wide[other, other]
    return found


def away_from(gram: Tensor, weights: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """FedFV: a weighted sum, projected on the normal plane of the sum of those of each group that it conflicts with.

    Args:
        gram: ``[M, M]`` inner products.
        weights: ``[M]``, the sum.
        groups: Rows, one group after the other.

    Returns:
        ``[M]``.

    Example:
        >>> away_from(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), torch.tensor([1.0, 0.0]), [[1]])
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    wide, found = gram.double(), weights.double()
    for group in groups:
        inner = wide @ found
        direction = torch.zeros_like(found)
        direction[[row for row in group if inner[row] < 0]] = 1
        length = direction @ wide @ direction
        if float(length) > 0 and float(direction @ inner) < 0:
            found = found - direction * (direction @ inner) / length
    return found


def of_length(gram: Tensor, weights: Tensor, length_of: Tensor) -> Tensor:
    """Weights scaled so that their sum is as long as another one; zeros where it has no length.

    Args:
        gram: ``[M, M]`` inner products.
        weights: ``[M]``, of the sum that is scaled.
        length_of: ``[M]``, of the other.

    Example:
        >>> of_length(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
        tensor([5., 0.])
        >>> of_length(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([0., 0.])
    """
    square, wanted = float(weights @ gram @ weights), float(length_of @ gram @ length_of)
    rounding = _ROUNDING * float(gram.diagonal().max())
    return weights * (max(wanted, 0.0) / square) ** 0.5 if square > rounding else torch.zeros_like(weights)


def consistent(moves_up: Tensor, share_up: Tensor, threshold: float) -> Tensor:
    """FedHEAL: entries that more than a share of the earlier updates moved in the same direction.

    Args:
        moves_up: Booleans, whether the update of this round is at least 0.
        share_up: Share of the earlier updates that are at least 0.
        threshold: θ.

    Example:
        >>> consistent(torch.tensor([True, False, False]), torch.tensor([0.5, 0.5, 1.0]), 0.3)
        tensor([ True,  True, False])
    """
    return torch.where(moves_up, share_up, 1 - share_up) > threshold
