"""Writes the batch script of a SLURM job from settings; every value is quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError
from fellrec.functional.quoting import hydra_value
from fellrec.launch.preemption import GRACE_VARIABLE, REQUEUE_CODE
from fellrec.launch.settings import LauncherSettings, is_line

_FIRST_PORT, _NUM_PORTS = 20000, 12000
"""Range of ports below those that Linux uses for outgoing connections."""
_SECRET = "FELLREC_SECRET"
"""See ``fellrec.distributed.secret``."""
_MIN_SECONDS = 30
"""Minimum time of a run before the signal; SLURM checks time limits twice a minute."""


@dataclass(frozen=True)
class Job:
    """One run of a batch script.

    Attributes:
        run_dir: Absolute path of the run directory.
        overrides: Hydra overrides of the run.
    """

    run_dir: Path
    overrides: Sequence[str]


@dataclass(frozen=True)
class JobEnvironment:
    """The environment of a job.

    Attributes:
        name: Job name, unless the launcher has one.
        folder: Absolute path of the working directory.
        log: Path of the output, as a pattern of sbatch.
        python: Python interpreter in which fellrec is installed.
        processes: Overrides that set the number of processes, also when a run is resumed.
        trusted: Classes that are not of fellrec, which the run's own configuration may name when it is resumed.
    """

    name: str
    folder: Path
    log: str
    python: str
    processes: Sequence[str] = ()
    trusted: Sequence[str] = ()


def batch_script(launcher: LauncherSettings, jobs: Sequence[Job], environment: JobEnvironment) -> str:
    """The batch script of one run, or of a job array with one task per run.

    Args:
        launcher: The SLURM settings.
        jobs: The runs; several runs make a job array.
        environment: Working directory, output and interpreter.

    Raises:
        ConfigError: If a path, a name or an override contains a line break or other control characters.
    """
    for path in (environment.folder, *(job.run_dir for job in jobs)):
        if not is_line(str(path)):
            raise ConfigError(f"{str(path)!r} cannot be a run directory: its name must be one line of text")
    words = [*(word for job in jobs for word in job.overrides), *environment.processes, *environment.trusted]
    for text in (environment.name, environment.log, environment.python, *words):
        if not is_line(text):
            raise ConfigError(f"{text!r} cannot be written into a batch script: it must be one line of text")
    sections = [
        ["#!/bin/bash", "# Written by `fellrec submit`; `sbatch THIS_FILE` submits it again and resumes the run."],
        _directives(launcher, len(jobs), environment),
        _SIGNAL.splitlines(),
        _runs(jobs),
        _environment(launcher),
        _RESUME.splitlines(),
        _train(launcher, environment),
        _after(launcher),
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _directives(launcher: LauncherSettings, num_jobs: int, environment: JobEnvironment) -> list[str]:
    options: dict[str, Any] = {
        "job-name": launcher.job_name or environment.name,
        "chdir": environment.folder,
        "output": environment.log,
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


def _environment(launcher: LauncherSettings) -> list[str]:
    grace = max(1, launcher.signal_seconds * 3 // 4)
    return [
        "# Rendezvous of the processes: the first node, a random port, and a secret that only they know.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT=$(({_FIRST_PORT} + $(od -An -N2 -tu2 /dev/urandom) % {_NUM_PORTS}))",
        f"{_SECRET}=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')",
        f"{GRACE_VARIABLE}={grace}  # seconds between the signal and the end of the run",
        f"export MASTER_ADDR MASTER_PORT {_SECRET} {GRACE_VARIABLE} OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in (launcher.environment or {}).items()),
        *launcher.setup,
    ]


_SIGNAL = """\
# SLURM signals this shell before the time limit or a pre-emption, and the shell signals every process of the run.
signalled=
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
"""
_RESUME = """\
# A run that was started before is resumed with its own configuration.
if [ -e "$run_dir/config.yaml" ]; then overrides=("resume=$run_dir"); fi
"""


def _train(launcher: LauncherSettings, environment: JobEnvironment) -> list[str]:
    step = ["srun", "--kill-on-bad-exit=1"]
    if launcher.cpus_per_task:
        step.append(f"--cpus-per-task={launcher.cpus_per_task}")  # srun does not inherit it from sbatch
    if launcher.container:
        step += ["apptainer", "exec", *(["--nv"] if launcher.asks_for_gpus else []), *launcher.container_options]
        step.append(launcher.container)
    words = " ".join(shlex.quote(str(word)) for word in [*step, environment.python, "-m", "fellrec", "train"])
    trust = [word for name in environment.trusted for word in ("--trust", name)]
    end = " ".join(['"${overrides[@]}"', *map(shlex.quote, [*environment.processes, *trust])])
    return [
        f"{words} {end} &",
        "step=$!",
        'wait "$step"; code=$?',
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal interrupts wait, not the step',
    ]


def _after(launcher: LauncherSettings) -> list[str]:
    if not launcher.requeue:
        return ['exit "$code"']
    return [
        f"# Exit status {REQUEUE_CODE}: stopped at a safe point; above 128: killed before it; 1: error, not requeued.",
        f'if [ -n "$signalled" ] && [ "$code" -ge {REQUEUE_CODE} ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {launcher.max_requeues} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]  # fmt: skip


def _sbatch_value(value: Any) -> str:
    """Quote a value for sbatch, whose rules differ from those of bash."""
    text = str(value)
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
