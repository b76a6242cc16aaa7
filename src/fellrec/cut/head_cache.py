"""What a frozen head computes for the training histories: once, instead of in every epoch and round."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from fellrec.models.split import SplitModel

Batch = dict[str, Tensor]


class HeadCache:
    """Keeps the head's hidden states of training rows, packed without padding, in memory or in a file.

    A row is known by the number that the data module gives it (``row_ids``). Rows that do not fit any more are computed
    anew each time, and counted.

    Args:
        num_bytes: Upper bound on what is kept.
        file: Keep it in this file instead of in memory.

    Attributes:
        hits: Rows that were in the cache.
        misses: Rows that were not.
        taken: Those of ``hits`` that were taken from it; the others were in a batch with a miss, which is computed.
        compute_seconds: Time spent in the head.
        take_seconds: Time spent taking rows from the cache.
    """

    def __init__(self, num_bytes: int, file: Path | None = None) -> None:
        self.num_bytes = num_bytes
        self.file = file
        self.hits = 0
        self.misses = 0
        self.taken = 0
        self.compute_seconds = 0.0
        self.take_seconds = 0.0
        self._store: Tensor | None = None
        self._used = 0
        self._first = torch.empty(0, dtype=torch.long)  # of each row in the store, -1 if it is not there

    @property
    def used_bytes(self) -> int:
        """Bytes that are kept now."""
        return 0 if self._store is None else self._used * self._store.shape[1] * self._store.element_size()

    @property
    def figures(self) -> dict[str, float]:
        """What there was to compute, what was not computed, and what that took; all add up over time."""
        return {
            "rows": float(self.hits + self.misses),
            "taken_rows": float(self.taken),
            "compute_seconds": self.compute_seconds,
            "take_seconds": self.take_seconds,
        }

    @torch.no_grad()
    def heads(self, model: SplitModel, input_ids: Tensor, batch: Batch) -> Tensor:
        """The head's output ``[B, L, D]`` for token ids ``[B, L]``; zeros in the place of padding.

        Args:
            model: With the frozen head.
            input_ids: Right-padded.
            batch: Has ``row_ids [B]`` and ``lengths [B]``, the rows' numbers and tokens.
        """
        rows, lengths, num_tokens = batch["row_ids"].cpu(), batch["lengths"].cpu(), input_ids.shape[1]
        self._know_of(int(rows.max()) + 1)
        is_known = self._first[rows] >= 0
        self.hits += int(is_known.sum())
        self.misses += int((~is_known).sum())
        started = time.perf_counter()
        if bool(is_known.all()):
            gathered = self._gather(rows, lengths, num_tokens).to(input_ids.device)
            self.taken += len(rows)
            self.take_seconds += time.perf_counter() - started
            return gathered
        inside = torch.arange(num_tokens)[None, :] < lengths[:, None]
        computed = model.head(input_ids) * inside.to(input_ids.device)[:, :, None]
        self.compute_seconds += time.perf_counter() - started
        self._remember(rows[~is_known], lengths[~is_known], computed.cpu()[~is_known], inside[~is_known])
        return computed

    def _know_of(self, num_rows: int) -> None:
        if num_rows > len(self._first):
            more = torch.full((num_rows - len(self._first),), -1, dtype=torch.long)
            self._first = torch.cat([self._first, more])

    def _gather(self, rows: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
        assert self._store is not None
        column = torch.arange(num_tokens)[None, :]
        inside = column < lengths[:, None]
        place = torch.where(inside, self._first[rows][:, None] + column, 0)
        return self._store[place] * inside[:, :, None]

    def _remember(self, rows: Tensor, lengths: Tensor, hidden_BLD: Tensor, inside: Tensor) -> None:
        store = self._open(hidden_BLD)
        ends = self._used + lengths.cumsum(0)
        fits = ends <= len(store)  # rows come in order, so those that fit are the first ones
        if not bool(fits.any()):
            return
        num_fitting = int(fits.sum())
        end = int(ends[num_fitting - 1])
        store[self._used : end] = hidden_BLD[:num_fitting][inside[:num_fitting]]
        self._first[rows[:num_fitting]] = (ends - lengths)[:num_fitting]
        self._used = end

    def _open(self, like: Tensor) -> Tensor:
        if self._store is None:
            width = like.shape[-1]
            capacity = max(1, self.num_bytes // (width * like.element_size()))
            if self.file is None:
                self._store = torch.empty(capacity, width, dtype=like.dtype)  # memory is taken when it is written
            else:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                flat = torch.from_file(str(self.file), shared=True, size=capacity * width, dtype=like.dtype)
                self._store = flat.view(capacity, width)
        return self._store
