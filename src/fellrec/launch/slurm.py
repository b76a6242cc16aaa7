"""From settings to the batch script that SLURM runs: text in, text out; every value is quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError
from fellrec.launch.preemption import GRACE_VARIABLE, REQUEUE_CODE

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_FIRST_PORT, _NUM_PORTS = 20000, 12000
"""Below the ports that Linux gives to outgoing connections."""
_LEAST_SECONDS = 30
"""Time of a run before its first warning; SLURM looks at time limits twice a minute."""


@dataclass(frozen=True)
class Job:
    """One run of a batch script.

    Attributes:
        run_dir: Its directory, absolute.
        overrides: What it is trained with.
    """

    run_dir: Path
    overrides: Sequence[str]


@dataclass(frozen=True)
class Launcher:
    """What is asked of SLURM; the fields are the keys of ``conf/launcher/default.yaml``."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int | None
    cpus_per_task: int | None
    memory: str | None
    time: str | int | None
    partition: str | None
    account: str | None
    qos: str | None
    job_name: str | None
    options: Mapping[str, Any] | None
    signal_seconds: int
    requeue: bool
    max_requeues: int
    max_parallel: int | None
    setup: Sequence[str]
    environment: Mapping[str, Any] | None
    python: str | None
    container: str | None
    container_options: Sequence[str]

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    def check(self) -> None:
        """Refuse what cannot stand in a script, and a warning that leaves no time to train.

        Raises:
            ConfigError: With one line per problem.
        """
        problems = [
            f"launcher.{key}={value!r} is not allowed: one line of text"
            for key, value in self._texts()
            if not _line(value)
        ]
        problems += [
            f"launcher.environment has {name!r}, which is no name of a variable"
            for name in self.environment or {}
            if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII)
        ]
        problems += [
            f"launcher.options has {name!r}, which is no name of an option of sbatch, such as constraint"
            for name in self.options or {}
            if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name))
        ]
        limit = None if self.time is None else seconds_of(str(self.time))
        if limit is not None and limit < self.signal_seconds + _LEAST_SECONDS:
            problems.append(
                f"launcher.signal_seconds={self.signal_seconds} leaves too little of launcher.time={self.time}: "
                f"the limit must be at least {_LEAST_SECONDS} seconds more"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def _texts(self) -> Iterator[tuple[str, Any]]:
        for key in ("memory", "time", "partition", "account", "qos", "job_name", "python", "container"):
            if (value := getattr(self, key)) is not None:
                yield key, value
        yield from (("setup", line) for line in self.setup)
        yield from (("container_options", word) for word in self.container_options)
        yield from ((f"environment.{name}", value) for name, value in (self.environment or {}).items())
        yield from ((f"options.{name}", value) for name, value in (self.options or {}).items())


def seconds_of(time: str) -> int | None:
    """Seconds of a time limit in SLURM's notation; ``None`` for a limit that is none, such as ``UNLIMITED``.

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


@dataclass(frozen=True)
class JobEnvironment:
    """Where a job runs, and as what.

    Attributes:
        name: Of the job, unless the launcher has one.
        folder: The current folder, absolute.
        log: Where the output goes, a pattern of sbatch.
        python: The interpreter that has fellrec.
        processes: The overrides that tell a run how many processes it has, also when it goes on.
    """

    name: str
    folder: Path
    log: str
    python: str
    processes: Sequence[str] = ()


def batch_script(launcher: Launcher, jobs: Sequence[Job], around: JobEnvironment) -> str:
    """The batch script of one run, or of a job array with one task per run.

    Args:
        launcher: What is asked of SLURM.
        jobs: The runs; more than one make an array.
        around: Where, and as what.

    Raises:
        ConfigError: If a path cannot stand in a script.
    """
    for path in (around.folder, *(job.run_dir for job in jobs)):
        if not _line(str(path)):
            raise ConfigError(f"{str(path)!r} cannot be a run directory: its name must be one line of text")
    sections = [
        ["#!/bin/bash", "# Written by `fellrec submit`; `sbatch THIS_FILE` submits it again, and the run goes on."],
        _directives(launcher, len(jobs), around),
        _WARNING.splitlines(),
        _runs(jobs),
        _environment(launcher),
        _RESUME.splitlines(),
        _train(launcher, around),
        _after(launcher),
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def hydra_value(text: str) -> str:
    """Quote a value, where that is needed, so that Hydra takes it as it is.

    Example:
        >>> print(hydra_value("runs/x"), hydra_value("a, b's"))
        runs/x 'a, b\\'s'
    """
    if re.fullmatch(r"[\w/.@+-]+", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def _directives(launcher: Launcher, num_jobs: int, around: JobEnvironment) -> list[str]:
    options: dict[str, Any] = {
        "job-name": launcher.job_name or around.name,
        "chdir": around.folder,
        "output": around.log,
        "open-mode": "append",
        "nodes": launcher.nodes,
        "ntasks-per-node": launcher.tasks,
        "gpus-per-node": launcher.gpus_per_node or None,
        "cpus-per-task": launcher.cpus_per_task,
        "mem": launcher.memory,
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "requeue" if launcher.requeue else "no-requeue": True,
        "signal": f"B:USR1@{launcher.signal_seconds}",
    }
    if num_jobs > 1:
        at_once = f"%{launcher.max_parallel}" if launcher.max_parallel else ""
        options["array"] = f"0-{num_jobs - 1}{at_once}"
    options |= launcher.options or {}
    return [
        f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={_sbatch_value(value)}"
        for key, value in options.items()
        if value is not None and value is not False
    ]


def _runs(jobs: Sequence[Job]) -> list[str]:
    if len(jobs) == 1:
        return _assignments(jobs[0])
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, job in enumerate(jobs):
        lines += [f"{number})", *(f"  {line}" for line in _assignments(job)), "  ;;"]
    return [*lines, "esac"]


def _assignments(job: Job) -> list[str]:
    words = " ".join(shlex.quote(word) for word in [f"run_dir={hydra_value(str(job.run_dir))}", *job.overrides])
    return [f"run_dir={shlex.quote(str(job.run_dir))}", f"overrides=({words})"]


def _environment(launcher: Launcher) -> list[str]:
    grace = max(1, launcher.signal_seconds * 3 // 4)
    return [
        "# Where the processes of the run meet: the first node, at a port that no other job has.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT=$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))",
        f"{GRACE_VARIABLE}={grace}  # seconds from the warning to the end, wherever the run is",
        f"export MASTER_ADDR MASTER_PORT {GRACE_VARIABLE} OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in (launcher.environment or {}).items()),
        *launcher.setup,
    ]


_WARNING = """\
# SLURM warns this shell before the time limit or a pre-emption, and the shell every process of the run.
warned=
trap 'warned=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
"""
_RESUME = """\
# A run that has begun goes on where it stopped, from its own configuration.
if [ -e "$run_dir/config.yaml" ]; then overrides=("resume=$run_dir"); fi
"""


def _train(launcher: Launcher, around: JobEnvironment) -> list[str]:
    step = ["srun", "--kill-on-bad-exit=1"]
    if launcher.cpus_per_task:
        step.append(f"--cpus-per-task={launcher.cpus_per_task}")  # srun does not take it from sbatch
    if launcher.container:
        step += ["apptainer", "exec", *(["--nv"] if launcher.gpus_per_node else []), *launcher.container_options]
        step.append(launcher.container)
    words = " ".join(shlex.quote(str(word)) for word in [*step, around.python, "-m", "fellrec", "train"])
    end = " ".join(['"${overrides[@]}"', *map(shlex.quote, around.processes)])
    return [
        f"{words} {end} &",
        "step=$!",
        'wait "$step"; code=$?',
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal ends a wait, not the step',
    ]


def _after(launcher: Launcher) -> list[str]:
    if not launcher.requeue:
        return ['exit "$code"']
    return [
        f"# {REQUEUE_CODE}: stopped at a safe point; above 128: killed before one. A run with an error of its own: 1.",
        f'if [ -n "$warned" ] && [ "$code" -ge {REQUEUE_CODE} ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {launcher.max_requeues} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]  # fmt: skip


def _sbatch_value(value: Any) -> str:
    """As sbatch reads it in a script: not as bash does."""
    text = str(value)
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _line(value: Any) -> bool:
    """Whether a value can stand in one line of a script."""
    return isinstance(value, (str, int, float)) and str(value) != "" and str(value).isprintable()
