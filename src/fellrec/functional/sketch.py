"""Count sketches of updates: short vectors whose inner products approximate those of the updates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fellrec.functional.rng import derive_seed, scramble
from fellrec.functional.stacks import AdapterStack, as_lazy


@torch.no_grad()
def sketch_updates(end: AdapterStack, start: AdapterStack, num_buckets: int = 4096) -> Tensor:
    """Count sketch of each client's update ``end - start`` (Charikar, Chen, Farach-Colton 2002).

    Every entry of an update is added with a sign to one bucket; bucket and sign are a hash of its position. The sketch
    is linear. The inner product of two sketches is an unbiased estimate of that of the updates, with a standard
    deviation of at most ``sqrt(2 / num_buckets)`` times the product of their norms. The result does not depend on the
    block size or the machine.

    Args:
        end: Adapters after local training, name → ``[N, *shape]``.
        start: Adapters before local training, same names and shapes.
        num_buckets: Length of a sketch, a power of two.

    Returns:
        ``[N, num_buckets]`` float64 on the CPU.

    Example:
        >>> start, end = {"a": torch.zeros(2, 3)}, {"a": torch.tensor([[1.0, 2.0, 2.0], [2.0, 4.0, 4.0]])}
        >>> sketch = sketch_updates(end, start)
        >>> (sketch[1] == 2 * sketch[0]).all().item(), sketch[0].norm().item()
        (True, 3.0)
    """
    stack, origin = as_lazy(end), as_lazy(start)
    sketch = torch.zeros(stack.num_rows, num_buckets, dtype=torch.float64)
    for name in stack:
        for columns, block in stack.blocks(name):
            update = (block.double() - origin.block(name, columns).double()).cpu()
            bucket, sign = places(name, columns, num_buckets)
            sketch.index_add_(1, bucket, update * sign)
    return sketch


def places(name: str, columns: slice, num_buckets: int) -> tuple[Tensor, Tensor]:
    """Bucket and sign of entries of a parameter; everyone can compute them.

    Args:
        name: Of the parameter.
        columns: Its entries, from ``start`` to ``stop``.
        num_buckets: Length of a sketch.

    Returns:
        ``[n]`` int64 and ``[n]`` float64, -1 or 1.

    Example:
        >>> bucket, sign = places("a", slice(0, 3), 8)
        >>> bool((bucket < 8).all()), sign.abs().tolist()
        (True, [1.0, 1.0, 1.0])
    """
    first = np.uint64(derive_seed("sketch", name))
    hashed = scramble(scramble(np.arange(columns.start, columns.stop, dtype=np.uint64) + first))
    sign = torch.from_numpy((hashed & np.uint64(1)).astype(np.float64)) * 2 - 1
    return torch.from_numpy(((hashed >> np.uint64(1)) % np.uint64(num_buckets)).astype(np.int64)), sign
