"""``fellrec submit``: a run, or a sweep as a job array, on SLURM."""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_multirun, add_overrides, add_trust
from fellrec.errors import ConfigError
from fellrec.functional.secrets import VARIABLE, reveal
from fellrec.launch.settings import LauncherSettings
from fellrec.launch.slurm import Job, JobEnvironment, batch_script

if TYPE_CHECKING:
    from omegaconf import DictConfig

PURPOSE = "a run, or a sweep as a job array, on SLURM"
EXAMPLES = (
    "fellrec submit experiment=ml_1m_small data.root=ml-1m launcher.gpus_per_node=1 launcher.time=12:00:00",
    "fellrec submit split=executed split.transport=distributed launcher.nodes=2 --dry-run",
    "fellrec submit -m aggregation=fedavg,fellrec seed=0,1,2 launcher.time=2:00:00 launcher.max_parallel=4",
    "fellrec submit resume=runs/RUN launcher.time=12:00:00",
)

log = logging.getLogger(__name__)

_LAUNCHER = re.compile(r"[+~]*launcher[.=]")


@dataclass(frozen=True)
class Submission:
    """A checked job before it is submitted.

    Attributes:
        config: Configuration of the run, or of the first run of a sweep.
        launcher: The SLURM settings.
        jobs: The runs.
        folder: Directory of the run or of the sweep.
        label: Job name, unless the launcher has one.
        processes: Overrides that set the number of processes, and the places of files of a run that is resumed.
        trusted: Classes that are not of fellrec, of all runs.
    """

    config: DictConfig
    launcher: LauncherSettings
    jobs: Sequence[Job]
    folder: Path
    label: str
    processes: Sequence[str]
    trusted: Sequence[str]

    @property
    def script(self) -> str:
        """The batch script."""
        python = self.launcher.python or ("python" if self.launcher.container else sys.executable)
        pattern = "%A_%a.out" if len(self.jobs) > 1 else "%j.out"
        log = f"{str(_slurm_dir(self.folder)).replace('%', '%%')}/{pattern}"
        environment = JobEnvironment(self.label, Path.cwd(), log, python, self.processes, self.trusted)
        return batch_script(self.launcher, self.jobs, environment)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser)
    add_multirun(parser)
    add_trust(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and exit")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: everything is checked before anything is written or submitted."""
    submission = plan_submission(options.overrides, options.multirun, options.trust)
    script = submission.script
    from fellrec.experiment.store import check_store, store_of

    config, jobs = submission.config, submission.jobs
    uri = store_of(config)
    for text in _warnings(submission.launcher, len(jobs), uri):
        log.warning("%s", text)
    if options.dry_run:
        sys.stdout.write(script)
        return
    from fellrec.tracking.store import ensure_experiment, make_client

    check_store(config)
    if len(jobs) > 1 and uri is not None and uri.startswith("sqlite:"):  # otherwise all jobs would create it at once
        ensure_experiment(make_client(uri), uri, config.tracking.experiment)
    job_id, path = submit(script, submission.folder, is_new=config.resume is None, uri=uri)
    lines = [f"job {job_id}", f"run directory: {jobs[0].run_dir}"]
    if len(jobs) > 1:
        tasks = [f"task {number}: {job.run_dir}" for number, job in enumerate(jobs)]
        lines = [lines[0], *tasks, f"sweep directory: {submission.folder}"]
    sys.stdout.write("\n".join([*lines, f"script and output: {path.parent}"]) + "\n")


def _warnings(launcher: LauncherSettings, num_jobs: int, uri: str | None) -> Iterator[str]:
    """What is allowed, but ends badly on most clusters."""
    yield from launcher.left_to_the_site()
    num_writers = min(num_jobs, launcher.max_parallel or num_jobs)
    if num_writers > 1 and uri is not None and uri.startswith("sqlite"):
        yield (
            f"{num_writers} jobs write to {uri} at the same time: sqlite on a network file system may lose or damage "
            "it; use a server, tracking.uri=http://HOST:5000 with fellrec ui --host, or launcher.max_parallel=1"
        )


def plan_submission(overrides: Sequence[str], is_sweep: bool, trusted: Collection[str] = ()) -> Submission:
    """Compose and check every run, and choose its directory.

    Args:
        overrides: Hydra overrides, those of ``launcher`` included.
        is_sweep: One run per combination of comma-separated values.
        trusted: Classes that are not of fellrec and may be named by a run that is resumed.

    Raises:
        ConfigError: If a setting of any run is not allowed.
    """
    from fellrec.config.compose import check_limits, compose
    from fellrec.config.stored import PLACES, own_classes
    from fellrec.config.sweep import expand, without_passwords
    from fellrec.experiment.names import rule_name
    from fellrec.experiment.resume import resume_dir, resumed

    launcher_overrides = [item for item in overrides if _LAUNCHER.match(item)]
    experiment = [item for item in overrides if not _LAUNCHER.match(item)]
    run_dir = resume_dir(experiment)
    if run_dir is not None:
        config = resumed(experiment, run_dir, trusted)
        kept = without_passwords([item for item in experiment if item.startswith("tracking.uri=")])
        places = [*kept, *(item for item in experiment if item.startswith(tuple(f"{key}=" for key in PLACES)))]
        return _continuation(config, run_dir, compose(launcher_overrides), places)
    combinations = expand(experiment)
    if len(combinations) > 1 and not is_sweep:
        raise ConfigError("several values of a setting make a sweep: fellrec submit -m …")
    configs = [compose([*combination, *launcher_overrides]) for combination in combinations]
    launchers = [_launcher(config) for config in configs]
    if any(launcher != launchers[0] for launcher in launchers):
        raise ConfigError("the runs of a sweep must have the same launcher settings; submit them one by one")
    processes = [_processes(config, launchers[0]) for config in configs]
    check_limits(configs)
    from fellrec.experiment.classes import check_transforms  # imports torch: not before a mistake is found

    for config in configs:
        _check_run(config)
        check_transforms([config])  # each is a run of its own
    labels = [f"{rule_name(config)}-s{config.seed}" for config in configs]
    first = configs[0]
    label = f"{first.data.name}-{'sweep' if is_sweep else labels[0]}"
    from fellrec.experiment.run_dir import free_run_dir

    folder = free_run_dir(first.run_dir, label).absolute()
    dirs = [folder / f"{n:03d}-{own}" for n, own in enumerate(labels)] if is_sweep else [folder]
    jobs = [
        Job(own, [item for item in without_passwords(combination) if not item.startswith("run_dir=")])
        for own, combination in zip(dirs, combinations, strict=True)
    ]
    own = dict.fromkeys(name for config in configs for name in own_classes(config))
    return Submission(first, launchers[0], jobs, folder, label, processes[0], list(own))


def submit(script: str, folder: Path, is_new: bool = True, uri: str | None = None) -> tuple[str, Path]:
    """Reserve the run directory, write the script into it, and call sbatch.

    Args:
        script: The batch script.
        folder: Directory of the run or of the sweep.
        is_new: Whether a directory that another job has reserved is refused.
        uri: The tracking store, which the job gets with its password by the environment.

    Returns:
        The job's id, and the path of the script.

    Raises:
        ConfigError: If the script cannot be written, or SLURM rejects the job; new files are removed then.
    """
    from fellrec.state.files import private_files

    own = _slurm_dir(folder)
    try:
        with private_files():
            own.mkdir(parents=True, exist_ok=not is_new)
            path = _write_new(own, script)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be used: {error}") from error
    try:
        return _sbatch(path, {} if uri is None else {VARIABLE: reveal(uri)}), path
    except ConfigError:
        path.unlink()
        with suppress(OSError):  # directories with other files stay
            own.rmdir()
            folder.rmdir()
        raise


def _slurm_dir(folder: Path) -> Path:
    from fellrec.experiment.run_dir import SLURM_FOLDER

    return folder / SLURM_FOLDER


def _check_run(config: DictConfig) -> None:
    from fellrec.config.members import data_nodes
    from fellrec.experiment.classes import check_classes
    from fellrec.state.nearest import not_a_directory

    check_classes(config)
    for key, node in data_nodes(config).items():
        if node.root is not None and not (folder := Path(node.root).expanduser()).is_dir():
            raise ConfigError(not_a_directory(f"{key}.root={node.root}", folder))


def _continuation(config: DictConfig, run_dir: Path, asked: DictConfig, places: Sequence[str]) -> Submission:
    """A job that resumes a run, whose files may be in other places."""
    from fellrec.config.stored import own_classes
    from fellrec.experiment.names import rule_name
    from fellrec.state.lock import check_free

    check_free(run_dir)
    _check_run(config)
    launcher, folder = _launcher(asked), run_dir.absolute()
    label = f"{config.data.name}-{rule_name(config)}-s{config.seed}"
    jobs, own = [Job(folder, ())], own_classes(config)
    return Submission(config, launcher, jobs, folder, label, [*_processes(config, launcher), *places], own)


def _launcher(config: DictConfig) -> LauncherSettings:
    from fellrec.config.instantiate import settings

    return settings(LauncherSettings, config.launcher, "launcher")


def _processes(config: DictConfig, launcher: LauncherSettings) -> list[str]:
    """The overrides that set the number of processes.

    Raises:
        ConfigError: If the run does not support this number, or sets another one.
    """
    asked = f"launcher.nodes={launcher.nodes} with {launcher.tasks} processes each"
    if config.split.transport == "distributed" and launcher.nodes * launcher.tasks < 2:
        raise ConfigError(f"split.transport=distributed needs at least 2 processes, not {asked}")
    if config.split.transport == "inprocess" and launcher.nodes * launcher.tasks > 1:
        raise ConfigError(f"{asked} is not allowed with split.transport={config.split.transport}: it has one process")
    found = []
    for key, number in (("devices", launcher.tasks), ("num_nodes", launcher.nodes)):
        given = config.trainer[key]
        if given not in (1, "auto", number) and config.resume is None:
            raise ConfigError(f"trainer.{key}={given} contradicts {asked}; leave out trainer.{key}")
        if given != number:
            found.append(f"trainer.{key}={number}")
    return found


def _write_new(folder: Path, script: str) -> Path:
    """Write a script beside those of earlier jobs of the run."""
    number = 1
    while True:
        path = folder / ("job.sh" if number == 1 else f"job-{number}.sh")
        with suppress(FileExistsError), path.open("x") as file:
            file.write(script)
            return path
        number += 1


def _sbatch(script: Path, environment: Mapping[str, str]) -> str:
    command, variables = ["sbatch", "--parsable", str(script)], {**os.environ, **environment}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("sbatch not found: run this on a SLURM login node, or use --dry-run") from None
    if done.returncode != 0:
        raise ConfigError(f"SLURM rejected the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
