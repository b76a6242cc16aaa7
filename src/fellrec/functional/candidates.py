"""Ranking among a sample of candidates, as much of the literature does; never a substitute for full ranking.

Sampled metrics need not order models as full ranking does (Krichene, Rendle 2020), so they have names of their own,
`sampled_name`, and neither selection nor tables use them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fellrec.functional.rng import derive_seed, scramble


def sampled_name(metric: str, num_candidates: int) -> str:
    """What a metric is called if targets stand among a sample.

    Example:
        >>> sampled_name("ndcg_at_10", 100)
        'sampled_100_ndcg_at_10'
    """
    return f"sampled_{num_candidates}_{metric}"


@dataclass(frozen=True)
class SampledCandidates:
    """The items that a user's targets are ranked among, drawn uniformly without replacement.

    They depend on the seed, the user and what is masked for the user, so that every model and rule of a comparison is
    ranked among the same, in whatever batch or process.

    Attributes:
        num: Items drawn for each user beside the targets; all there are, if there are fewer.
        seed: Of the run.
    """

    num: int
    seed: int

    def draw(self, users: Tensor, allowed: Tensor) -> Tensor:
        """Draw for a batch of users.

        Args:
            users: ``[B]`` int64 user indices.
            allowed: ``[B, I]`` bool: what may be drawn, neither masked nor a target.

        Returns:
            ``[B, I]`` bool, true for what was drawn.
        """
        num_items = allowed.shape[1]
        of_items: NDArray[np.uint64] = np.arange(num_items).astype(np.uint64)
        of_users = scramble(users.cpu().numpy().astype(np.uint64) ^ np.uint64(derive_seed(self.seed, "candidates")))
        keys = scramble(of_users[:, None] + of_items)
        order = torch.from_numpy((keys >> np.uint64(1)).astype(np.int64)).to(allowed.device)
        order = order.masked_fill(~allowed, torch.iinfo(torch.int64).max)
        first = order.topk(min(self.num, num_items), dim=1, largest=False).indices
        return torch.zeros_like(allowed).scatter_(1, first, True) & allowed
