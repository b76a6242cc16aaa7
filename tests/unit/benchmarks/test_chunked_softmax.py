"""The benchmark of the softmax over chunks runs, and shows that chunks bound the memory."""

from __future__ import annotations

import chunked_softmax


def test_chunks_and_samples_bound_the_memory() -> None:
    """With 320 targets and 15,000 items, all logits are 19 MB, and their gradient as much again."""
    costs = chunked_softmax.compare(num_items=15_000, num_rows=32)
    assert list(costs) == list(chunked_softmax.CASES)
    full, chunked, sampled, _ = (cost.peak_bytes for cost in costs.values())
    assert full - chunked > 19_200_000
    assert full - sampled > 19_200_000
    assert min(cost.seconds for cost in costs.values()) > 0
