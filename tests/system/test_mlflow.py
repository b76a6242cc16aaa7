"""An MLflow server and a browser: the UI shows what a run logs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from html import unescape
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp

import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tracking_servers import free_port, postgresql

from fellrec.aggregation.settings import TITLES
from fellrec.cli.main import main

TRAINING = "workflowType=machine_learning"
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``fellrec ui`` on a free port; yields its address. A signal to this one process must stop all that it started."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    stop = signal.SIGINT if request.param == "sqlite" else signal.SIGTERM
    with ExitStack() as stack:
        sqlite = f"sqlite:///{folder / 'mlflow.db'}"
        database = sqlite if request.param == "sqlite" else stack.enter_context(postgresql())
        command = [sys.executable, "-m", "fellrec", "ui", f"tracking.uri={database}", "--port", str(port)]
        log = stack.enter_context((folder / "log").open("w"))
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        started: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2)
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline, (folder / "log").read_text()
                    time.sleep(0.3)
            started = psutil.Process(process.pid).children(recursive=True)
            assert f"{address}/#/experiments" in (folder / "log").read_text()
            yield address
        finally:
            process.send_signal(stop)
            status = process.wait(timeout=60)
            left = [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert status == 128 + stop
    assert "Traceback" not in (folder / "log").read_text()
    assert started
    assert not left, "no server is left behind"


@pytest.fixture(scope="module")
def compared(server: str, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], str]:
    """A comparison logged through the server: its runs, the parent first, and the link that was printed."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [*tiny_overrides, "aggregation=fedavg,fellrec", "references.show=[]", f"tracking.uri={server}"]
    shown = StringIO()
    with redirect_stdout(shown):
        main(["compare", *overrides, f"run_dir={folder / 'compared'}"])
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    link = shown.getvalue().rpartition("Result: ")[2].strip()
    return sorted(runs, key=lambda run: run.data.tags["kind"] != "comparison"), link


def test_a_comparison_is_logged_to_the_server(server: str, compared: tuple[list[Run], str]) -> None:
    client = MlflowClient(tracking_uri=server)
    (parent, *children), _ = compared
    assert parent.info.run_name == "FedAvg vs FELLRec · synthetic · seed 0"
    assert parent.data.metrics == {}, "MLflow would draw a chart with one bar of each"
    assert parent.data.params["rules"] == "FedAvg, FELLRec"
    assert parent.inputs.dataset_inputs
    assert "clients.png" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert sorted(run.info.run_name for run in children) == [
        "FELLRec · 3 clients · seed 0",
        "FedAvg · 3 clients · seed 0",
    ]
    for run in children:
        assert run.info.status == "FINISHED"
        assert {"test/ndcg_at_10/mean", "test/ndcg_at_10/std"} <= set(run.data.metrics)
        assert run.data.tags["comparison"] == parent.data.tags["comparison"]
        assert run.outputs.model_outputs
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


def page_of(chromium: str, address: str, wanted: str, folder: Path) -> str:
    """The page at an address as soon as it has a text; three attempts, each with a profile of its own."""
    options = [*CHROMIUM, "--disable-sync", "--disable-quic", "--window-size=1600,2400", "--virtual-time-budget=40000"]
    text = ""
    for _ in range(3):
        profile = f"--user-data-dir={mkdtemp(dir=folder)}"
        command = [chromium, *options, profile, "--dump-dom", address]
        text = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False).stdout
        if wanted in text:
            break
    return unescape(text)


def test_the_printed_link_opens_the_result_in_the_browser(
    server: str, compared: tuple[list[Run], str], chromium: str, tmp_path: Path
) -> None:
    """The values of both rules on the page, and on the one that it links to, are those of the store."""
    (parent, *children), link = compared
    assert link == f"{server}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}?{TRAINING}"
    values = {run.data.tags["rule"]: run.data.metrics["test/ndcg_at_10/mean"] for run in children}
    text = page_of(chromium, link, "<td>FELLRec</td>", tmp_path)
    for rule, value in values.items():
        (shown,) = re.findall(rf"<td[^>]*>{TITLES[rule]}</td>\s*<td[^>]*>([\d.]+)</td>", text)[:1]
        assert shown == f"{value:.4f}"
    (target,) = set(re.findall(r'href="([^"]*#/metric[^"]*)"', text))
    curves = page_of(chromium, f"{server}/{target[target.index('#') :]}", children[0].info.run_name, tmp_path)
    for run in children:
        assert run.info.run_name in curves
        assert f"{run.data.metrics['val/ndcg_at_10/mean']:.12f}"[:8] in curves


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
