"""FedAMP (Huang et al., AAAI 2021): each client is pulled towards the models that are similar to its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.fedprox import squared_distance
from fellrec.aggregation.settings.personalised import FedAMPSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.functional.attention import message_passing
from fellrec.functional.mixing import Mixture, gram_matrix

CLOUD = "cloud"
"""Name of a client's mixture u_k among its tensors."""


@dataclass(frozen=True)
class NearCloud(LocalTerm):
    """The loss ``strength / 2 * ‖v − u‖²``, u the mixture that the client received; none before it has received one."""

    strength: float

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor | None:
        """See ``LocalTerm``."""
        if not self.strength or not parameters or CLOUD not in context.tensors:
            return None
        return self.strength / 2 * squared_distance(parameters, context.tensors[CLOUD])


class FedAMP(AggregationCallback, FedAMPSettings):
    """Clients keep the models that they trained and get a mixture ``u_k = Σ ξ_kj w_j``, which pulls the next training.

    With ``d_kj = ‖w_k − w_j‖²``: ``ξ_kj = attention / (N − 1) · exp(−d_kj / σ)`` for j ≠ k, and ξ_kk is the rest of 1.
    That is the paper's ``α_K A'(d)`` with ``A(d) = 1 − exp(−d / σ)`` and ``α_K = attention · σ / (N − 1)``; with
    attention 1 that is the largest step size for which no weight can become negative.
    """

    keeps_trained = True

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        self.local_terms = [NearCloud(self.mu)]

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The mixtures as tensors of the clients, and their matrix."""
        matrix = message_passing(gram_matrix(updates.end), self.attention, self.sigma)
        result = self.combine(updates, matrix, adapters={})
        return replace(result, tensors={CLOUD: Mixture(matrix, updates.end)})
