"""The mixing matrix ``W[receiver, sender]`` of a round, and mixing.

METHOD (1)-(4) are FELLRec's equations in docs/aggregation.md.

``[N, N]`` and ``[N]`` tensors are float64. Adapters are read in blocks of columns, so that they are not concatenated or
cast as a whole. With a ``LazyStack`` they need not be in memory. On the CPU, inner products of updates are in float32,
which is twice as fast, and their sums over blocks of columns in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fellrec.functional.stacks import AdapterStack, LazyStack, as_lazy

_COLUMNS = 4096
"""Entries of an inner product that are added in float32: more of them would cost digits."""
_ROWS = 128
"""Rows of a symmetric product that are computed together, with all columns from the first of them on."""


@torch.no_grad()
def gram_matrix(stack: AdapterStack, start: AdapterStack | None = None) -> Tensor:
    """Inner products of the clients' adapters, or of their updates, over all parameters.

    Args:
        stack: Adapters, name → ``[N, *shape]``.
        start: Adapters before local training, same names and shapes. If given, the result is that of the updates
            ``stack - start``.

    Returns:
        ``[N, N]`` float64 on the CPU.

    Example:
        >>> gram_matrix({"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0], [0.0]])})
        tensor([[10.,  2.],
                [ 2.,  4.]], dtype=torch.float64)
    """
    end, origin = as_lazy(stack), None if start is None else as_lazy(start)
    gram = torch.zeros(end.num_rows, end.num_rows, dtype=torch.float64)
    for name in end:
        for columns, block in end.blocks(name):
            if origin is None:  # adapters are nearly parallel: what distinguishes them is in the last digits
                rows = _widen(block)
            else:
                rows = _for_products(block) - _for_products(origin.block(name, columns))
            for part in rows.split(_COLUMNS, dim=1):
                for first in range(0, end.num_rows, _ROWS):  # a block of the diagonal, and what is right of it
                    panel = part[first : first + _ROWS] @ part[first:].T
                    gram[first : first + _ROWS, first:] += panel.to("cpu", torch.float64)
    for first in range(0, end.num_rows, _ROWS):
        gram[first + _ROWS :, first : first + _ROWS] = gram[first : first + _ROWS, first + _ROWS :].T
    return gram


def cosine(gram: Tensor) -> Tensor:
    """Cosine similarities from inner products.

    The cosine of a zero vector with every other vector is defined as 0.

    Args:
        gram: ``[N, N]`` float64 inner products.

    Returns:
        ``[N, N]`` float64 in [-1, 1], ones on the diagonal.

    Example:
        >>> cosine(torch.tensor([[4.0, 2.0], [2.0, 4.0]], dtype=torch.float64))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return (inverse[:, None] * gram * inverse[None, :]).clamp(-1, 1).fill_diagonal_(1)


def similarity(gram: Tensor) -> Tensor:
    """METHOD (1): similarities ``(1 + cosine) / 2`` from inner products.

    A zero vector (an unchanged client) has similarity 1/2 with every other one.

    Args:
        gram: ``[N, N]`` float64 inner products, see `gram_matrix`.

    Returns:
        ``[N, N]`` float64 in [0, 1], ones on the diagonal.

    Example:
        >>> similarity(gram_matrix({"a": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    return (1 + cosine(gram)) / 2


def difficulty(losses: Tensor, temperature: float) -> Tensor:
    """METHOD (2): softmax over the clients of ``loss / temperature``.

    Args:
        losses: ``[N]`` local losses.
        temperature: Positive; smaller values concentrate the difficulty on the clients with the highest losses.

    Returns:
        ``[N]`` float64, non-negative, with sum 1.

    Example:
        >>> difficulty(torch.tensor([2.091, 2.080, 2.211, 2.152, 2.089]), 0.05).numpy().round(3).tolist()
        [0.058, 0.047, 0.642, 0.197, 0.056]
    """
    return torch.softmax(losses.double() / temperature, dim=0)


def heating_exponent(round_index: int, beta: float) -> float:
    """METHOD (3): ``e(t) = (t + 1) / beta``.

    Example:
        >>> heating_exponent(round_index=4, beta=5.0)
        1.0
    """
    return (round_index + 1) / beta


def released_exponent(round_index: int, beta: float) -> float:
    """Exponent ``t + 1 / beta`` of the released code, which has a misplaced bracket (METHOD section 3).

    Example:
        >>> released_exponent(round_index=4, beta=5.0)
        4.2
    """
    return round_index + 1 / beta


def learning_speed(difficulties: Tensor, alpha: float, exponent: float) -> Tensor:
    """METHOD (3): ``tanh(alpha / p ** exponent)``, the weight of the other clients' adapters for each client.

    If ``p ** exponent`` underflows, the quotient is infinite and the result is the limit 1. With ``alpha = 0`` the
    result is 0 for all clients.

    Args:
        difficulties: ``[N]`` difficulties ``p`` of METHOD (2), in [0, 1].
        alpha: At least 0.
        exponent: Positive; see `heating_exponent`.

    Returns:
        ``[N]`` float64 in [0, 1].

    Example:
        >>> learning_speed(torch.tensor([0.2, 0.6, 0.0]), alpha=0.7, exponent=0.2).numpy().round(3).tolist()
        [0.747, 0.65, 1.0]
    """
    if alpha == 0:  # 0 / 0 below, where p underflows
        return torch.zeros_like(difficulties, dtype=torch.float64)
    return torch.tanh(alpha / difficulties.double() ** exponent)


def mixing_matrix(similarities: Tensor, speed: Tensor) -> Tensor:
    """METHOD (4): own weight 1, weight ``speed[c] * similarity[c, n]`` for the others, rows normalised to sum 1.

    Args:
        similarities: ``[N, N]`` similarities of METHOD (1).
        speed: ``[N]`` learning speeds of METHOD (3).

    Returns:
        ``[N, N]`` float64, receiver by sender; each row sums to 1.

    Example:
        >>> mixing_matrix(torch.ones(2, 2), torch.tensor([0.0, 1.0]))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    weights = (speed.double()[:, None] * similarities.double()).fill_diagonal_(1)
    return weights / weights.sum(dim=1, keepdim=True)


def sequential_matrix(matrix: Tensor) -> Tensor:
    """Mixing matrix that is equivalent to in-place mixing with ``matrix``, client after client (released code).

    In place, client ``c`` reads the already mixed adapters of the clients before it. With ``matrix = L + R``, ``L``
    strictly lower triangular, the result is ``M = L M + R``, hence ``M = (I - L)^-1 R``. Rows of ``M`` sum to 1.

    Args:
        matrix: ``[N, N]`` mixing matrix.

    Returns:
        ``[N, N]`` float64.

    Example:
        >>> sequential_matrix(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
        tensor([[0.5000, 0.5000],
                [0.2500, 0.7500]], dtype=torch.float64)
    """
    wide = matrix.double()
    earlier = wide.tril(-1)
    identity = torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    return torch.linalg.solve_triangular(identity - earlier, wide - earlier, upper=False, unitriangular=True)


class Mixture(LazyStack):
    """METHOD (4): ``adapter[c] = sum over n of matrix[c, n] * adapter[n]``, one matrix product per parameter.

    With ``start``, updates are mixed instead: ``start[c] + sum over n of matrix[c, n] * (adapter[n] - start[n])``.
    Computed in float64: in float32, adapters that are already equal would change, and results would depend on the order
    of clients. Values are computed block by block when they are read, so that the result need not be in memory beside
    its inputs.

    Args:
        matrix: ``[N, N]`` mixing matrix, receiver by sender.
        stack: Adapters after local training, name → ``[N, *shape]``. Do not change them before the mixture is read.
        start: Adapters before local training, same names and shapes; ``None`` mixes adapters.

    Example:
        >>> start, end = {"a": torch.tensor([[0.0], [10.0]])}, {"a": torch.tensor([[2.0], [14.0]])}
        >>> matrix = torch.full((2, 2), 0.5)
        >>> Mixture(matrix, end)["a"].tolist(), Mixture(matrix, end, start)["a"].tolist()
        ([[8.0], [8.0]], [[3.0], [13.0]])
    """

    def __init__(self, matrix: Tensor, stack: AdapterStack, start: AdapterStack | None = None) -> None:
        self._source, self._start = as_lazy(stack), None if start is None else as_lazy(start)
        super().__init__(self._source.shapes, self._source.num_rows)
        self._matrix = matrix

    @torch.no_grad()
    def block(self, name: str, columns: slice) -> Tensor:
        """``[N, columns]`` in the dtype and on the device of ``stack``."""
        block = self._source.block(name, columns)
        matrix, values = _widen(self._matrix.to(block.device)), _widen(block)
        if self._start is None:
            return (matrix @ values).to(block.dtype)
        start = _widen(self._start.block(name, columns).to(block.device))
        return (start + matrix @ (values - start)).to(block.dtype)


class MixtureOfGroups(LazyStack):
    """A `Mixture` in which every parameter is mixed by the matrix of its group; those without one are left out.

    Args:
        matrices: Group → ``[N, N]`` mixing matrix.
        group_of: Gives the group of a parameter.
        stack: Adapters, name → ``[N, *shape]``; as for a `Mixture`.

    Example:
        >>> swap, keep = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(2)
        >>> stack = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0], [4.0]]), "c": torch.zeros(2, 1)}
        >>> {k: v.flatten().tolist() for k, v in MixtureOfGroups({"a": swap, "b": keep}, str, stack).items()}
        {'a': [2.0, 1.0], 'b': [3.0, 4.0]}
    """

    def __init__(self, matrices: Mapping[str, Tensor], group_of: Callable[[str], str], stack: AdapterStack) -> None:
        source = as_lazy(stack)
        shapes = {name: shape for name, shape in source.shapes.items() if group_of(name) in matrices}
        super().__init__(shapes, source.num_rows)
        mixtures = {group: Mixture(matrix, stack) for group, matrix in matrices.items()}
        self._mixture_of = {name: mixtures[group_of(name)] for name in shapes}

    def block(self, name: str, columns: slice) -> Tensor:
        """As in a `Mixture`."""
        return self._mixture_of[name].block(name, columns)


def _for_products(values: Tensor) -> Tensor:
    """At least float32 on the CPU; elsewhere wider, because products of float32 may be in TF32."""
    if values.device.type != "cpu":
        return _widen(values)
    return values if values.dtype == torch.float64 else values.float()


def _widen(values: Tensor) -> Tensor:
    """Cast to float64, or to float32 on MPS, which does not support float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
