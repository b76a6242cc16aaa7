"""The worker processes as the coordinator sees them: tasks are placed on them, and their answers are handed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fellrec.distributed.channel import Channel, PeerGoneError
from fellrec.distributed.message import Message, Stop
from fellrec.errors import SplitError
from fellrec.functional.placement import place

COORDINATOR = 0
"""The process that runs the loop, holds all state, and trains clients like any other."""

_AHEAD = 2
"""Tasks that a worker has been sent at the same time: one is done while the next is on its way."""


@dataclass(frozen=True)
class Task:
    """Something that any process can do.

    Attributes:
        message: Makes the message that asks a worker for it, given the worker's number.
        run: Does it in this process; gives the result.
        result: Makes the result from a worker's answer.
        lost: Makes the result if the worker ended meanwhile, from the reason; ``None`` if another process must do it.
        activity: What a process does meanwhile, for error messages: ``training client 3 in round 1``.
    """

    message: Callable[[int], Message]
    run: Callable[[], Any]
    result: Callable[[Message], Any]
    lost: Callable[[str], Any] | None
    activity: str


class Pool:
    """Places tasks on the processes, this one among them, and collects the results.

    Args:
        channel: Of this process, which coordinates.
        processes: Numbers of all processes that do tasks, this one first.
        processes_per_client: Processes that train one client together.
        skips: Whether the run continues without a worker that has ended.
    """

    def __init__(
        self, channel: Channel, processes: Sequence[int], processes_per_client: int = 1, skips: bool = False
    ) -> None:
        self.channel = channel
        self.groups = process_groups(processes, processes_per_client)
        self.skips = skips and processes_per_client == 1  # what is left of a group cannot train
        self._queues: dict[int, deque[Task]] = {}
        self._under_way: dict[int, deque[Task]] = {}
        self._results: deque[Any] = deque()
        self._members: dict[int, tuple[int, ...]] = {}
        self._lost: set[int] = set()

    @property
    def num_processes(self) -> int:
        """Processes that do tasks now."""
        return 1 + len(self.workers)

    @property
    def workers(self) -> list[int]:
        """Numbers of the other processes."""
        return [process for group in self.groups for process in group if process != COORDINATOR]

    def ask_all(self, message: Message, answer: type[Message]) -> None:
        """Send a message to every worker and wait for the answers."""
        for process in [process for process in self.workers if self._send(process, message)]:
            try:
                found = self.channel.receive(process)
            except PeerGoneError as error:
                self._lose(error)
                continue
            if not isinstance(found, answer):
                raise SplitError(f"unexpected message {type(found).__name__}, expected {answer.__name__}")

    def run(self, tasks: Sequence[Task], costs: Sequence[float], together: bool = False) -> Iterator[Any]:
        """Let all tasks be done; gives their results in the order in which they are finished.

        Args:
            tasks: What is to be done.
            costs: Of each task, for placing.
            together: Whether each task is for the processes of a group together.

        Raises:
            SplitError: If a worker has ended and the run must not continue without it.
        """
        groups = self.groups if together else [(process,) for group in self.groups for process in group]
        self._members = {group[0]: group for group in groups}
        placed = place(costs, len(groups))
        self._queues = {group[0]: deque(tasks[task] for task in mine) for group, mine in zip(groups, placed)}
        self._under_way = {group[0]: deque() for group in groups}
        self._feed()
        while any(self._queues.values()) or any(self._under_way.values()) or self._results:
            if self._results:
                yield self._results.popleft()
            elif self._queues[COORDINATOR]:
                task = self._queues[COORDINATOR].popleft()
                for member in self._members[COORDINATOR][1:]:
                    self.channel.send(member, task.message(member))
                self._results.append(task.run())
            else:
                self._receive()

    def poll(self) -> None:
        """Take what has arrived and send what is next, in the middle of one of this process's own tasks."""
        while self.channel.has_pending:
            self._receive()

    def close(self) -> None:
        """Let all workers end; by now it does not matter if one has ended before."""
        for process in self.workers:
            try:
                self.channel.send(process, Stop())
                self.channel.receive(process)
            except PeerGoneError:
                continue

    def _send(self, process: int, message: Message) -> bool:
        try:
            self.channel.send(process, message)
        except PeerGoneError as error:
            self._lose(error)
            return False
        return True

    def _feed(self) -> None:
        """Send tasks until every worker has enough."""
        while hungry := [
            head
            for head, queue in self._queues.items()
            if head != COORDINATOR and queue and len(self._under_way[head]) < _AHEAD
        ]:
            for head in hungry:
                if self._queues.get(head):
                    task, members = self._queues[head].popleft(), self._members[head]
                    self._under_way[head].append(task)
                    all(self._send(process, task.message(process)) for process in members)

    def _receive(self) -> None:
        try:
            process, answer = self.channel.receive_any()
        except PeerGoneError as error:
            self._lose(error)
        else:
            if process in self._under_way:  # else it has ended since, and other processes do its tasks
                if not self._under_way[process]:
                    raise SplitError(f"unexpected message {type(answer).__name__} of process {process}")
                self._results.append(self._under_way[process].popleft().result(answer))
        self._feed()

    def _lose(self, error: PeerGoneError) -> None:
        """End the run, or continue without a worker: what it was doing is lost, the others do the rest."""
        if error.process not in self.workers:
            if error.process not in self._lost:
                raise error  # a process that cannot be missed, such as the server
            return
        head = next((head for head, members in self._members.items() if error.process in members), error.process)
        tasks = self._under_way.pop(head, deque())
        text = f"{error} while it was {tasks[0].activity}" if tasks else str(error)
        if not self.skips:
            raise SplitError(text) from error
        self._lost.add(error.process)
        self.groups = [group for group in self.groups if error.process not in group]
        self._members.pop(head, None)
        left = [*tasks, *self._queues.pop(head, ())]
        if tasks and tasks[0].lost is not None:
            left.pop(0)
            self._results.append(tasks[0].lost(text))
        for task in left:
            min(self._queues.values(), key=len).append(task)


def process_groups(processes: Sequence[int], processes_per_client: int) -> list[tuple[int, ...]]:
    """Neighbouring processes that train one client together.

    Example:
        >>> process_groups(range(4), 2)
        [(0, 1), (2, 3)]
    """
    size = processes_per_client
    return [tuple(processes[first : first + size]) for first in range(0, len(processes), size)]
