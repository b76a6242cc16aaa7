"""Settings of ``fellrec submit``: ``launcher``. They are not part of the experiment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fellrec.functional.ranges import Allowed, Count, Natural, check, listed, refuse

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_CORES = ("cpus-per-task", "cpus-per-gpu", "exclusive")
_MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
"""Options of sbatch that set them."""
_MIN_SECONDS = 30
"""Minimum time of a run before the signal; SLURM checks time limits twice a minute."""


def _mapping(example: str) -> Allowed:
    return Allowed(lambda value: isinstance(value, Mapping), f"a mapping, such as {example}")


Options = Annotated[Mapping[str, Any], _mapping("{constraint: a100}")]
Variables = Annotated[Mapping[str, Any], _mapping("{NAME: value}")]
Lines = Annotated[Sequence[str], listed("a list, such as [module load cuda]", (str, int, float))]
Words = Annotated[Sequence[str], listed("a list, such as [--bind,/scratch]", (str, int, float))]


@dataclass(frozen=True)
class LauncherSettings:
    """The SLURM settings. Values are as in ``man sbatch``; null is the site's default."""

    nodes: Count = 1
    """Nodes."""
    gpus_per_node: Natural = 0
    """GPUs on each node."""
    tasks_per_node: Count | None = None
    """Processes on a node; null: one per GPU, or 1."""
    cpus_per_task: Count | None = None
    """Cores of a process."""
    memory: str | None = None
    """Per node, such as 64G."""
    time: str | int | None = None
    """Time limit, such as 12:00:00 or 2-00:00:00."""
    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    job_name: str | None = None
    """Name of the job; null: data, rule and seed."""
    options: Options | None = None
    """Further options of sbatch, by name: launcher.options='{constraint: a100, exclusive: true}'."""
    signal_seconds: Count = 120
    """Seconds before the time limit at which the run is asked to stop at the next safe point."""
    requeue: bool = True
    """Whether it then waits in the queue again, to resume where it stopped."""
    max_requeues: Natural = 100
    """Times that a run is requeued at most: one that makes no progress must not be requeued for ever."""
    max_parallel: Count | None = None
    """With ``-m``: jobs of the sweep that run at the same time; null: all."""
    setup: Lines = ()
    """Lines of bash before the run, such as [module load cuda]."""
    environment: Variables | None = None
    """Environment variables of the run: launcher.environment='{NCCL_SOCKET_IFNAME: ib0}'."""
    python: str | None = None
    """The interpreter that has fellrec; null: that of this process, or the container's."""
    container: str | None = None
    """Path of an Apptainer image that has fellrec."""
    container_options: Words = ()
    """Options of apptainer exec, such as [--bind,/scratch]."""

    def __post_init__(self) -> None:
        """Check all ranges, that all values can be written into a script, and that there is time to train."""
        check(self, "launcher")
        refuse(*self._problems())

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def asks_for_gpus(self) -> bool:
        """Whether the job gets GPUs, by ``gpus_per_node`` or by one of sbatch's options."""
        return self.gpus_per_node > 0 or any(_is_of_gpus(str(k), str(v)) for k, v in (self.options or {}).items())

    def left_to_the_site(self) -> Iterator[str]:
        """What is not set although the default of most sites is bad for a run: a sentence each."""
        given = {str(name) for name, value in (self.options or {}).items() if value is not None and value is not False}
        if self.asks_for_gpus and self.cpus_per_task is None and not given.intersection(_CORES):
            yield (
                "launcher.cpus_per_task is not set: with most sites a process with a GPU then has one core; "
                "set launcher.cpus_per_task=8, or as many as a node has per GPU"
            )
        if self.asks_for_gpus and self.memory is None and not given.intersection(_MEMORY):
            yield (
                "launcher.memory is not set: with most sites the job then has a few GB for each core, and is killed "
                "when the backbone needs more; set launcher.memory=64G, see fellrec plan"
            )
        if self.time is None and "time" not in given:
            yield (
                "launcher.time is not set: the job ends at the default limit of the partition, which may be minutes; "
                "set launcher.time=12:00:00"
            )

    def _problems(self) -> Iterator[str]:
        for key, value in self._texts():
            if not is_line(value):
                yield f"launcher.{key}={value!r} is not allowed: one line of text"
        for name in self.environment or {}:
            if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
                yield f"launcher.environment has {name!r}, which is not a valid variable name"
        for name in self.options or {}:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name)):
                yield f"launcher.options has {name!r}, which is not the name of an sbatch option, such as constraint"
        limit = None if self.time is None else seconds_of(str(self.time))
        if limit is not None and limit < self.signal_seconds + _MIN_SECONDS:
            yield (
                f"launcher.time={self.time} is too short for launcher.signal_seconds={self.signal_seconds}: "
                f"it must be at least {_MIN_SECONDS} seconds longer"
            )

    def _texts(self) -> Iterator[tuple[str, Any]]:
        for key in ("memory", "time", "partition", "account", "qos", "job_name", "python", "container"):
            if (value := getattr(self, key)) is not None:
                yield key, value
        yield from (("setup", line) for line in self.setup)
        yield from (("container_options", word) for word in self.container_options)
        yield from ((f"environment.{name}", value) for name, value in (self.environment or {}).items())
        yield from ((f"options.{name}", value) for name, value in (self.options or {}).items())


def _is_of_gpus(name: str, value: str) -> bool:
    """Whether an option of sbatch asks for GPUs, such as ``gpus: a100:2`` or ``tres-per-task: gres/gpu:1``."""
    if name.startswith("gpus"):  # all jobs get 0 unless a number is given: N, TYPE:N, or several of them
        return re.search(r"(^|[:,])0*[1-9]\d*(,|$)", value) is not None
    if name == "gres" or name.startswith("tres"):
        parts = re.findall(r"(?:^|[,/:])gpu(?:[:=][^,]*)?(?=,|$)", value)
        return any(not re.search(r"[:=]0+$", part) for part in parts)
    return False


def seconds_of(time: str) -> int | None:
    """Convert a time limit in SLURM's notation to seconds; ``None`` for ``UNLIMITED``.

    Example:
        >>> seconds_of("90"), seconds_of("12:00:00"), seconds_of("2-6"), seconds_of("1-00:30")
        (5400, 43200, 194400, 88200)
    """
    found = _TIME.fullmatch(time)
    if not found:
        return None
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = [[0, *parts, 0], [0, *parts], parts][len(parts) - 1]  # minutes; :seconds; hours::
    return hours * 3600 + minutes * 60 + seconds


def is_line(value: Any) -> bool:
    """Whether a value can be one line of a script."""
    return isinstance(value, (str, int, float)) and str(value) != "" and str(value).isprintable()
