"""Sampled candidates for metrics that are comparable with papers that rank among sampled items.

Sampled metrics may order models differently from full ranking (Krichene, Rendle 2020). They have separate names
(`sampled_name`) and are not used for selection or tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fellrec.functional.rng import derive_seed, scramble


def sampled_name(metric: str, num_candidates: int) -> str:
    """Name of a metric that is computed among sampled candidates.

    Example:
        >>> sampled_name("ndcg_at_10", 100)
        'sampled_100_ndcg_at_10'
    """
    return f"sampled_{num_candidates}_{metric}"


@dataclass(frozen=True)
class SampledCandidates:
    """Items that a user's targets are ranked among, drawn uniformly without replacement.

    They depend only on the seed, the user and the user's masked items. So all models and rules of a comparison are
    evaluated with the same candidates, independent of batches and processes.

    Attributes:
        num: Number of items drawn per user, beside the targets; all allowed items if there are fewer.
        seed: Seed of the run.
    """

    num: int
    seed: int

    def draw(self, users: Tensor, allowed: Tensor) -> Tensor:
        """Draw candidates for a batch of users.

        Args:
            users: ``[B]`` int64 user indices.
            allowed: ``[B, I]`` bool, items that may be drawn: neither masked nor a target.

        Returns:
            ``[B, I]`` bool, true for the drawn items.
        """
        num_items = allowed.shape[1]
        of_items: NDArray[np.uint64] = np.arange(num_items).astype(np.uint64)
        of_users = scramble(users.cpu().numpy().astype(np.uint64) ^ np.uint64(derive_seed(self.seed, "candidates")))
        keys = scramble(of_users[:, None] + of_items)
        order = torch.from_numpy((keys >> np.uint64(1)).astype(np.int64)).to(allowed.device)
        order = order.masked_fill(~allowed, torch.iinfo(torch.int64).max)
        first = order.topk(min(self.num, num_items), dim=1, largest=False).indices
        return torch.zeros_like(allowed).scatter_(1, first, True) & allowed
