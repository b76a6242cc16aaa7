"""Cross-entropy over a large catalogue: exact in chunks of items, or estimated from sampled items.

Shape letters: T targets, I items, D hidden size, S sampled items. All functions return the sum over targets of the
negative log-likelihood of a softmax over the logits ``query_TD @ items_ID.T``. Under autocast the matrix products use
its dtype, like those of the full softmax; logarithms, exponentials and sums over items are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def chunked_cross_entropy(query_TD: Tensor, items_ID: Tensor, targets_T: Tensor, chunk_items: int) -> Tensor:
    """Cross-entropy over all items, with the value and gradients of the full softmax up to rounding.

    The logits are computed for ``chunk_items`` items at a time and recomputed in the backward pass, so that at most
    ``[T, chunk_items]`` of them are in memory.

    Args:
        query_TD: ``[T, D]``, divided by the temperature.
        items_ID: ``[I, D]``.
        targets_T: ``[T]`` int64 in ``[0, I)``.
        chunk_items: Items per chunk, at least 1.

    Example:
        >>> query, items, targets = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.arange(2)
        >>> full = torch.nn.functional.cross_entropy(query @ items.T, targets, reduction="sum")
        >>> torch.allclose(chunked_cross_entropy(query, items, targets, chunk_items=2), full)
        True
    """
    return _ChunkedCrossEntropy.apply(query_TD, items_ID, targets_T, chunk_items)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Online softmax: the log-sum-exp is accumulated over chunks (Milakov, Gimelshein 2018)."""

    @staticmethod
    def forward(ctx: Any, query_TD: Tensor, items_ID: Tensor, targets_T: Tensor, chunk_items: int) -> Tensor:
        """The sum of the losses; the logits are not kept."""
        dtype = _product_dtype(query_TD.device.type)
        query = query_TD.to(dtype)
        logsumexp_T = query_TD.new_full((len(query),), float("-inf"), dtype=torch.float32)
        of_target_T = logsumexp_T
        for start, chunk in _chunks(items_ID, chunk_items, dtype):
            logits_TC = (query @ chunk.T).float()
            logsumexp_T = torch.logaddexp(logsumexp_T, logits_TC.logsumexp(dim=1))
            # The target's logit from the same product as in the sum: different rounding could make the loss negative.
            position_T1 = (targets_T - start)[:, None]
            found_T1 = logits_TC.gather(1, position_T1.clamp(0, len(chunk) - 1))
            inside_T1 = (position_T1 >= 0) & (position_T1 < len(chunk))
            of_target_T = torch.where(inside_T1, found_T1, of_target_T[:, None])[:, 0]
        ctx.save_for_backward(query_TD, items_ID, targets_T, logsumexp_T)
        ctx.chunk_items, ctx.dtype = chunk_items, dtype
        return (logsumexp_T - of_target_T).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of queries ``[T, D]`` and items ``[I, D]``; the logits of each chunk are computed again."""
        query_TD, items_ID, targets_T, logsumexp_T = ctx.saved_tensors
        wants_query, wants_items, *_ = ctx.needs_input_grad
        query = query_TD.to(ctx.dtype)
        of_query = torch.zeros_like(query_TD, dtype=torch.float32) if wants_query else None
        of_items = torch.empty_like(items_ID) if wants_items else None
        for start, chunk in _chunks(items_ID, ctx.chunk_items, ctx.dtype):
            number = torch.arange(start, start + len(chunk), device=targets_T.device)
            error = (query @ chunk.T).float().sub_(logsumexp_T[:, None]).exp_()
            error = error.sub_((targets_T[:, None] == number).to(error.dtype)).mul_(gradient).to(ctx.dtype)
            if of_query is not None:
                of_query += error @ chunk
            if of_items is not None:
                of_items[start : start + len(chunk)] = error.T @ query
        return None if of_query is None else of_query.to(query_TD.dtype), of_items, None, None


def _product_dtype(device: str) -> torch.dtype:
    """Dtype of matrix products under autocast; float32 without autocast and on ``meta``, which does not support it."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.float32


def _chunks(items_ID: Tensor, chunk_items: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the start and the items of each chunk."""
    for start in range(0, len(items_ID), chunk_items):
        yield start, items_ID[start : start + chunk_items].to(dtype)


def sampled_cross_entropy(
    query_TD: Tensor, items_ID: Tensor, targets_T: Tensor, sampled_S: Tensor, expected_I: Tensor
) -> Tensor:
    """Sampled softmax: the denominator is estimated from sampled items with the logQ correction.

    The target is always in the sum and is not corrected. The logit of a sampled item is reduced by the logarithm of its
    expected number of occurrences in the sample (Bengio, Senécal 2008; Yi et al. 2019). Sampled items that equal the
    target are excluded. The estimate of the denominator is unbiased for every proposal distribution.

    Args:
        query_TD: ``[T, D]``, divided by the temperature.
        items_ID: ``[I, D]``.
        targets_T: ``[T]`` int64 in ``[0, I)``.
        sampled_S: ``[S]`` int64, drawn with replacement, the same for all targets.
        expected_I: ``[I]`` float, above 0, expected occurrences of each item in the sample: S times its probability.

    Example:
        A sample in which each item occurs as often as expected gives the full softmax.

        >>> query, items, targets = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.arange(2)
        >>> full = torch.nn.functional.cross_entropy(query @ items.T, targets, reduction="sum")
        >>> sampled, expected = torch.tensor([1, 0, 2, 0]), torch.tensor([2.0, 1.0, 1.0])
        >>> torch.allclose(sampled_cross_entropy(query, items, targets, sampled, expected), full)
        True
    """
    query, items = query_TD.float(), items_ID.float()
    # F.embedding instead of indexing, whose backward pass is not deterministic.
    of_target_T1 = (query * F.embedding(targets_T, items)).sum(dim=1, keepdim=True)
    logits_TS = (query @ F.embedding(sampled_S, items).T).float() - expected_I[sampled_S].log().float()
    logits_TS = logits_TS.masked_fill(targets_T[:, None] == sampled_S, float("-inf"))
    return (torch.cat([of_target_T1, logits_TS], dim=1).logsumexp(dim=1) - of_target_T1[:, 0]).sum()


def draw_items(cumulative_I: Tensor, num_items: int) -> Tensor:
    """Draw items with replacement from PyTorch's global CPU generator.

    Args:
        cumulative_I: ``[I]`` float64 on the CPU, cumulative probabilities up to 1.
        num_items: Number of items to draw.

    Returns:
        ``[num_items]`` int64.

    Example:
        >>> draw_items(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), 3).tolist()
        [1, 1, 1]
    """
    uniform = torch.rand(num_items, dtype=torch.float64, device="cpu")
    return torch.searchsorted(cumulative_I, uniform, right=True).clamp(max=len(cumulative_I) - 1)
