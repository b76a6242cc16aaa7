"""``fellrec submit``: a run, or a sweep as a job array, on SLURM."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fellrec.cli.train import resume_dir, resumed
from fellrec.config.compose import compose
from fellrec.config.instantiate import settings
from fellrec.config.sweep import expand
from fellrec.errors import ConfigError
from fellrec.experiment import build_rule
from fellrec.experiment.run import rule_name
from fellrec.experiment.run_dir import SLURM_FOLDER, free_run_dir
from fellrec.launch.settings import LauncherSettings
from fellrec.launch.slurm import Job, JobEnvironment, batch_script
from fellrec.state.lock import check_free
from fellrec.tracking.store import check_reachable, ensure_experiment, make_client

_LAUNCHER = re.compile(r"[+~]*launcher[.=]")


@dataclass(frozen=True)
class Submission:
    """What is submitted.

    Attributes:
        config: Of the run, or of the first of a sweep.
        launcher: What is asked of SLURM.
        jobs: The runs.
        folder: The run directory, or that of the sweep.
        label: Name of the job, unless the launcher has one.
        processes: The overrides that tell a run how many processes it has.
    """

    config: DictConfig
    launcher: LauncherSettings
    jobs: Sequence[Job]
    folder: Path
    label: str
    processes: Sequence[str]

    @property
    def script(self) -> str:
        """The batch script."""
        python = self.launcher.python or ("python" if self.launcher.container else sys.executable)
        pattern = "%A_%a.out" if len(self.jobs) > 1 else "%j.out"
        log = f"{str(self.folder / SLURM_FOLDER).replace('%', '%%')}/{pattern}"
        around = JobEnvironment(self.label, Path.cwd(), log, python, self.processes)
        return batch_script(self.launcher, self.jobs, around)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: everything is checked before anything is written or submitted."""
    submission = plan_submission(options.overrides, options.multirun)
    script = submission.script
    if options.dry_run:
        sys.stdout.write(script)
        return
    config = submission.config
    may_be_away = config.resume is not None or config.tracking.on_unreachable == "keep"
    check_reachable(config.tracking.uri, may_be_away)
    if len(submission.jobs) > 1 and config.tracking.uri.startswith("sqlite:"):  # not made by all jobs at the same time
        ensure_experiment(make_client(config.tracking.uri), config.tracking.uri, config.tracking.experiment)
    job_id, path = submit(script, submission.folder, is_new=config.resume is None)
    lines = [f"job {job_id}"]
    if len(submission.jobs) > 1:
        lines += [f"task {number}: {job.run_dir}" for number, job in enumerate(submission.jobs)]
        lines.append(f"sweep directory: {submission.folder}")
    else:
        lines.append(f"run directory: {submission.jobs[0].run_dir}")
    lines.append(f"script and output: {path.parent}")
    sys.stdout.write("\n".join(lines) + "\n")


def plan_submission(overrides: Sequence[str], is_sweep: bool) -> Submission:
    """Compose and check every run, and choose its directory.

    Args:
        overrides: Hydra overrides, those of ``launcher`` among them.
        is_sweep: One run per combination of comma-separated values.

    Raises:
        ConfigError: If something is wrong with any of them.
    """
    mine = [item for item in overrides if _LAUNCHER.match(item)]
    experiment = [item for item in overrides if not _LAUNCHER.match(item)]
    run_dir = resume_dir(experiment)
    if run_dir is not None:
        return _continuation(experiment, run_dir, compose(mine))
    combinations = expand(experiment)
    if len(combinations) > 1 and not is_sweep:
        raise ConfigError("several values of a setting make a sweep: fellrec submit -m …")
    configs = [compose([*combination, *mine]) for combination in combinations]
    launchers = [_launcher(config) for config in configs]
    if any(launcher != launchers[0] for launcher in launchers):
        raise ConfigError("the runs of a sweep ask SLURM for different things; submit them one by one")
    processes = [_processes(config, launchers[0]) for config in configs]
    for config in configs:
        build_rule(config)
        if config.data.root is not None and not Path(config.data.root).is_dir():
            raise ConfigError(f"data.root={config.data.root} is not a directory")
    labels = [f"{rule_name(config)}-s{config.seed}" for config in configs]
    first = configs[0]
    label = f"{first.data.name}-{'sweep' if is_sweep else labels[0]}"
    folder = free_run_dir(first.run_dir, label).absolute()
    dirs = [folder / f"{n:03d}-{own}" for n, own in enumerate(labels)] if is_sweep else [folder]
    jobs = [
        Job(own, [item for item in combination if not item.startswith("run_dir=")])
        for own, combination in zip(dirs, combinations, strict=True)
    ]
    return Submission(first, launchers[0], jobs, folder, label, processes[0])


def submit(script: str, folder: Path, is_new: bool = True) -> tuple[str, Path]:
    """Reserve the run directory, write the script into it, and call sbatch.

    Args:
        script: The batch script.
        folder: The run directory, or that of a sweep.
        is_new: No other job may have reserved it.

    Returns:
        The job's id, and where the script is.

    Raises:
        ConfigError: If the script cannot be written, or SLURM refuses; what was made is removed then.
    """
    own = folder / SLURM_FOLDER
    try:
        own.mkdir(parents=True, exist_ok=not is_new)
        path = _write_new(own, script)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be used: {error}") from error
    try:
        return _sbatch(path), path
    except ConfigError:
        path.unlink()
        with suppress(OSError):  # the folders stay if there is more in them
            own.rmdir()
            folder.rmdir()
        raise


def _continuation(experiment: Sequence[str], run_dir: Path, asked: DictConfig) -> Submission:
    """A job that goes on with a run."""
    config = resumed(experiment, run_dir)
    check_free(run_dir)
    launcher, folder = _launcher(asked), run_dir.absolute()
    label = f"{config.data.name}-{rule_name(config)}-s{config.seed}"
    return Submission(config, launcher, [Job(folder, ())], folder, label, _processes(config, launcher))


def _launcher(config: DictConfig) -> LauncherSettings:
    return settings(LauncherSettings, config.launcher, "launcher")


def _processes(config: DictConfig, launcher: LauncherSettings) -> list[str]:
    """The overrides that tell a run how many processes it has.

    Raises:
        ConfigError: If the run cannot have as many, or says something else.
    """
    asked = f"launcher.nodes={launcher.nodes} with {launcher.tasks} processes each"
    if config.split.transport == "distributed":  # takes what srun starts
        if launcher.nodes * launcher.tasks < 2:
            raise ConfigError(f"split.transport=distributed needs at least 2 processes, not {asked}")
        return []
    if config.split.transport != "none" and launcher.nodes * launcher.tasks > 1:
        raise ConfigError(f"{asked} is not allowed with split.transport={config.split.transport}: it has one process")
    wanted = {"trainer.devices": launcher.tasks, "trainer.num_nodes": launcher.nodes}
    given = {key: OmegaConf.select(config, key) for key in wanted}
    for key, number in wanted.items():
        if given[key] not in (1, "auto", number) and config.resume is None:
            raise ConfigError(f"{key}={given[key]} is not {asked}; leave it out, and it is set")
    return [f"{key}={number}" for key, number in wanted.items() if given[key] != number]


def _write_new(folder: Path, script: str) -> Path:
    """Write a script beside those of earlier jobs of the run."""
    number = 1
    while True:
        path = folder / ("job.sh" if number == 1 else f"job-{number}.sh")
        with suppress(FileExistsError), path.open("x") as file:
            file.write(script)
            return path
        number += 1


def _sbatch(script: Path) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("sbatch not found: run this on a SLURM login node, or use --dry-run") from None
    if done.returncode != 0:
        raise ConfigError(f"SLURM refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
