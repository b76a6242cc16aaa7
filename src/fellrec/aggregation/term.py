"""TERM (Li et al., ICLR 2021)."""

from __future__ import annotations

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.fairness import TERMSettings
from fellrec.federated.records import Updates
from fellrec.functional.fairness import tilted_weights


class TERM(AggregationCallback, TERMSettings):
    """The mean of the clients' adapters with weights in proportion to ``p_k exp(t F_k)``."""

    needs_start_loss = True

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """These weights, ``[N]``."""
        shares = self.client_weights(updates, self.weights)
        return tilted_weights(self.received_losses(updates), shares, self.tilt)
