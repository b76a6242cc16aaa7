"""Troubles with the tracking store, passwords and the outbox: each was reported or tried."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.config.stored import to_yaml
from fellrec.config.sweep import without_passwords
from fellrec.errors import ConfigError
from fellrec.experiment.resume import resumed
from fellrec.experiment.store import finish_message
from fellrec.functional import secrets
from fellrec.tracking.delivery import OutboxClient, OutboxError
from fellrec.tracking.known import confirm, remember
from fellrec.tracking.outbox import Outbox, first_operation, num_left, operations
from fellrec.tracking.run_log import NewRun, RunLog
from fellrec.tracking.store import absolute, check_reachable, connect, make_client, ui_command, ui_environment

SECRET = "hunter2-planted"
TINY_SASREC = [
    *("data.reader.num_users=40", "data.reader.num_items=20", "data.reader.mean_length=8", "partition=random"),
    *("partition.num_clients=2", "trainer.cutoffs=[5]", "trainer.metric=ndcg_at_5", "backbone=sasrec"),
    *("backbone.hidden_size=8", "backbone.num_layers=2", "split.head_layers=0"),
]
UID = "0123456789abcdef0123456789abcdef"


class Recorder(HTTPServer):
    """A server that has nothing and records the paths and credentials of all requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), _Recording)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Recording(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Recorder)
        self.server.requests.append((self.path, self.headers.get("Authorization", "")))
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.send_response(404 if "experiments/get-by-name" in self.path else 500 if "create" in self.path else 200)
        self.end_headers()
        self.wfile.write(b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def own_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has named no store yet, in a folder of their own; what one test hides the next does not know."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(secrets, "_whole", {})
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_SERVER_ALLOWED_HOSTS"):
        monkeypatch.setenv(name, "")  # a multirun sets one; what is set here is restored
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0)


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# Passwords


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"http://me:{SECRET}@host:5000/base", "http://host:5000/base"),
        (f"https://{SECRET}@host", "https://host"),
        (f"http://me:x@{SECRET}@host", "http://host"),
        (f"http://me:x?{SECRET}@host", "http://***"),
        (f"http://host?token={SECRET}", "http://host"),
        (f"postgresql+psycopg2://me:{SECRET}@host/runs", "postgresql+psycopg2://me@host/runs"),
        (f"postgresql://host/runs?user=me&password={SECRET}&sslmode=require", "postgresql://host/runs?sslmode=require"),
        (f"postgresql://host/runs?password=x@{SECRET}", "postgresql://***"),
        (f"mssql+pyodbc:///?odbc_connect=PWD%3D{SECRET}", "mssql+pyodbc:///"),
        (f"sqlite+pysqlcipher://:{SECRET}@/runs.db", "sqlite+pysqlcipher:///runs.db"),
        (f"me:{SECRET}@host:5000", "***"),
        ("sqlite:////home/a@b/x.db?timeout=60", "sqlite:////home/a@b/x.db?timeout=60"),
    ],
)
def test_an_address_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert secrets.hide(uri) == shown
    assert secrets.reveal(shown) == uri
    assert secrets.redact(f"no answer from {uri}") == f"no answer from {shown}"


@pytest.mark.parametrize("how", ["override", "interpolation", "part", "environment"])
def test_a_password_is_in_no_setting(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = f"http://me:{SECRET}@127.0.0.1:5055"
    monkeypatch.setenv("MLFLOW_TRACKING_URI" if how == "environment" else "PLACE", whole)
    monkeypatch.setenv("PART", SECRET)
    given = {
        "override": [f"tracking.uri={whole}"],
        "interpolation": ["tracking.uri=${oc.env:PLACE}"],
        "part": ["tracking.uri=http://me:${oc.env:PART}@127.0.0.1:5055"],
        "environment": [],
    }[how]
    config = compose(given)
    assert config.tracking.uri == "http://127.0.0.1:5055"
    assert SECRET not in to_yaml(config)
    assert secrets.reveal(config.tracking.uri) == whole
    if how != "override":  # a user's word on the command line is not kept elsewhere
        assert without_passwords(given) == given
    assert SECRET not in str(without_passwords(given))


@pytest.mark.parametrize(
    "override",
    [
        f"+callbacks.mine.url=https://me:{SECRET}@hooks.example.org",
        f"+callbacks.mine.token={SECRET}",
        "data.name=${oc.env:SERVICE_API_KEY}",
        f"+callbacks.mine.smtp_password={SECRET}",
        f"+callbacks.mine.headers=[{{authorization: x, slack_token: {SECRET}}}]",
        "+callbacks.mine.hooks=[x,[${oc.env:SERVICE_API_KEY}]]",
        f"launcher.environment={{MLFLOW_TRACKING_PASSWORD: {SECRET}}}",
        f"launcher.environment={{MYSQL_PWD: {SECRET}}}",
        f"launcher.setup=['module load x; export MLFLOW_TRACKING_PASSWORD=\"{SECRET}\"']",
        f"launcher.container_options=[--env,'HF_TOKEN={SECRET}']",
    ],
)
def test_a_secret_in_another_setting_is_refused(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", SECRET)
    with pytest.raises(
        ConfigError, match=r"has a secret, and settings are written|would be written into the batch"
    ) as e:
        compose([override])
    assert SECRET not in str(e.value)


@pytest.mark.parametrize(
    "variable",
    [
        *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY"),
        *("DB_PASS", "MYSQL_PWD", "PGPASSWORD", "MYSQLPASSWORD", "GH_PAT", "PASSWORD2", "AZURE_STORAGE_KEY"),
        *("AZURE_STORAGE_CONNECTION_STRING", "SENTRY_DSN", "BASIC_AUTH", "SESSION_COOKIE", "SECRET_KEY_BASE"),
    ],
)
def test_the_values_of_these_variables_are_secret(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as a URL has them."""
    monkeypatch.setenv(variable, f"{SECRET}/@")
    with pytest.raises(ConfigError, match="tracking.experiment has a secret") as e:
        compose([f"tracking.experiment=${{oc.env:{variable}}}"])
    assert SECRET not in str(e.value)
    assert SECRET not in secrets.redact(f"GET /x?key={SECRET}%2F%40 and {SECRET}/@")


def test_no_own_setting_has_a_name_of_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", str(Path.cwd()))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    compose([])
    compose(["launcher.setup=['export HF_TOKEN=$(cat ~/.token)','DB_PASS=\"$DB_PASS\" x','a=b HF_TOKEN= c']"])
    compose(["backbone=hf", "backbone.path=x", f"data.root={Path.cwd()}", "data=ml_1m", "+callbacks.mine.pad_token=x"])


@pytest.mark.parametrize(
    "overrides",
    [
        [f"tracking.uri=http://me:{SECRET}@host?x=y"],
        [f"tracking.uri=http://me:{SECRET}@host", "trainer.num_rounds=0"],
        [f"tracking.uri=http://me:{SECRET}@host", "no_such=1"],
        [f"tracking.uri=[http://me:{SECRET}@host]"],
        [f"tracking.uri=http://me:{SECRET}@127.0.0.1:port"],
    ],
)
def test_no_message_has_a_password(overrides: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of("train", *overrides) == 1
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err


def test_the_server_gets_the_password(recorder: Recorder) -> None:
    make_client(secrets.hide(f"http://me:{SECRET}@{recorder.place}"))
    assert recorder.requests[0][1] == "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()


def test_a_batch_script_has_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sbatch`` passes its environment on to the job, whose settings find the password there."""
    given: dict[str, str] = {}

    def sbatch(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        given.update(env)
        return subprocess.CompletedProcess(command, 0, "7\n", "")

    monkeypatch.setattr("fellrec.cli.submit.subprocess.run", sbatch)
    monkeypatch.setattr("fellrec.experiment.store.check_reachable", lambda *_, **__: None)
    whole = f"http://me:{SECRET}@127.0.0.1:5055"
    sweep = ["-m", f"tracking.uri={whole}", "seed=0,1", "run_dir=runs"]
    main(["submit", *sweep])
    assert files_with(tmp_path, SECRET) == []
    assert given["MLFLOW_TRACKING_URI"] == whole
    assert Path("runs/slurm/job.sh").read_text().count("http://127.0.0.1:5055") == 2
    monkeypatch.setattr(secrets, "_whole", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert secrets.reveal(compose(["tracking.uri=http://127.0.0.1:5055"]).tracking.uri) == whole
    assert [stat.S_IMODE(path.stat().st_mode) for path in (Path("runs/slurm"), Path("runs/slurm/job.sh"))] == [
        0o700,
        0o600,
    ]


def test_the_ui_has_no_password_among_its_arguments() -> None:
    whole = f"postgresql://me:{SECRET}@127.0.0.1/runs"
    shown = secrets.hide(whole)
    assert SECRET not in str(ui_command(shown, "127.0.0.1", 5000))
    assert ui_environment(shown)["MLFLOW_BACKEND_STORE_URI"] == whole


@pytest.mark.slow
@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_run_writes_a_password_nowhere(
    is_sweep: bool, tiny_overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], recorder: Recorder
) -> None:
    """The server answers the first request, and nothing that a run needs: all is kept, the errors are shown."""
    settings = [*tiny_overrides, "trainer.num_rounds=1", "references.show=[]"]
    settings += [f"tracking.uri=http://me:{SECRET}@{recorder.place}"]
    main(["train", "-m", *settings, "seed=3"] if is_sweep else ["train", *settings, "run_dir=run"])
    assert recorder.requests
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "MLflow operations were not sent" in shown.err
    assert files_with(tmp_path, SECRET) == []
    assert len(files_with(tmp_path, recorder.place)) >= 2  # config.yaml and the outbox
    run_dir = next(tmp_path.rglob("outbox")).parent
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (run_dir, *run_dir.rglob("*"))}
    assert {path: mode for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_whatever_a_command_writes_is_for_its_user_only(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a shell that lets everybody write: exports, a multirun's overrides and the outbox of a comparison were open."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    small = [*TINY_SASREC, f"cache_dir={tmp_path / 'cache'}", "trainer.num_rounds=1", "references.show=[]"]
    before = os.umask(umask)
    try:
        main(["train", *small, "run_dir=run"])
        main(["train", "-m", *small, "seed=1", "run_dir=sweep"])
        main(["compare", *small, "aggregation=local", "run_dir=comparison"])
        main(["export", "run", "--format", "trec", "--output", "out"])
        main(["export", "run", "--format", "ranx"])
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    written = {*tmp_path.rglob("*")} - {Path.cwd()}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    assert "made again" not in caplog.text


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"sqlite:///{'x' * 300}.db", "must be a file in a writable directory"),
        ("sqlite:////proc/x.db", "must be a file in a writable directory"),
        ("sqlite:///mlflow.db?mode=ro&uri=true", "sqlite's option uri is not supported"),
        ("postgresql+psycopg2://127.0.0.1:1/x", "127.0.0.1, port 1: Connection refused"),
        ("postgresql+psycopg2://no-host.invalid/x", "no-host.invalid, port 5432: "),
        ("postgresql+pg8000://127.0.0.1:1/x", "No module named 'pg8000'"),
        ("postgresql+psycopg2://:port/x", "cannot be used: invalid literal"),
    ],
)
def test_an_address_where_nothing_can_be_stored_is_refused_at_once(
    uri: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Long names were a traceback, ``uri=true`` made a file ``mlflow.db?mode=ro``, PostgreSQL was tried for 102 s."""
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_reachable(compose([f"tracking.uri='{uri}'"]).tracking.uri)
    assert time.monotonic() - begin < 8
    assert not caplog.records
    assert list(Path().iterdir()) == []


def test_a_database_that_is_away_does_not_refuse_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    check_reachable("postgresql+psycopg2://127.0.0.1:1/x", may_be_away=True)
    assert "is unreachable; metrics are recorded" in caplog.text


def test_sqlite_with_the_name_of_its_driver_is_resolved_too() -> None:
    assert absolute("sqlite+pysqlite:///x.db?timeout=5") == f"sqlite:///{Path.cwd()}/x.db?timeout=5"


# The outbox of a run directory that came from someone else


def planted(run_dir: Path, uri: Any, *artifacts: dict[str, Any], **creation: Any) -> Path:
    """An outbox as a run writes it; returns its folder."""
    run_dir.mkdir()
    outbox = Outbox(run_dir / "outbox")
    fields = {"uri": uri, "experiment": "fellrec", "uid": UID, "run_name": "run", "tags": {}, "parent_uid": None}
    outbox.append("create", **(fields | creation))
    for fields in artifacts:
        outbox.append("artifact", **({"folder": None} | fields))
    outbox.close()
    return run_dir / "outbox"


def link(run_dir: Path, target: Path) -> None:
    (run_dir / "link").symlink_to(target)


def link_in_folder(run_dir: Path, target: Path) -> None:
    (run_dir / "adapters").mkdir()
    link(run_dir / "adapters", target)


def folder_link(run_dir: Path, target: Path) -> None:
    link(run_dir, target.parent)


@pytest.mark.parametrize(
    ("path", "prepare"),
    [
        ("{secret}", None),
        ("../id_rsa", None),
        ("link", link),
        ("adapters", link_in_folder),
        ("link/id_rsa", folder_link),
        ("link", folder_link),
    ],
)
def test_only_files_of_the_run_are_sent(
    path: str, prepare: Callable[[Path, Path], None] | None, empty_store: Path, tmp_path: Path
) -> None:
    key, store = tmp_path / "id_rsa", tmp_path / "mlflow.db"
    key.write_text(SECRET)
    shutil.copy(empty_store, store)
    folder = planted(tmp_path / "run", f"sqlite:///{store}", {"path": path.format(secret=key)})
    if prepare:
        prepare(tmp_path / "run", key)
    with pytest.raises(OutboxError, match=r"is not uploaded|is a link"):
        OutboxClient(folder).send()
    assert num_left(folder) == 1
    assert set(files_with(tmp_path, SECRET)) == {
        key,
        *([] if prepare is None else files_with(tmp_path / "run", SECRET)),
    }
    assert not (tmp_path / "mlartifacts").exists()


@pytest.mark.parametrize("folder", ["../../elsewhere", "/elsewhere"])
def test_an_artefact_stays_among_those_of_its_run(folder: str, empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    outbox = planted(tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db", {"path": "notes.txt", "folder": folder})
    (tmp_path / "run" / "notes.txt").write_text("a note")
    with pytest.raises(OutboxError, match="must be a path below the run's artefacts"):
        OutboxClient(outbox).send()


def test_a_server_that_only_the_run_names_is_sent_nothing(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    run_dir, uri = tmp_path / "run", f"http://{recorder.place}"
    planted(run_dir, uri)
    assert status_of("sync", str(run_dir)) == 1
    assert f"names the tracking store {uri}, which you have not used from here" in capsys.readouterr().out
    config = compose(["tracking.uri=sqlite:///mine.db"])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(ConfigError, match=f"if it is right, name it: tracking.uri={uri}"):
        resumed([f"resume={run_dir}"], run_dir)
    assert recorder.requests == []
    assert resumed([f"resume={run_dir}", f"tracking.uri={uri}"], run_dir).tracking.uri == uri
    status_of("sync", str(run_dir), "--uri", uri)
    assert recorder.requests
    confirm(uri, run_dir, "")  # it has been named now


def test_a_store_is_known_by_a_setting_or_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        remember("http://mine:5000")
    for uri in ("http://mine:5000", absolute("sqlite:///mlflow.db")):
        confirm(uri, tmp_path, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@other:5000")
    confirm("http://other:5000", tmp_path, "")
    for uri in ("http://mine:500", "http://mine:5000/x", absolute("sqlite:///other.db")):
        with pytest.raises(ConfigError, match="which you have not used"):
            confirm(uri, tmp_path, "")
    (record,) = (tmp_path / "state").rglob("tracking_stores")
    assert record.read_text() == "http://mine:5000\n"


@pytest.mark.parametrize("creation", [{"uid": "x' OR ''='"}, {"uri": 5}, {"experiment": None}, {"tags": "none"}])
def test_a_damaged_creation_is_one_message(
    creation: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(tmp_path / "run", **({"uri": "sqlite:///mlflow.db"} | creation))
    assert status_of("sync", str(tmp_path / "run")) == 1
    assert "is damaged: its first operation does not create a run" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"number": -1}', '{"number": 1, "x": 2}', "[" * 100_000])
def test_a_damaged_record_of_what_was_sent_is_one_message(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted(tmp_path / "run", absolute("sqlite:///mlflow.db"))
    (folder / "sent.json").write_text(content)
    assert status_of("sync", str(tmp_path / "run")) == 1
    assert "sent.json is damaged; delete it to send everything again" in capsys.readouterr().err


def test_an_outbox_is_not_written_through_links(tmp_path: Path) -> None:
    for name, target in (("folder", "outbox"), ("file", "outbox/operations.jsonl")):
        (tmp_path / name / "run" / target).parent.mkdir(parents=True)
        elsewhere = tmp_path / name / "elsewhere"
        elsewhere.mkdir() if name == "folder" else elsewhere.write_text("precious")
        (tmp_path / name / "run" / target).symlink_to(elsewhere)
        with pytest.raises(ConfigError, match="cannot be written"):
            Outbox(tmp_path / name / "run" / "outbox")
    assert (tmp_path / "file" / "elsewhere").read_text() == "precious"
    assert list((tmp_path / "folder" / "elsewhere").iterdir()) == []


# Stores


def test_a_relative_database_is_resolved_once(tmp_path: Path) -> None:
    config = compose(["tracking.uri='sqlite:///a%20b.db?timeout=60'"])
    database = Path.cwd() / "a b.db"
    connect(config.tracking.uri)
    assert database.is_file()
    assert list(Path.cwd().iterdir()) == [database]
    (tmp_path / "other").mkdir()
    os.chdir(tmp_path / "other")
    assert absolute(config.tracking.uri) == config.tracking.uri
    client = connect(config.tracking.uri)
    assert client.search_experiments()[0].name == "Default"
    assert client._tracking_client.store.engine.url.query == {"timeout": "60"}
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:///t.db?timeout=soon", "sqlite:///t.db?no_such=1", "sqlite://", "sqlite:///:memory:"),
        *("sqlite:///file:t.db?mode=ro&uri=true", "sqlite://host/t.db", "http://127.0.0.1:9?x=1", "other://x"),
    ],
)
def test_an_address_that_cannot_work_is_refused_at_once(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri=.* cannot be used"):
        check_reachable(compose([f"tracking.uri='{uri}'"]).tracking.uri)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("setting", ["tracking.experiment=''", "tracking.uri=mlruns"])
def test_a_setting_that_mlflow_refuses_is_refused_at_once(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0] + "=.*is not allowed"):
        compose([setting])


def test_an_experiment_may_be_called_by_a_number() -> None:
    assert compose(["tracking.experiment=2026"]).tracking.experiment == "2026"


def test_the_environment_names_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///from_env.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    here = Path.cwd()
    assert dict(compose([]).tracking, max_logged_clients=0) == {
        "uri": f"sqlite:///{here / 'from_env.db'}",
        "experiment": "mine",
        "on_unreachable": "stop",
        "metrics": "headline",
        "register_model": None,
        "max_logged_clients": 0,
    }
    assert compose(["tracking.uri=sqlite:///mlflow.db"]).tracking.uri == f"sqlite:///{here / 'mlflow.db'}"
    assert compose(["tracking.experiment=fellrec"]).tracking.experiment == "fellrec"


def test_a_deleted_experiment_is_known_at_the_start(
    empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    check_reachable(uri, experiment="mine")
    client.delete_experiment(client.create_experiment("mine"))
    with pytest.raises(ConfigError, match="tracking.experiment=mine was deleted from"):
        check_reachable(uri, experiment="mine")
    check_reachable(uri, may_be_away=True, experiment="mine")
    assert "metrics are recorded in the run directory and sent later" in caplog.text


def test_a_locked_database_does_not_stop_a_resumed_run(
    empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_store, path)
    lock = sqlite3.connect(path)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigError, match=r"locked\nto train anyway and sync later: tracking.on_unreachable=keep"):
        check_reachable(f"sqlite:///{path}?timeout=0.1")
    check_reachable(f"sqlite:///{path}?timeout=0.1", may_be_away=True)
    lock.rollback()
    lock.close()
    assert "is unreachable; metrics are recorded" in caplog.text


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "bookmarks.db") as database:
        database.execute("CREATE TABLE bookmarks (address TEXT)")
    before = (tmp_path / "bookmarks.db").read_bytes()
    with pytest.raises(ConfigError, match="bookmarks.db is a database of another program"):
        check_reachable(f"sqlite:///{tmp_path / 'bookmarks.db'}")
    assert (tmp_path / "bookmarks.db").read_bytes() == before


def test_a_resumed_run_needs_only_its_own_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mine.db'}"
    remember(uri)
    planted(tmp_path / "run", uri)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(compose([])))
    Path("mlflow.db").write_text("no database")
    config = resumed(["resume=run"], tmp_path / "run")
    assert config.tracking.uri == uri
    check_reachable(config.tracking.uri, may_be_away=True)


@pytest.mark.parametrize(
    ("uri", "how"),
    [
        ("sqlite:///mlflow.db", "fellrec ui"),
        ("sqlite:///other.db", "fellrec ui tracking.uri=sqlite:///{here}/other.db"),
        ("sqlite:///t.db?timeout=60", "fellrec ui \"tracking.uri='sqlite:///{here}/t.db?timeout=60'\""),
        (f"http://me:{SECRET}@127.0.0.1:5055", "http://127.0.0.1:5055"),
    ],
)
def test_the_store_that_is_used_is_printed(uri: str, how: str) -> None:
    shown = finish_message(Path("run"), compose([f"tracking.uri='{uri}'"]))
    assert shown.endswith(f"open it by: {how.format(here=Path.cwd())}")
    assert SECRET not in shown


# What is logged, and what is not


def test_long_values_are_logged_whole(empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLflow takes parameters of 6,000 characters and tags of 8,000."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    log = RunLog(tmp_path, NewRun(f"sqlite:///{tmp_path / 'mlflow.db'}", "fellrec", "run", {}))
    log.log_params({"data.root": "a" * 6000, "longer": "b" * 6001})
    log.set_tag("error", "c" * 8000)
    log.close()
    run = connect(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(str(log.run_id))
    assert run.data.params == {"data.root": "a" * 6000, "longer": "b" * 6000}
    assert run.data.tags["error"] == "c" * 8000
    assert [r.getMessage() for r in caplog.records if r.name == "fellrec.tracking.run_log"] == [
        "MLflow gets the first 6000 of the 6001 characters of longer"
    ]


def test_no_name_or_text_keeps_the_rest_from_being_sent(empty_store: Path, tmp_path: Path) -> None:
    """MLflow refuses each of these as it is, and all that comes after it stays in the outbox."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    log = RunLog(tmp_path, NewRun(f"sqlite:///{tmp_path / 'mlflow.db'}", "fellrec", "run", {"long": "x" * 9000}))
    log.log_params({"a=ü*": 1, "b" * 251: 2, "/c//../d": 3, "": 4})
    log.log_metrics({"*": 1, "../e/": 2, "f" * 300: 3}, 0, once="round")
    log.log_dataset("n" * 501, "d" * 40, "s" * 70_000, {})
    log.set_tag("error", "a file\udc80name")
    log.close()
    assert num_left(tmp_path / "outbox") == 0
    run = connect(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(str(log.run_id))
    assert run.data.params == {"a": "1", "b" * 250: "2", "c/d": "3", "unnamed": "4"}
    assert run.data.metrics == {"unnamed": 1, "e": 2, "f" * 250: 3}
    assert run.data.tags["error"] == "a file?name"
    assert run.info.status == "FINISHED"


def test_secrets_of_the_environment_are_not_logged(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXY_PASSWORD", SECRET)
    log = RunLog(tmp_path, NewRun(f"sqlite:///{tmp_path / 'x.db'}", "fellrec", "run", {"note": f"http://a:{SECRET}@b"}))
    log.set_tag("error", f"no answer to {SECRET}")
    log._outbox.close()
    assert first_operation(tmp_path / "outbox").fields["tags"]["note"] == "http://***@b"
    assert [operation.fields["value"] for operation in operations(tmp_path / "outbox") if operation.kind == "tag"] == [
        "no answer to ***"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("without", ["~callbacks.mlflow", "tracking.uri=null"])
def test_a_run_without_tracking_touches_no_store(
    without: str, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *tiny_overrides, "trainer.num_rounds=1", "references.show=[]", "run_dir=run", without])
    assert [path.name for path in Path.cwd().iterdir()] == ["run"]
    assert not Path("run/outbox").exists()
    assert "MLflow" not in capsys.readouterr().out
    assert Path("run/clients.csv").is_file()


# The user interface


def test_the_ui_may_be_used_under_names_that_are_given() -> None:
    command = ui_command(f"sqlite:///{Path.cwd() / 'mlflow.db'}", "0.0.0.0", 5055, ["node17"])
    assert command[command.index("--allowed-hosts") + 1].split(",") == [
        *("localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", "[::1]", "[[]::1]:*", "node17", "node17:*"),
    ]
    assert "http://node17:5055" in command[command.index("--cors-allowed-origins") + 1].split(",")


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_the_ui_needs_a_port(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("ui", f"--port={port}") == 1
    assert f"--port {port} is not allowed: a whole number from 1 to 65535" in capsys.readouterr().err


def test_the_ui_fails_if_its_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert status_of("ui", "--port", str(port)) == 1
    assert f"--host 127.0.0.1 --port {port} cannot be used: Address already in use" in capsys.readouterr().err


def test_the_ui_says_under_which_names_it_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("fellrec.cli.ui._serve", lambda command, _: started.append(command))
    monkeypatch.setattr("fellrec.cli.ui._check_port", lambda *_: None)
    main(["ui", "--host", "node17", "--allowed-hosts", "node17.cluster, node17"])
    main(["ui"])
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert "under the name node17, node17.cluster (others: --allowed-hosts, or MLFLOW_SERVER_ALLOWED_HOSTS)" in lines[0]
    assert lines[1] == "Runs: http://node17:5000/#/experiments?workflowType=machine_learning"
    assert "under the name localhost (others: --allowed-hosts" in lines[2]
    assert lines[3] == "Runs: http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
    assert "--allowed-hosts" not in started[1]
    for address in ("null", "http://127.0.0.1:5000"):
        assert status_of("ui", f"tracking.uri={address}") == 1


def test_operations_are_plain_json(tmp_path: Path) -> None:
    folder = planted(tmp_path / "run", "sqlite:///mlflow.db")
    with (folder / "operations.jsonl").open("a") as file:
        file.write(json.dumps({"n": 1, "kind": ["tag"], "time": "now"}) + "\n")
    with pytest.raises(Exception, match="operation 1 has no kind or no time"):
        list(operations(folder))
