"""The rankers of a federation of data sets: users are ranked by that of their member, on its catalogue only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fellrec.data.prepared import Places
from fellrec.models.module import Ranker, ReportingRanker
from fellrec.models.split import SplitModel
from fellrec.rankers.reference import ReferenceRanker


class MembersRanker:
    """Passes every batch to the ranker of the member that its users are of; scores are those of its items.

    Args:
        rankers: One for each member, each built for its catalogue.
        places: Where the members are in the joined data.
    """

    def __init__(self, rankers: Sequence[Ranker], places: Places) -> None:
        self.rankers = tuple(rankers)
        self.places = places
        self._stale = set(range(len(rankers)))

    @classmethod
    def of(cls, rankers: Sequence[Ranker], places: Places) -> MembersRanker:
        """For rankers that report of users or have choices, one that does so too."""
        return (ReportingMembersRanker if isinstance(rankers[0], ReportingRanker) else cls)(rankers, places)

    def refresh(self, model: SplitModel) -> None:
        """Another adapter is in the model: each member's ranker prepares for it before its next scores, if any."""
        self._stale = set(range(len(self.rankers)))

    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Scores of the member's I items, ``[B, I]``, for histories ``[B, H]`` of its users."""
        member = self.places.of_batch(histories)
        ranker = self.rankers[member]
        if member in self._stale:
            ranker.refresh(model)
            self._stale.remove(member)
        self._last = ranker
        return ranker.scores(model, self.places.local(histories, member))


class ReportingMembersRanker(MembersRanker):
    """The same for rankers that report of each user; see ``ReportingRanker``."""

    def __init__(self, rankers: Sequence[ReportingRanker], places: Places) -> None:
        super().__init__(rankers, places)
        self.reported = rankers[0].reported
        self.choices = rankers[0].choices

    def take_report(self) -> Tensor:
        """What the ranker of the last users tells of them."""
        assert isinstance(self._last, ReportingRanker)
        return self._last.take_report()

    def figures(self, reported: Mapping[str, Tensor], choice: int) -> dict[str, float]:
        """Figures of one evaluation, over the users of all members."""
        first = self.rankers[0]
        assert isinstance(first, ReportingRanker)
        return first.figures(reported, choice)


class MembersReference:
    """A reference ranker that is fitted to each member by itself.

    Args:
        rankers: One for each member.
        places: Where the members are in the joined data.
    """

    def __init__(self, rankers: Sequence[ReferenceRanker], places: Places) -> None:
        self.rankers = tuple(rankers)
        self.places = places

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Scores of the member's I items, ``[B, I]``, for histories ``[B, H]`` of its users."""
        member = self.places.of_batch(histories)
        own = None if batch is None else self.places.local_batch(batch, member)
        return self.rankers[member].scores(self.places.local(histories, member), own)
