"""Fed-SB (Singhal et al., 2025) and RAVAN (Raje et al., NeurIPS 2025): small matrices between frozen factors."""

from __future__ import annotations

from dataclasses import replace

import torch

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.mean import MeanRule
from fellrec.aggregation.settings.lora import FedSBSettings, RAVANSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.cores import CORES, SCALES, mean_of_scaled


class FedSB(MeanRule, FedSBSettings):
    """R is trained and averaged between a common A and B, so that ``Σ p_k B R_k A`` is the product of the mean of R.

    In the paper A and B are singular vectors of an averaged first gradient of the whole weight; here they are random.
    """


class RAVAN(AggregationCallback, RAVANSettings):
    """``H_i' = Σ p_k s_{k,i} H_{k,i}`` and ``s_i' = 1`` of every head; other parameters are averaged.

    The moments of s_i are forgotten, those of H_i stay: its direction is the same, and s_i is near 1. Clients send H_i
    and s_i, which are multiplied at the server; in the paper they send the products, one number less a head.
    """

    population = SharedModel

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Means of the products, and factors of 1."""
        weights = self.client_weights(updates, self.weights)
        adapter, resets = updates.weighted_sums(weights), []
        for scales in [name for name in adapter if name.endswith(f".{SCALES}")]:
            cores = f"{scales.removesuffix(SCALES)}{CORES}"
            adapter[cores] = mean_of_scaled(updates.end[cores].double(), updates.end[scales].double(), weights)
            adapter[scales] = torch.ones_like(adapter[scales])
            resets.append(scales)
        return replace(self.shared(updates, adapter), resets=tuple(resets))
