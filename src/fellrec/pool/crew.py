"""The ranks of a run as the leading one sees them: jobs are placed on them, and what they answer is handed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fellrec.cut.messages import Message, Stop
from fellrec.distributed.channel import PeerGoneError, Wire
from fellrec.errors import SplitError
from fellrec.functional.placement import place
from fellrec.pool.messages import Begin, Begun

LEAD = 0
"""Rank that runs the loop, keeps the books, and has clients like any other."""

_AHEAD = 2
"""Jobs that a rank has been given at the same time: one is done while the next is on its way."""


@dataclass(frozen=True)
class Job:
    """Something that any rank can do.

    Attributes:
        order: Makes the message that asks another rank for it.
        do: Does it here.
        accept: Takes another rank's answer.
        drop: Told why it will not be done, if its rank is gone; ``None`` for a job that another rank must do then.
        text: What a rank does meanwhile, for error messages: ``training client 3 in round 1``.
    """

    order: Callable[[], Message]
    do: Callable[[], None]
    accept: Callable[[Message], None]
    drop: Callable[[str], None] | None
    text: str


class Crew:
    """Places jobs on the ranks, this one among them, and waits for all of them.

    Args:
        wire: Of this process, which leads.
        world_size: Ranks.
        ranks_per_client: Ranks that train one client together.
        skips: Whether the run goes on without a rank that is gone.
    """

    def __init__(self, wire: Wire, world_size: int, ranks_per_client: int = 1, skips: bool = False) -> None:
        self.wire = wire
        self.groups = rank_groups(world_size, ranks_per_client)
        self.skips = skips and ranks_per_client == 1  # what is left of a group cannot train
        self._queues: dict[int, deque[Job]] = {}
        self._under_way: dict[int, deque[Job]] = {}
        self._answers: deque[tuple[Job, Message]] = deque()
        self._members: dict[int, tuple[int, ...]] = {}

    @property
    def num_ranks(self) -> int:
        """Ranks that are there."""
        return 1 + len(self._others)

    @property
    def _others(self) -> list[int]:
        return [rank for group in self.groups for rank in group if rank != LEAD]

    def begin(self, config: str, facts: Mapping[str, str]) -> None:
        """Let all other ranks prepare for a run; see ``Begin``."""
        asked = [rank for rank in self._others if self._tell(rank, Begin(config, facts))]
        for rank in asked:
            try:
                answer = self.wire.receive(rank)
            except PeerGoneError as error:
                self._lose(error)
                continue
            if not isinstance(answer, Begun):
                raise SplitError(f"rank {rank} answered with {type(answer).__name__}, expected Begun")

    def run(self, jobs: Sequence[Job], costs: Sequence[float], together: bool = False) -> None:
        """Let all jobs be done.

        What other ranks answer is accepted between two of this rank's own jobs, in the order in which it arrives.

        Args:
            jobs: What is to be done.
            costs: Of each job.
            together: Whether each job is for the ranks of a group together.

        Raises:
            SplitError: If a rank is gone and the run does not go on without it.
        """
        groups = self.groups if together else [(rank,) for group in self.groups for rank in group]
        self._members = {group[0]: group for group in groups}
        placed = place(costs, len(groups))
        self._queues = {group[0]: deque(jobs[job] for job in mine) for group, mine in zip(groups, placed)}
        self._under_way = {group[0]: deque() for group in groups}
        self._feed()
        while any(self._queues.values()) or any(self._under_way.values()):
            if self._queues[LEAD]:
                job = self._queues[LEAD].popleft()
                for fellow in self._members[LEAD][1:]:
                    self.wire.send(fellow, job.order())
                job.do()
            else:
                self._receive()
            while self._answers:
                job, answer = self._answers.popleft()
                job.accept(answer)

    def attend(self) -> None:
        """Take what has arrived and give out what is next, in the middle of one of this rank's own jobs."""
        while self.wire.has_pending:
            self._receive()

    def stop(self) -> None:
        """Let all other ranks leave; by now it does not matter if one has left before."""
        for rank in self._others:
            try:
                self.wire.send(rank, Stop())
                self.wire.receive(rank)
            except PeerGoneError:
                continue

    def _tell(self, rank: int, message: Message) -> bool:
        try:
            self.wire.send(rank, message)
        except PeerGoneError as error:
            self._lose(error)
            return False
        return True

    def _feed(self) -> None:
        """Give out jobs until every other rank has enough; those of a rank that turns out to be gone too."""
        while hungry := [
            head
            for head, queue in self._queues.items()
            if head != LEAD and queue and len(self._under_way[head]) < _AHEAD
        ]:
            for head in hungry:
                if self._queues.get(head):
                    job, members = self._queues[head].popleft(), self._members[head]
                    self._under_way[head].append(job)
                    all(self._tell(rank, job.order()) for rank in members)

    def _receive(self) -> None:
        try:
            rank, answer = self.wire.receive_any()
        except PeerGoneError as error:
            self._lose(error)
        else:
            if rank in self._under_way:  # else it is gone since, and its jobs are somebody else's
                self._answers.append((self._under_way[rank].popleft(), answer))
        self._feed()

    def _lose(self, error: PeerGoneError) -> None:
        """End the run, or go on without a rank: what it was doing is dropped, the others do the rest."""
        if error.rank not in self._others:
            return  # known already: it was gone when something was sent to it
        head = next((head for head, members in self._members.items() if error.rank in members), error.rank)
        jobs = self._under_way.pop(head, deque())
        text = f"{error} while it was {jobs[0].text}" if jobs else str(error)
        if not self.skips:
            raise SplitError(text) from error
        self.groups = [group for group in self.groups if error.rank not in group]
        self._members.pop(head, None)
        left = [*jobs, *self._queues.pop(head, ())]
        if jobs and jobs[0].drop is not None:
            left.pop(0)
            jobs[0].drop(text)
        for job in left:
            min(self._queues.values(), key=len).append(job)


def rank_groups(world_size: int, ranks_per_client: int) -> list[tuple[int, ...]]:
    """Neighbouring ranks that train one client together.

    Example:
        >>> rank_groups(4, 2)
        [(0, 1), (2, 3)]
    """
    return [tuple(range(first, first + ranks_per_client)) for first in range(0, world_size, ranks_per_client)]
