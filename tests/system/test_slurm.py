"""Runs on a SLURM cluster: several nodes, sweeps, time limits, requeued and cancelled jobs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from preloaded import program
from safetensors.torch import load_file

from fellrec.cli.main import main

from .cluster import Cluster, install, running_cluster

ODD = """a b'c"d;$(touch hacked)`touch hacked`$HOME&|#=,{x}[y]"""
"""A name with special characters of bash, sbatch and Hydra."""
ON_LOOPBACK = "launcher.environment={MASTER_ADDR: 127.0.0.1, GLOO_SOCKET_IFNAME: lo}"
TWO_NODES = ["launcher.nodes=2", "split=executed", "split.transport=distributed", "backbone.num_layers=3", ON_LOOPBACK]
LONG = ["trainer.num_rounds=100000", "launcher.time=30:00", "launcher.signal_seconds=150"]
"""A run that does not end by itself."""


@dataclass(frozen=True)
class Submitted:
    """A job, the directory of its submission, and the output of the command."""

    job_id: str
    folder: Path
    shown: str

    @property
    def run_dir(self) -> Path:
        (line,) = [line for line in self.shown.splitlines() if " directory: " in line]
        return Path(line.partition(" directory: ")[2])

    @property
    def log(self) -> Path:
        return self.run_dir / "slurm"

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.log.glob("*.out")))

    @property
    def runs(self) -> list[Any]:
        client = self.client
        experiment = client.get_experiment_by_name("fellrec")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=store_in(self.folder))

    @property
    def status(self) -> str:
        """Status of the only MLflow run; empty if there is none."""
        experiment = self.client.get_experiment_by_name("fellrec")
        runs = [] if experiment is None else list(self.client.search_runs([experiment.experiment_id]))
        assert len(runs) < 2, "the job continues in the run that it started"
        return str(runs[0].info.status) if runs else ""

    @property
    def rounds(self) -> list[int]:
        """The logged rounds of the only MLflow run."""
        (run,) = self.runs
        return [point.step for point in self.client.get_metric_history(run.info.run_id, "train/loss/mean")]


def store_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def submit(folder: Path, *arguments: str) -> Submitted:
    """Call ``fellrec submit`` in a directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            main(["submit", *arguments, f"tracking.uri={store_in(folder)}"])
    finally:
        os.chdir(before)
    first = shown.getvalue().splitlines()[0]
    assert first.startswith("job "), shown.getvalue()
    return Submitted(first.removeprefix("job "), folder, shown.getvalue())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    install()
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """Jobs that run at the same time, to save time; all but those of the sweep run a `preloaded.program`."""
    python = f"launcher.python={program()}"
    name = ODD.replace("\\", "\\\\").replace("'", "\\'")
    settings = {
        "long": [*LONG, python],
        "pair": [*TWO_NODES, python, f"run_dir='{name}'", f"launcher.job_name='{name}'"],
        "processes": ["launcher.nodes=2", python, ON_LOOPBACK, "run_dir=run"],
        "sweep": ["-m", "aggregation=fedavg,fellrec", "trainer.num_rounds=1", "run_dir=sweep"],
    }
    return {name: submit(tmp_path_factory.mktemp(name), *tiny_overrides, *given) for name, given in settings.items()}


def test_a_run_on_two_nodes_with_special_characters_in_its_name(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["pair"]
    assert cluster.wait_until_over(job.job_id, job.log) == "COMPLETED", job.output
    found = cluster.job(job.job_id)
    assert (found["NumNodes"], found["NumTasks"], found["NodeList"]) == ("2", "2", "node[1-2]")
    name = cluster.command("squeue", "--states=all", f"--jobs={job.job_id}", "--noheader", "--format=%j")
    assert name.rstrip("\n") == ODD
    assert job.run_dir == job.folder / ODD
    assert (job.log / f"{job.job_id}.out").is_file()
    (run,) = job.runs
    assert run.info.status == "FINISHED"
    assert "hidden_state" in (job.run_dir / "ledger.csv").read_text(), "the server is another process"
    assert json.loads((job.run_dir / "results.json").read_text())["summary"]["num_users"] == 72
    assert not list(job.folder.rglob("hacked"))


def test_clients_on_the_processes_of_two_nodes(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    """The job sets the number of processes of the run."""
    job = jobs["processes"]
    assert cluster.wait_until_over(job.job_id, job.log) == "COMPLETED", job.output
    assert cluster.job(job.job_id)["NodeList"] == "node[1-2]"
    trainer = OmegaConf.load(job.run_dir / "config.yaml").trainer
    assert (trainer.devices, trainer.num_nodes) == (1, 2)
    (run,) = job.runs
    assert run.info.status == "FINISHED"
    assert json.loads((job.run_dir / "results.json").read_text())["summary"]["num_users"] == 72


def test_a_sweep_is_a_job_array_with_a_directory_for_each_run(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["sweep"]
    for task in (0, 1):
        assert cluster.wait_until_over(f"{job.job_id}_{task}", job.log) == "COMPLETED", job.output
        assert (job.log / f"{job.job_id}_{task}.out").is_file()
    assert sorted(path.name for path in job.run_dir.iterdir()) == ["000-fedavg-s0", "001-fellrec-s0", "slurm"]
    for task, rule in enumerate(["fedavg", "fellrec"]):
        run_dir = job.run_dir / f"{task:03d}-{rule}-s0"
        assert f"task {task}: {run_dir}" in job.shown
        assert json.loads((run_dir / "results.json").read_text())["rule"] == rule
        assert "launcher" not in OmegaConf.load(run_dir / "config.yaml")
    assert sorted(run.data.tags["rule"] for run in job.runs) == ["fedavg", "fellrec"]
    assert {run.info.status for run in job.runs} == {"FINISHED"}


def test_a_run_survives_its_time_limit_a_requeue_and_its_cancellation(
    cluster: Cluster, jobs: dict[str, Submitted], capsys: pytest.CaptureFixture[str]
) -> None:
    job = jobs["long"]

    def progress() -> int:
        done = [int(path.stem.removeprefix("round_")) for path in job.run_dir.glob("checkpoints/round_*.json")]
        return max(done, default=0)

    def stops_by(name: str, restarts: int) -> None:
        message = f"fellrec train: {name} stopped the run after"
        cluster.wait_for(lambda: job.output.count(message) == 1, message, job.log)
        assert job.status == "KILLED", "between two starts"
        cluster.wait_for(lambda: cluster.job(job.job_id)["Restarts"] == str(restarts), "a requeue", job.log)

    def continues(since: int) -> None:
        cluster.wait_for(lambda: progress() >= since + 2, "two more rounds", job.log)
        cluster.wait_for(lambda: job.status == "RUNNING", "MLflow's status", job.log)

    continues(since=0)
    assert_other_jobs_are_refused(cluster, job, capsys)
    # SLURM checks time limits every half minute, and then signals the job.
    minutes = int(cluster.job(job.job_id)["RunTime"].split(":")[1]) + 3
    cluster.command("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={minutes}")
    stops_by("SIGUSR1", restarts=1)
    cluster.command("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=30")
    stopped_at = progress()
    assert len(job.rounds) == stopped_at
    continues(stopped_at)
    # The user requeues the job.
    cluster.command("scontrol", "requeue", job.job_id)
    stops_by("SIGTERM", restarts=2)
    continues(progress())
    cluster.command("scancel", job.job_id)
    assert cluster.wait_until_over(job.job_id, job.log) == "CANCELLED"
    (run,) = job.runs
    assert run.info.status == "KILLED"
    assert job.rounds == list(range(progress())), "every round is logged once"
    assert_all_files_are_complete(job.run_dir)


def assert_other_jobs_are_refused(cluster: Cluster, job: Submitted, capsys: pytest.CaptureFixture[str]) -> None:
    """A second job from the same script and a new submission are refused while the job runs."""
    second = cluster.command("sbatch", "--parsable", str(job.log / "job.sh")).strip()
    with pytest.raises(SystemExit):
        main(["submit", f"resume={job.run_dir}"])
    assert f"run directory {job.run_dir} is in use by process" in capsys.readouterr().err
    assert cluster.wait_until_over(second, job.log) == "FAILED"
    text = (job.log / f"{second}.out").read_text()
    assert f"run directory {job.run_dir} is in use by process" in text
    assert f"SLURM job {job.job_id}" in text


def assert_all_files_are_complete(run_dir: Path) -> None:
    hidden = [path for path in run_dir.rglob(".*") if not path.name.startswith(".lock-")]
    assert not hidden, "no temporary files"
    found = list(run_dir.rglob("*.safetensors"))
    assert found
    for path in found:
        load_file(path)
    for path in run_dir.rglob("*.json"):
        json.loads(path.read_text())


def test_a_rejected_job_leaves_no_run_directory(
    cluster: Cluster, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        submit(tmp_path, *tiny_overrides, "launcher.partition=nowhere", "run_dir=run")
    assert done.value.code == 1
    assert "fellrec submit: SLURM rejected the job: sbatch: error: invalid partition" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_doctor_reports_the_cluster(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["doctor"])
    shown = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0, shown
    version = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert f"SLURM {version}, test* has" in shown
    assert "gloo 2 processes over lo" in shown
