"""An MLflow server and a browser: the UI shows what a run logs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from fellrec.cli.main import main
from fellrec.tracking.store import ui_command

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The command of ``fellrec ui`` on a free port; yields its address."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = ui_command(f"sqlite:///{folder / 'mlflow.db'}", "127.0.0.1", port)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def logged(server: str, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A comparison logged through the server; yields the experiment's id."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("runs"))
    try:
        main(["compare", *tiny_overrides, "aggregation=fedavg,fellrec", f"tracking.uri={server}"])
    finally:
        os.chdir(before)
    experiment = MlflowClient(tracking_uri=server).get_experiment_by_name("fellrec")
    assert experiment is not None
    return str(experiment.experiment_id)


def test_a_comparison_is_logged_to_the_server(server: str, logged: str) -> None:
    client = MlflowClient(tracking_uri=server)
    runs = client.search_runs([logged])
    parents = [run for run in runs if run.data.tags.get("kind") == "comparison"]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = parents
    assert sorted(run.data.tags["rule"] for run in children) == ["fedavg", "fellrec"]
    for run in children:
        assert run.info.status == "FINISHED"
        assert {"test/ndcg_at_10/mean", "test/ndcg_at_10/variance"} <= set(run.data.metrics)
        rule = run.data.tags["rule"]
        assert parent.data.metrics[f"ndcg_at_10/mean/{rule}"] == run.data.metrics["test/ndcg_at_10/mean"]
        assert "adapters" in {item.path for item in client.list_artifacts(run.info.run_id)}


@pytest.fixture(scope="module")
def chromium() -> str:
    """Chromium, installed with apt-get if possible."""
    if shutil.which("chromium") is None and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
            subprocess.run(command, check=False, capture_output=True, timeout=600)
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs chromium, which cannot be installed here (as root: apt-get install chromium)")
    return found


def test_runs_can_be_compared_in_the_browser(server: str, logged: str, chromium: str, tmp_path: Path) -> None:
    """MLflow's metric page shows NDCG and its variance of both runs, with the logged values."""
    client = MlflowClient(tracking_uri=server)
    children = [run for run in client.search_runs([logged]) if "mlflow.parentRunId" in run.data.tags]
    ids = ",".join(f"%22{run.info.run_id}%22" for run in children)
    mean, variance = (f"%22val%2Fndcg_at_10%2F{figure}%22" for figure in ("mean", "variance"))
    page = f"{server}/#/metric?runs=[{ids}]&metric={mean}&experiments=[%22{logged}%22]"
    page += f"&plot_metric_keys=[{mean},{variance}]&plot_layout={{}}"
    options = [*CHROMIUM, "--disable-sync", "--disable-quic", "--window-size=1600,2400"]
    text = ""
    for number in range(3):
        profile = f"--user-data-dir={tmp_path / str(number)}"
        command = [chromium, *options, profile, "--virtual-time-budget=40000", "--dump-dom", page]
        text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
        if "synthetic-FedAvg-s0" in text:
            break
    for run in children:
        assert run.info.run_name in text
        for figure in ("mean", "variance"):
            assert f"val/ndcg_at_10/{figure}" in text
            assert f"{run.data.metrics[f'val/ndcg_at_10/{figure}']:.12f}"[:8] in text


def test_an_installed_wheel_contains_the_configuration(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(root),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("fellrec-*.whl")
    unpacked = tmp_path / "site"
    shutil.unpack_archive(wheel, unpacked, "zip")
    done = subprocess.run(
        [sys.executable, "-m", "fellrec.cli.main", "train", "--show-config", "aggregation=fedavg"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fellrec.aggregation.FedAvg" in done.stdout
    code = "from fellrec.config.paths import conf_dir; print(conf_dir())"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(unpacked / "fellrec" / "conf")
