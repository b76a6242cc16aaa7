"""q-FedAvg (Li et al., ICLR 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.fairness import QFedAvgSettings
from fellrec.federated.records import Updates
from fellrec.functional.fairness import q_fair_weights
from fellrec.functional.stacks import Differences, squared_norms


class QFedAvg(AggregationCallback, QFedAvgSettings):
    """A step on ``Σ F_k^{q+1} / (q + 1)``, whose length comes from the losses and the updates.

    F_k is the loss on the client's training data at the received adapter, as in the authors' code. All losses 0: every
    client counts alike, and the step is all but 0 unless the updates are.
    """

    needs_start_loss = True

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """``F_k^q / Σ F_j^q (1 + q L ‖Δ_j‖² / F_j)``, ``[N]``."""
        squares = sum(
            squared_norms(Differences(updates.end, updates.start)).values(), torch.zeros(len(updates.clients))
        )
        return q_fair_weights(self.received_losses(updates), squares, self.q, self.lipschitz)
