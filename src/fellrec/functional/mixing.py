"""Equations (1)-(4) of METHOD: from the updates of a round to the mixing matrix ``W[receiver, sender]``, and mixing.

Everything that is square or per client is float64 and small. Adapters are read in blocks of columns, so that neither
their concatenation nor a float64 copy of them ever exists; with a ``LazyStack`` they themselves need not be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fellrec.functional.stacks import AdapterStack, LazyStack, as_lazy


@torch.no_grad()
def gram_matrix(stack: AdapterStack, start: AdapterStack | None = None) -> Tensor:
    """Inner products between the clients' adapters, or between their updates, over all parameters.

    Args:
        stack: Adapters, name → ``[N, *shape]``.
        start: Adapters before local training, same names and shapes; if given, the inner products are those of the
            updates ``stack - start``.

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
            rows = _widen(block)
            if origin is not None:
                rows = rows - _widen(origin.block(name, columns))
            gram += (rows @ rows.T).to("cpu", torch.float64)
    return gram


def cosine(gram: Tensor) -> Tensor:
    """Cosines between vectors that are given by their inner products.

    A zero vector has no direction: its cosine with every other vector is defined as 0, so it is neither alike nor
    opposed to them.

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
    """METHOD (1): ``(1 + cosine) / 2`` between vectors that are given by their inner products.

    A zero vector (a client that did not move) has similarity 1/2 with every other one.

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
        temperature: Positive; the smaller, the more of the difficulty falls to the client with the highest loss.

    Returns:
        ``[N]`` float64, positive or zero, sum 1.

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
    """The released code's exponent ``t + 1 / beta`` (a misplaced bracket, METHOD section 3).

    Example:
        >>> released_exponent(round_index=4, beta=5.0)
        4.2
    """
    return round_index + 1 / beta


def learning_speed(difficulties: Tensor, alpha: float, exponent: float) -> Tensor:
    """METHOD (3): ``tanh(alpha / p ** exponent)``, how much each client listens to the others.

    Where ``p ** exponent`` underflows, the quotient is infinite and the speed is its limit 1. With ``alpha = 0`` no
    client listens at all.

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
    """METHOD (4): own weight 1, ``speed[c] * similarity[c, n]`` for the others, rows divided by their sums.

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
    """The matrix that does at once what mixing in place, client after client, does with ``matrix`` (released code).

    In place, client ``c`` reads the already mixed adapters of the clients before it: with ``matrix = L + R``, ``L``
    strictly lower, the result ``M`` obeys ``M = L M + R``, hence ``M = (I - L)^-1 R``. Rows of ``M`` still sum to 1.

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

    Computed in float64: reduced-precision products (TF32) would shift adapters that are already equal. What is mixed
    is made when it is read, block by block, so that it need not exist beside what it is made of.

    Args:
        matrix: ``[N, N]`` mixing matrix, receiver by sender.
        stack: Adapters, name → ``[N, *shape]``; not changed, and not to be changed before the mixture was read.
    """

    def __init__(self, matrix: Tensor, stack: AdapterStack) -> None:
        self._source = as_lazy(stack)
        super().__init__(self._source.shapes, self._source.num_rows)
        self._matrix = matrix

    @torch.no_grad()
    def block(self, name: str, columns: slice) -> Tensor:
        """``[N, columns]`` in the type and on the device of the senders' tensors."""
        block = self._source.block(name, columns)
        return (_widen(self._matrix.to(block.device)) @ _widen(block)).to(block.dtype)


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


class MovedAdapters(LazyStack):
    """``adapter[c] = start[c] + sum over n of matrix[c, n] * (end[n] - start[n])``: updates are mixed, not adapters.

    Made when it is read, in float64, like a `Mixture`.

    Args:
        matrix: ``[N, N]``, receiver by sender.
        start: Adapters that the clients started the round with, name → ``[N, *shape]``.
        end: Adapters after local training, same names and shapes. Neither is changed, nor to be changed before what is
            made of them was read.

    Example:
        >>> start, end = {"a": torch.tensor([[0.0], [10.0]])}, {"a": torch.tensor([[2.0], [14.0]])}
        >>> MovedAdapters(torch.full((2, 2), 0.5), start, end)["a"]
        tensor([[ 3.],
                [13.]])
    """

    def __init__(self, matrix: Tensor, start: AdapterStack, end: AdapterStack) -> None:
        self._start, self._end = as_lazy(start), as_lazy(end)
        super().__init__(self._end.shapes, self._end.num_rows)
        self._matrix = matrix

    @torch.no_grad()
    def block(self, name: str, columns: slice) -> Tensor:
        """``[N, columns]`` in the type and on the device of the senders' tensors."""
        end = self._end.block(name, columns)
        start = _widen(self._start.block(name, columns).to(end.device))
        moved = start + _widen(self._matrix.to(end.device)) @ (_widen(end) - start)
        return moved.to(end.dtype)


@torch.no_grad()
def mix(matrix: Tensor, stack: AdapterStack) -> dict[str, Tensor]:
    """All of a `Mixture` at once.

    Args:
        matrix: ``[N, N]`` mixing matrix, receiver by sender.
        stack: Adapters, name → ``[N, *shape]``; not changed.

    Returns:
        New adapters, name → ``[N, *shape]``, each in the type and on the device it came in.

    Example:
        >>> mix(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), {"a": torch.tensor([[2.0], [4.0]])})
        {'a': tensor([[2.],
                [3.]])}
    """
    return dict(Mixture(matrix, stack))


def _widen(values: Tensor) -> Tensor:
    """To float64, or to float32 on Apple's GPUs, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
