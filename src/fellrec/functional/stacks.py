"""Stacks of several clients' adapters, which are read by parameter and in blocks of columns.

A stack need not be in memory.

Shape letters: N clients, P entries of one parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

AdapterStack = Mapping[str, Tensor]
"""Several clients' adapters: parameter name → ``[clients, *shape]``."""

BLOCK_BYTES = 32 << 20
"""Maximum size of a block of columns of all clients in float64."""


class LazyStack(Mapping[str, Tensor]):
    """A mapping from parameter names to tensors ``[N, *shape]``, which are computed or read on access.

    Args:
        shapes: Parameter name → shape of one client's tensor.
        num_rows: N.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], num_rows: int) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.num_rows = num_rows

    @abstractmethod
    def block(self, name: str, columns: slice) -> Tensor:
        """``[N, columns]`` of the parameter's ``[N, P]``, possibly a view."""

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield the parameter's columns in blocks of at most ``BLOCK_BYTES``, with their slices."""
        for columns in column_blocks(self.num_rows, self.shapes[name].numel()):
            yield columns, self.block(name, columns)

    def __getitem__(self, name: str) -> Tensor:
        """The whole parameter of all clients, ``[N, *shape]``; a copy."""
        parts = [block for _, block in self.blocks(name)]
        shape = (self.num_rows, *self.shapes[name])
        return torch.cat(parts, dim=1).reshape(shape) if parts else torch.empty(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Renamed(LazyStack):
    """A stack whose parameters have other names.

    Args:
        stack: With the old names.
        new_name: Gives the new name of each.

    Example:
        >>> list(Renamed(as_lazy({"a": torch.zeros(2, 1)}), str.upper))
        ['A']
    """

    def __init__(self, stack: LazyStack, new_name: Callable[[str], str]) -> None:
        self._stack, self._old = stack, {new_name(name): name for name in stack.shapes}
        super().__init__({name: stack.shapes[old] for name, old in self._old.items()}, stack.num_rows)

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``."""
        return self._stack.block(self._old[name], columns)


class RowStack(LazyStack):
    """A stack of separately stored adapters, in memory or in memory-mapped files.

    Args:
        shapes: Parameter name → shape of one client's tensor.
        open_rows: One function per client that returns its tensors by name; called once, at the first access.

    Example:
        >>> stack = RowStack({"a": (2,)}, [lambda: {"a": torch.zeros(2)}, lambda: {"a": torch.ones(2)}])
        >>> stack["a"]
        tensor([[0., 0.],
                [1., 1.]])
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], open_rows: Sequence[Callable[[], Mapping[str, Tensor]]]
    ) -> None:
        super().__init__(shapes, len(open_rows))
        self._open_rows = open_rows
        self._rows: list[Mapping[str, Tensor]] | None = None
        self._are_same = False

    def block(self, name: str, columns: slice) -> Tensor:
        """A copy of these columns; where all clients have the same adapter, a view."""
        if self._rows is None:
            self._rows = [open_row() for open_row in self._open_rows]
            self._are_same = all(row is self._rows[0] for row in self._rows)
        if self._are_same:
            return self._rows[0][name].reshape(1, -1)[:, columns].expand(self.num_rows, -1)
        return torch.stack([row[name].reshape(-1)[columns] for row in self._rows])


class _Whole(LazyStack):
    """A stack of tensors ``[N, *shape]`` in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(
            {name: tensor.shape[1:] for name, tensor in tensors.items()}, len(next(iter(tensors.values()), ()))
        )
        self._tensors = tensors

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``; a view."""
        tensor = self._tensors[name]
        return tensor.reshape(len(tensor), -1)[:, columns]


class Repeated(LazyStack):
    """The same tensors for every client; not copied.

    Args:
        tensors: Name → tensor of one client.
        num_rows: N.

    Example:
        >>> Repeated({"a": torch.tensor([1.0, 2.0])}, 2)["a"]
        tensor([[1., 2.],
                [1., 2.]])
    """

    def __init__(self, tensors: Mapping[str, Tensor], num_rows: int) -> None:
        super().__init__({name: tensor.shape for name, tensor in tensors.items()}, num_rows)
        self.tensors = tensors

    def block(self, name: str, columns: slice) -> Tensor:
        """A view of these columns."""
        return self.tensors[name].reshape(1, -1)[:, columns].expand(self.num_rows, -1)


class Differences(LazyStack):
    """The clients' updates, in float64.

    Args:
        end: Adapters after local training, name → ``[N, *shape]``.
        start: Adapters before, same names and shapes.

    Example:
        >>> Differences({"a": torch.tensor([[3.0]])}, {"a": torch.tensor([[1.0]])})["a"]
        tensor([[2.]], dtype=torch.float64)
    """

    def __init__(self, end: AdapterStack, start: AdapterStack) -> None:
        self._end, self._start = as_lazy(end), as_lazy(start)
        super().__init__(self._end.shapes, self._end.num_rows)

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``; on the CPU."""
        return self._end.block(name, columns).cpu().double() - self._start.block(name, columns).cpu().double()


class Combinations(LazyStack):
    """Linear combinations of the rows of a stack, in float64.

    Args:
        matrix: ``[R, N]``; row r of the result takes ``matrix[r, n]`` of row n.
        stack: Name → ``[N, *shape]``.

    Example:
        >>> Combinations(torch.tensor([[1.0, 2.0]]), {"a": torch.tensor([[3.0], [4.0]])})["a"]
        tensor([[11.]], dtype=torch.float64)
    """

    def __init__(self, matrix: Tensor, stack: AdapterStack) -> None:
        self._matrix, self._source = matrix.double(), as_lazy(stack)
        super().__init__(self._source.shapes, len(matrix))

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``; on the CPU."""
        return self._matrix @ self._source.block(name, columns).cpu().double()


class Appended(LazyStack):
    """Rows below those of a stack, in float64.

    Args:
        stack: Name → ``[N, *shape]``.
        rows: Further rows by name; what they do not have is 0 in them, what the stack does not have is left out.

    Example:
        >>> Appended({"a": torch.ones(1, 2)}, [{"a": torch.zeros(2)}, {}]).num_rows
        3
    """

    def __init__(self, stack: AdapterStack, rows: Sequence[Mapping[str, Tensor]]) -> None:
        self._above, self._rows = as_lazy(stack), rows
        super().__init__(self._above.shapes, self._above.num_rows + len(rows))

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``; on the CPU."""
        above = self._above.block(name, columns).cpu().double()
        missing = torch.zeros(above.shape[1], dtype=torch.float64)
        rows = [row[name].reshape(-1)[columns].cpu().double() if name in row else missing for row in self._rows]
        return torch.cat([above, *(row[None] for row in rows)])


def squared_norms(stack: AdapterStack) -> dict[str, Tensor]:
    """Each client's sum of squares of each parameter, name → ``[N]`` float64.

    Example:
        >>> squared_norms({"a": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
        {'a': tensor([25.,  1.], dtype=torch.float64)}
    """
    lazy = as_lazy(stack)
    found = {name: torch.zeros(lazy.num_rows, dtype=torch.float64) for name in lazy}
    for name in found:
        for _, block in lazy.blocks(name):
            found[name] += block.cpu().double().square().sum(dim=1)
    return found


def first_row(stack: AdapterStack) -> dict[str, Tensor]:
    """The tensors that all clients of a stack have in common.

    Raises:
        ValueError: With the name of a parameter in which they differ.

    Example:
        >>> first_row({"a": torch.ones(3, 2)})
        {'a': tensor([1., 1.])}
    """
    lazy = as_lazy(stack)
    if isinstance(lazy, Repeated):
        return dict(lazy.tensors)
    found = {}
    for name in lazy:
        parts = []
        for _, block in lazy.blocks(name):
            if not bool((block == block[:1]).all()):
                raise ValueError(name)
            parts.append(block[0])
        found[name] = torch.cat(parts).reshape(lazy.shapes[name]) if parts else torch.empty(lazy.shapes[name])
    return found


def as_lazy(stack: Mapping[str, Tensor]) -> LazyStack:
    """Wrap a stack so that it can be read in blocks.

    Example:
        >>> [block.tolist() for _, block in as_lazy({"a": torch.eye(2)}).blocks("a")]
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    return stack if isinstance(stack, LazyStack) else _Whole(stack)


def column_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of columns whose ``num_rows`` rows need at most ``BLOCK_BYTES`` in float64; at least one column each.

    Example:
        >>> [block.stop for block in column_blocks(num_rows=BLOCK_BYTES // 8, num_columns=3)]
        [1, 2, 3]
    """
    width = max(1, BLOCK_BYTES // (8 * max(1, num_rows)))
    return (slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width))
