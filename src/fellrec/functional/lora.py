"""Products of LoRA factors without an ``[out, in]`` matrix: errors of averaging, truncation, corrections, rotations.

Shape letters: N clients, r rank, R inner size of a product ``left @ right`` (N·r for the factors of all clients beside
each other). Tensors are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fellrec.functional.rng import derive_seed


def is_factor(name: str, factor: str) -> bool:
    """Whether a parameter is the factor ``A`` or ``B`` of a layer, by PEFT's names.

    Example:
        >>> is_factor("layers.0.q_proj.lora_A.default.weight", "A"), is_factor("lm_head.weight", "B")
        (True, False)
    """
    return f".lora_{factor}." in f".{name}"


def stacked(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of products ``Σ p_k B_k A_k`` as one product; the weights are on the left factor only.

    Args:
        a: ``[N, r, in]``.
        b: ``[N, out, r]``.
        weights: ``[N]``.

    Returns:
        ``[out, N·r]`` and ``[N·r, in]``.

    Example:
        >>> a, b = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[3.0]], [[4.0]]])
        >>> left, right = stacked(a, b, torch.tensor([0.5, 0.5]))
        >>> (left @ right).item()  # (1 · 3 + 2 · 4) / 2
        5.5
    """
    left = (weights.to(b)[:, None, None] * b).transpose(0, 1).reshape(b.shape[1], -1)
    return left, a.reshape(-1, a.shape[2])


def averaging_error(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What averaging factors misses, ``Σ p_k B_k A_k − B̄ Ā``, as one product: ``Σ p_k (B_k − B̄)(A_k − Ā)``.

    Args:
        a: ``[N, r, in]``.
        b: ``[N, out, r]``.
        weights: ``[N]`` with sum 1.

    Returns:
        ``[out, N·r]`` and ``[N·r, in]``.

    Example:
        >>> a, b = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[1.0]], [[3.0]]])
        >>> left, right = averaging_error(a, b, torch.tensor([0.5, 0.5]))
        >>> (left @ right).item()  # (1 + 9) / 2 − 2 · 2
        1.0
    """
    return stacked(a - mean(a, weights), b - mean(b, weights), weights)


def mean(factors: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over clients.

    Example:
        >>> mean(torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5]))
        tensor([2.])
    """
    return torch.tensordot(weights.to(factors), factors, dims=1)


def squared_norm(left: Tensor, right: Tensor) -> Tensor:
    """Squared Frobenius norm of ``left @ right`` as ``tr((XᵀX)(YYᵀ))``, with matrices of size R only.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.

    Example:
        >>> squared_norm(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0]])).item()
        45.0
    """
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0)


def factor_error(layers: Iterable[tuple[float, Tensor, Tensor]], weights: Tensor) -> float:
    """Relative Frobenius error of averaging factors, over all layers: ``‖Σ p_k B_k A_k − B̄ Ā‖ / ‖Σ p_k B_k A_k‖``.

    Args:
        layers: For each the scale α / r, A ``[N, r, in]`` and B ``[N, out, r]``.
        weights: ``[N]`` with sum 1.

    Returns:
        0 where nothing is missed, infinity where only the mean of products is 0.

    Example:
        >>> a, b = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[1.0]], [[3.0]]])
        >>> factor_error([(2.0, a, b)], torch.tensor([0.5, 0.5]))  # 5 − 4 of 5
        0.2
    """
    error = whole = 0.0
    for scale, a, b in layers:
        error += scale**2 * float(squared_norm(*averaging_error(a, b, weights)))
        whole += scale**2 * float(squared_norm(*stacked(a, b, weights)))
    if error == 0:
        return 0.0
    return math.sqrt(error / whole) if whole else math.inf


def mean_by_rank(
    factors: Tensor, weights: Tensor, ranks: Tensor, only_present: bool, old: Tensor | None = None
) -> Tensor:
    """Means of factors of different ranks, padded with zeros to the largest one, row by row.

    Args:
        factors: ``[N, r, size]``, A or B transposed; rows from the client's rank on are 0.
        weights: ``[N]`` with sum 1.
        ranks: ``[N]`` integers.
        only_present: Whether the weights of a row are divided by the sum of those of the clients that have it; else
            clients that do not have it count as zeros.
        old: ``[r, size]``, rows where no client has weight; ``None`` for zeros.

    Returns:
        ``[r, size]``.

    Example:
        >>> factors, half = torch.tensor([[[2.0], [0.0]], [[4.0], [4.0]]]), torch.tensor([0.5, 0.5])
        >>> [mean_by_rank(factors, half, torch.tensor([1, 2]), only).flatten().tolist() for only in (False, True)]
        [[3.0, 2.0], [3.0, 4.0]]
    """
    has = torch.arange(factors.shape[1], device=factors.device) < ranks.to(factors.device)[:, None]
    shares = weights.to(factors)[:, None] * has
    totals = shares.sum(dim=0)
    means = torch.einsum("nr,nrs->rs", shares, factors)
    if only_present:
        means = means / torch.where(totals > 0, totals, 1.0)[:, None]
    kept = torch.zeros_like(means) if old is None else old.to(means)
    return torch.where((totals > 0)[:, None], means, kept)


def tail_norms(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """``‖A_k[f_k:]‖ ‖B_k[:, f_k:]‖`` of each client, ``[N]``.

    Args:
        a: ``[N, r, in]``.
        b: ``[N, out, r]``.
        first: ``[N]`` integers, f.

    Example:
        >>> a, b = torch.tensor([[[9.0], [3.0]]]), torch.tensor([[[9.0, 2.0]]])
        >>> tail_norms(a, b, torch.tensor([1])), tail_norms(a, b, torch.tensor([2]))
        (tensor([6.]), tensor([0.]))
    """
    is_tail = (torch.arange(a.shape[1], device=a.device) >= first.to(a.device)[:, None])[:, :, None]
    left, right = b * is_tail.transpose(1, 2), a * is_tail
    return torch.linalg.vector_norm(left, dim=(1, 2)) * torch.linalg.vector_norm(right, dim=(1, 2))


def product_norms(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of each client's product ``B_k A_k``, ``[N]``.

    Args:
        a: ``[N, r, in]``.
        b: ``[N, out, r]``.

    Example:
        >>> product_norms(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]]))
        tensor([10.])
    """
    grams = (b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))
    return grams.sum(dim=(1, 2)).clamp_min(0).sqrt()


def factored_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``left @ right``, by QR of both and a decomposition of size R at most.

    Signs are fixed: the entry of each left singular vector with the largest absolute value is positive.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.

    Returns:
        U ``[out, q]``, singular values ``[q]`` in descending order, Vᵀ ``[q, in]``; q is the smallest of out, R and in.

    Example:
        >>> u, s, vh = factored_svd(torch.tensor([[0.0], [-2.0]]), torch.tensor([[3.0, 4.0]]))
        >>> s.tolist(), u.flatten().tolist(), [round(x, 6) for x in vh.flatten().tolist()]
        ([10.0], [0.0, 1.0], [-0.6, -0.8])
    """
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, vh = q_left @ u, vh @ q_right.T
    largest = u.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(u.gather(0, largest) < 0, -1.0, 1.0).to(u)[0]
    return u * signs, s, signs[:, None] * vh


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product of a rank that is nearest to ``left @ right`` (Eckart and Young), with orthonormal rows on the right.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.
        rank: Rank r; where the matrix has fewer singular values, rows and columns of zeros are added.

    Returns:
        A ``[r, in]``, the first rows of Vᵀ; B ``[out, r]``, the first columns of U times their singular values; and all
        singular values ``[q]``.

    Example:
        >>> a, b, s = truncated(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> (b @ a).tolist(), s.tolist()
        ([[3.0, 0.0], [0.0, 0.0]], [3.0, 1.0])
    """
    u, s, vh = factored_svd(left, right)
    a, b = vh[:rank], u[:, :rank] * s[:rank]
    missing = rank - len(a)
    if missing > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a, b, s


def smaller(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with an inner size of at most that of its shorter side; unchanged if it has such a size.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.

    Example:
        >>> left, right = smaller(torch.ones(2, 5), torch.ones(5, 3))
        >>> list(left.shape), list(right.shape), (left @ right).tolist()
        ([2, 2], [2, 3], [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]])
    """
    size_out, inner, size_in = left.shape[0], left.shape[1], right.shape[1]
    if inner <= min(size_out, size_in):
        return left, right
    if size_out <= size_in:
        return torch.eye(size_out, dtype=left.dtype, device=left.device), left @ right
    return left @ right, torch.eye(size_in, dtype=left.dtype, device=left.device)


def correction(a: Tensor, b: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What is added to the mean of B so that its product with the mean of A is nearer to the mean of products.

    The minimum over D of ``‖Σ p_k B_k A_k − (B̄ + D) Ā‖² + λ ‖D‖²``, which is ``D = E Āᵀ (Ā Āᵀ + λ I)⁻¹`` with
    ``E = Σ p_k B_k A_k − B̄ Ā``.

    Args:
        a: ``[N, r, in]``.
        b: ``[N, out, r]``.
        weights: ``[N]`` with sum 1.
        strength: λ, above 0.

    Returns:
        ``[out, r]``.

    Example:
        >>> a, b = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[1.0]], [[3.0]]])
        >>> round(correction(a, b, torch.tensor([0.5, 0.5]), 1.0).item(), 6)  # 1 · 2 / (2 · 2 + 1)
        0.4
    """
    left, right = averaging_error(a, b, weights)
    mean_a = mean(a, weights)
    gram = mean_a @ mean_a.T
    gram = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, (left @ (right @ mean_a.T)).T).T


def rotations(correlations: Tensor, strength: float) -> Tensor:
    """Rotations Q that align factors with a reference: the ones with the largest ``tr(Qᵀ M)``, softened.

    The orthogonal Procrustes problem without reflections (Kabsch). The rotation is mixed with the identity,
    ``(1 − λ) I + λ Q``, and the nearest orthogonal matrix is taken. Where M is 0 it is the identity.

    Args:
        correlations: M, ``[N, r, r]``: ``A_k Aᵀ`` for rows that become ``Qᵀ A_k``, or ``B_kᵀ B`` for columns that
            become ``B_k Q``.
        strength: λ in [0, 1].

    Returns:
        ``[N, r, r]``, orthogonal.

    Example:
        >>> quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
        >>> rotations(quarter, 1.0)[0].round().tolist(), rotations(0 * quarter, 1.0)[0].tolist()
        ([[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    """
    identity = torch.eye(correlations.shape[1], dtype=correlations.dtype, device=correlations.device)
    if strength == 0:
        return identity.expand_as(correlations).clone()
    u, _, vh = torch.linalg.svd(correlations)
    u = torch.cat([u[..., :-1], u[..., -1:] * torch.linalg.det(u @ vh)[:, None, None].sign()], dim=2)
    found = u @ vh
    if strength < 1:
        u, _, vh = torch.linalg.svd((1 - strength) * identity + strength * found)
        found = u @ vh
    is_zero = (correlations == 0).all(dim=2).all(dim=1)
    return torch.where(is_zero[:, None, None], identity, found)


def initial_a(shape: Sequence[int], *seed: int | str) -> Tensor:
    """New values of A as PEFT draws them: uniform within ``1 / √in``, ``[r, in]`` float32.

    Args:
        shape: Of A.
        seed: What they depend on, see ``derive_seed``.

    Example:
        >>> drawn = initial_a((2, 4), 0, "layer")
        >>> bool((drawn.abs() <= 0.5).all()), torch.equal(drawn, initial_a((2, 4), 0, "layer"))
        (True, True)
    """
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    values = torch.empty(tuple(shape), dtype=torch.float32)
    return torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
