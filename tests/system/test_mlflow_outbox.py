"""Runs and MLflow servers that are killed: the server has the same content as after an uninterrupted run, once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from preloaded import Preloaded
from tracking_servers import Content, Relay, Server, content, logged_points, postgresql, wait_for

from fellrec.cli.main import main
from fellrec.pool.pool import COORDINATOR
from fellrec.tracking.delivery import OutboxClient, OutboxError
from fellrec.tracking.outbox import Outbox, Sent, first_operation, num_left, operations, read_sent, write_sent
from fellrec.tracking.run_log import NewRun, RunLog

from ..integration.processes import Processes

ENDLESS = Path(__file__).with_name("endless_logging.py")
ROUNDS = ["trainer.num_rounds=8"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running MLflow server with sqlite or PostgreSQL."""
    folder = tmp_path_factory.mktemp(f"server-{request.param}")
    if request.param == "sqlite":
        yield from _serving(Server(folder, f"sqlite:///{folder / 'mlflow.db'}"))
    else:
        with postgresql() as database:
            yield from _serving(Server(folder, database))


def _serving(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Content:
    """Content of the store after an uninterrupted run."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("uninterrupted")
    os.chdir(folder)
    try:
        main(["train", *tiny_overrides, *ROUNDS, "run_dir=run"])
    finally:
        os.chdir(before)
    return content(f"sqlite:///{folder / 'mlflow.db'}", folder / "mlartifacts", uid_of(folder / "run"))


def uid_of(run_dir: Path) -> str:
    return str(first_operation(run_dir / "outbox").fields["uid"])


def on(server: Server, run_dir: Path) -> Content:
    return content(server.database, server.folder / "artifacts", uid_of(run_dir))


def start(folder: Path, *command: str) -> tuple[Preloaded, Path]:
    log = folder / "run.log"
    with log.open("ab") as output:
        process = Preloaded(command, folder, os.environ, output)
    return process, log


def has_logged(run_dir: Path, name: str) -> bool:
    return any(operation.fields.get("once") == name for operation in operations(run_dir / "outbox"))


def sync(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["sync", *arguments])
    return int(done.value.code or 0), capsys.readouterr().out.splitlines()


def test_a_server_that_is_killed_and_restarted_during_a_run(
    server: Server, uninterrupted: Content, tiny_overrides: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = [*tiny_overrides, *ROUNDS, "run_dir=run", f"tracking.uri={server.uri}"]
    process, log = start(tmp_path, "-m", "fellrec", "train", *settings)
    wait_for(lambda: has_logged(run_dir, "round 1"), process, log)
    server.kill()
    wait_for(lambda: has_logged(run_dir, "round 3"), process, log)
    process.send_signal(signal.SIGSTOP)  # so that it cannot end before the server is running again
    server.start()
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=240) == 0, log.read_text()
    shown = log.read_text()
    assert "the run continues, and its metrics are recorded in" in shown
    assert "fellrec sync" not in shown, "everything was sent automatically"
    assert num_left(run_dir / "outbox") == 0
    arrived = on(server, run_dir)
    assert arrived.points == logged_points(run_dir / "outbox")
    assert arrived.comparable() == uninterrupted.comparable()
    resend(server, run_dir, arrived)


def resend(server: Server, run_dir: Path, arrived: Content) -> None:
    """A crash after an acknowledgement leaves an older sent.json: sending operations again has no effect."""
    outbox = run_dir / "outbox"
    known = list(operations(outbox))
    run_id = read_sent(outbox).run_id
    earlier = [Sent(), *(Sent(known[n].number + 1, known[n].end, run_id) for n in (len(known) // 2, len(known) - 2))]
    for sent in earlier:
        write_sent(outbox, sent)
        assert OutboxClient(outbox).send() == len(known) - sent.number
        assert on(server, run_dir) == arrived


def test_a_batch_that_was_partly_stored_before_a_crash(server: Server, tmp_path: Path) -> None:
    """MLflow rejects a batch with a known point, then stores the new points one by one; servers must do the same."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    RunLog(tmp_path, NewRun(server.uri, "halves", "half", {})).close("FAILED")
    outbox = tmp_path / "outbox"
    metrics = {f"client_{client:04d}/loss": client / 7 for client in range(2300)} | {"nan": float("nan")}
    writer = Outbox(outbox)
    writer.append("metrics", step=3, metrics=metrics)
    writer.close()
    (half,) = [operation for operation in operations(outbox) if operation.kind == "metrics"]
    points = [Metric(key, value, half.time, 3) for key, value in half.fields["metrics"].items()]
    run_id = read_sent(outbox).run_id
    client = MlflowClient(server.uri)
    client.log_batch(str(run_id), metrics=points[:1000])
    client.log_batch(str(run_id), metrics=points[1500:2301])
    OutboxClient(outbox).send()
    arrived = on(server, tmp_path)
    assert [point[:3] for point in arrived.points] == sorted((key, 3, half.time) for key in metrics)
    assert {key: value for key, _, _, value in arrived.points if key != "nan"} == {
        key: value for key, value in metrics.items() if key != "nan"
    }
    assert arrived.status == "FAILED"


def test_a_process_killed_at_any_time_logs_each_point_once(server: Server, tmp_path: Path) -> None:
    """The process sends continuously, so kills occur after acknowledgements and while sent.json or lines are written."""
    draw, run_dir, steps = random.Random(7), tmp_path / "run", 40
    for target in (draw.randrange(2, 20), draw.randrange(22, 45), draw.randrange(48, 70)):
        process, log = start(tmp_path, str(ENDLESS), str(run_dir), server.uri, str(steps))
        wait_for(lambda target=target: read_sent(run_dir / "outbox").number >= target, process, log)
        process.kill()
        process.wait()
    process, log = start(tmp_path, str(ENDLESS), str(run_dir), server.uri, str(steps))
    while process.poll() is None:  # like `fellrec sync` during a run
        with suppress(OutboxError):  # a busy machine exceeds the time limit of a request
            OutboxClient(run_dir / "outbox").send()
        time.sleep(0.05)
    assert process.returncode == 0, log.read_text()
    OutboxClient(run_dir / "outbox").send()
    arrived = on(server, run_dir)
    assert len(arrived.points) == 21 * steps
    assert [point for point in arrived.points if point[0] != "nan"] == [
        point for point in logged_points(run_dir / "outbox") if point[0] != "nan"
    ]
    assert len(arrived.params) == 250
    assert arrived.artifacts == {f"steps/step_{step}.txt": str(step).encode() for step in range(steps)}
    assert arrived.status == "FINISHED"


def test_a_killed_run_continues_in_the_same_mlflow_run(
    uninterrupted: Content, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """A round that was logged and not in a checkpoint is run again, and not logged again."""
    run_dir = tmp_path / "run"
    process, log = start(tmp_path, "-m", "fellrec", "train", *tiny_overrides, *ROUNDS, "run_dir=run")
    wait_for(lambda: has_logged(run_dir, "round 2"), process, log)
    process.kill()
    process.wait()
    process, log = start(tmp_path, "-m", "fellrec", "train", "resume=run")
    assert process.wait(timeout=240) == 0, log.read_text()
    arrived = content(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlartifacts", uid_of(run_dir))
    assert arrived.points == logged_points(run_dir / "outbox")
    assert arrived.comparable() == uninterrupted.comparable()


def test_a_comparison_without_a_server_is_sent_later(
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    server = Server(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    settings = [*tiny_overrides, "aggregation=fedavg,fellrec", "trainer.num_rounds=1", f"tracking.uri={server.uri}"]
    main(["compare", *settings, "tracking.on_unreachable=keep", "run_dir=both", "--format", "json"])
    shown = capsys.readouterr()
    both = tmp_path / "both"
    assert [
        run["run_id"] for rule in ("fedavg", "fellrec") for run in json.loads(shown.out)["rules"][rule]["runs"]
    ] == [None, None]
    total = sum(num_left(folder) for folder in tmp_path.rglob("outbox"))
    assert f"{total} MLflow operations were not sent; send them with: fellrec sync {both}" in shown.err
    code, lines = sync("both", capsys=capsys)
    assert (code, len(lines)) == (1, 3)
    assert all(": 0 sent, " in line and "operation 0 (create) failed" in line for line in lines)
    server.start()
    try:
        code, lines = sync("both/fedavg-s0", capsys=capsys)
        assert code == 1
        assert "does not have the run's comparison" in lines[0]
        code, lines = sync("both", "both/fedavg-s0", capsys=capsys)
        assert (code, [line.partition(":")[0] for line in lines]) == (
            0,
            [str(both), str(both / "fedavg-s0"), str(both / "fellrec-s0")],
        )
        assert sync("both", capsys=capsys) == (0, [f"{line.partition(':')[0]}: 0 sent, 0 left" for line in lines])
    finally:
        server.kill()
    parent = on(server, both)
    assert parent.points == logged_points(both / "outbox")
    assert set(parent.artifacts) >= {"comparison.csv", "clients.png"}
    for name in ("fedavg-s0", "fellrec-s0"):
        child = on(server, both / name)
        assert child.points == logged_points(both / name / "outbox")
        assert child.status == parent.status == "FINISHED"
        assert child.tags["mlflow.parentRunId"] == read_sent(both / "outbox").run_id


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_only_the_coordinator_connects_to_the_server(server: Server, tiny_overrides: list[str], tmp_path: Path) -> None:
    """Three processes, and a relay before the server that looks up the process of each connection."""
    settings = [*tiny_overrides, "split=executed", "split.transport=distributed", "trainer.num_rounds=1"]
    settings += ["backbone.num_layers=3", "trainer.devices=3"]
    with Relay(server.port) as relay:
        train = ["-m", "fellrec", "train", *settings, "run_dir=run", f"tracking.uri=http://127.0.0.1:{relay.port}"]
        processes = Processes([train] * 3, tmp_path)
        assert processes.wait() == [0, 0, 0], processes.output(COORDINATOR)
    assert relay.processes == {processes.pids[COORDINATOR]}
    arrived = on(server, tmp_path / "run")
    assert arrived.points == logged_points(tmp_path / "run" / "outbox")
    assert arrived.status == "FINISHED"


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["sync", str(tmp_path)])
    assert done.value.code == 1
    assert f"{tmp_path} has no outbox; give the directory of a run" in capsys.readouterr().err
