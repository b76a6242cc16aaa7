"""From settings to the batch script that SLURM runs: text in, text out; every value is quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError
from fellrec.launch.preemption import GRACE_VARIABLE, REQUEUE_CODE
from fellrec.launch.settings import LauncherSettings, is_line

_FIRST_PORT, _NUM_PORTS = 20000, 12000
"""Below the ports that Linux gives to outgoing connections."""


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


def batch_script(launcher: LauncherSettings, jobs: Sequence[Job], around: JobEnvironment) -> str:
    """The batch script of one run, or of a job array with one task per run.

    Args:
        launcher: What is asked of SLURM.
        jobs: The runs; more than one make an array.
        around: Where, and as what.

    Raises:
        ConfigError: If a path cannot stand in a script.
    """
    for path in (around.folder, *(job.run_dir for job in jobs)):
        if not is_line(str(path)):
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


def _directives(launcher: LauncherSettings, num_jobs: int, around: JobEnvironment) -> list[str]:
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


def _environment(launcher: LauncherSettings) -> list[str]:
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


def _train(launcher: LauncherSettings, around: JobEnvironment) -> list[str]:
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


def _after(launcher: LauncherSettings) -> list[str]:
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
