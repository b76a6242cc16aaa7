"""FedRep (Collins et al., ICML 2021): in each round first the personal part is trained, then the shared one."""

from __future__ import annotations

from dataclasses import dataclass

from fellrec.aggregation.fedper import PartlyPersonal
from fellrec.aggregation.settings.personalised import FedRepSettings
from fellrec.federated.terms import LocalTerm, TermContext


@dataclass(frozen=True)
class Phases(LocalTerm):
    """Trains the personal part in the first steps of a round, and the shared part in the others.

    Each part has at least one step; a round of one step trains both.
    """

    rule: PartlyPersonal
    personal_share: float

    def trains(self, name: str, context: TermContext) -> bool:
        """See ``LocalTerm``."""
        if context.total_steps < 2:
            return True
        num_personal = round(self.personal_share * context.total_steps)
        is_personal_phase = context.num_steps < min(max(num_personal, 1), context.total_steps - 1)
        return self.rule.is_personal(name) == is_personal_phase


class FedRep(PartlyPersonal, FedRepSettings):
    """FedAvg of the shared part, which clients train after their personal part."""

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        self.local_terms = [Phases(self, self.personal_share)]
