"""FLTrust (Cao et al., NDSS 2021): updates count as far as they point where the server's own does."""

from __future__ import annotations

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.robust import FLTrustSettings
from fellrec.errors import TrainingError
from fellrec.federated.populations import SharedAndRoot
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.mixing import gram_matrix
from fellrec.functional.robust import trust_weights
from fellrec.functional.stacks import Appended, Differences, first_row


class FLTrust(AggregationCallback, FLTrustSettings):
    """``w ← w + Σ T_k (‖Δ_0‖ / ‖Δ_k‖) Δ_k / Σ T_k`` with ``T_k = max(0, cos(Δ_k, Δ_0))``.

    ``Δ_0`` is the update of the server's own training on the public users, the root set. All ``T_k = 0``: w stays.
    """

    population = SharedAndRoot

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model; ``trust`` is T, the clients' scores.

        Raises:
            TrainingError: If the server has not trained.
        """
        if not updates.root:
            raise TrainingError(f"aggregation {self.name} needs what the server trained on the public users")
        updates.check_common_start(self.name)
        start = first_row(updates.start)
        root = {name: updates.root[name].double() - start[name].double() for name in updates.end}
        deltas = Appended(Differences(updates.end, updates.start), [root])
        trust, weights = trust_weights(gram_matrix(deltas))
        return self.move(updates, weights, {"trust": trust})
