"""Troubles with configurations, the command line, run directories and batch scripts: each was reported or tried."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fellrec.cli.main import main
from fellrec.config.stored import read_config
from fellrec.errors import CheckpointError, ConfigError
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.state.files import write_checked

MODULE = """
from pathlib import Path
Path({mark!r}).touch()

from fellrec.aggregation import FedAvg
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.exchange import Transform


class Rule(FedAvg):
    pass


class Callback(FederatedCallback):
    pass


class Change(Transform):
    pass
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """Folder with a finished run ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(["train", *tiny_overrides, "trainer.num_rounds=1", "references.show=[popularity]", "run_dir=run"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the current folder."""
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail by one message; gives the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert done.value.code == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def store(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a stored configuration."""
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for name in parents:
            config = config[name]
        config[last] = value

    return change


COMMANDS = (("evaluate", "run"), ("train", "resume=run"), ("submit", "resume=run", "--dry-run"))


@pytest.mark.parametrize(
    ("key", "command"),
    [
        *((key, COMMANDS[0]) for key in ("holdout", "partition", "data.reader", "objective", "ranker", "aggregation")),
        *(("adapter", command) for command in COMMANDS),
        ("callbacks.progress", COMMANDS[1]),
    ],
)
def test_a_run_directory_is_data(
    run_dir: Path, capsys: pytest.CaptureFixture[str], key: str, command: tuple[str, ...]
) -> None:
    """``os.system`` under any key is neither called nor looked up, and neither is another name for it."""
    mark = run_dir.parent / "ran"
    for name in ("os.system", "fellrec.state.files.os.system", "fellrec.__main__.main", "posix.system"):
        store(run_dir, put(key, {"_target_": name, "command": f"touch {mark}"}))
        assert f"_target_={name}" in (shown := refused(capsys, *command)) or f"names {name}" in shown
        assert not mark.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("aggregation", {"_target_": "hostile_module.Rule"}),
        ("callbacks.mine", {"_target_": "hostile_module.Callback"}),
        ("exchange.transforms", [{"_target_": "hostile_module.Change"}]),
        ("trainer.plugins", [{"_target_": "hostile_module.Change"}]),
    ],
)
def test_a_class_of_others_is_not_even_imported(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    mark = run_dir.parent / "imported"
    (run_dir.parent / "hostile_module.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(run_dir.parent))
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    store(run_dir, put(key, value))
    for command in COMMANDS:
        assert "--trust hostile_module." in refused(capsys, *command)
    assert not mark.exists()


def test_the_users_word_lets_a_class_of_others_be_used(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir.parent / "trusted_module.py").write_text(MODULE.format(mark=str(run_dir.parent / "imported")))
    monkeypatch.syspath_prepend(str(run_dir.parent))
    store(run_dir, put("aggregation", {"_target_": "trusted_module.Rule"}))
    trust = ["--trust", "trusted_module.Rule"]
    main(["evaluate", "run", *trust, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["data"] == "synthetic"
    main(["submit", "resume=run", "--dry-run", *trust])
    assert "--trust trusted_module.Rule" in capsys.readouterr().out, "the job needs the user's word again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: ${oc.env:HOME}\n", "seed has an interpolation"),
        ("data:\n  name: ${oc.decode:x}\n", "data.name has an interpolation"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("a: " + 40 * "[" + 40 * "]" + "\n", "too many levels"),
        ("a: !!python/object/apply:os.system [touch ran]\n", "cannot be read"),
        ("a: [1\n", "cannot be read"),
        ("- 1\n", "has no settings"),
        ("format: 1\n", "no settings under"),
        ("a: " + 300_000 * "x" + "\n", "more than"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_stored_configuration_is_plain_values(run_dir: Path, text: str, message: str) -> None:
    (run_dir / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(run_dir)
    assert not (run_dir.parent / "ran").exists()


def test_a_setting_that_is_newer_than_a_run_has_its_default(run_dir: Path) -> None:
    store(run_dir, lambda config: config["trainer"].pop("gradient_clip"))
    assert read_config(run_dir).trainer.gradient_clip == 1.0


def test_a_callback_of_a_stored_configuration_cannot_write_elsewhere(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(run_dir, put("callbacks.outputs.run_dir", str(run_dir.parent / "elsewhere")))
    assert "callbacks.outputs.run_dir is not allowed" in refused(capsys, "train", "resume=run")


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/tensors", "adapters/client_00", "outbox"])
def test_links_of_a_run_directory_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str], inside: str) -> None:
    """Resuming deletes what no checkpoint needs: behind a link, the user's own files."""
    elsewhere = run_dir.parent / "precious"
    if (run_dir / inside).exists():
        shutil.move(run_dir / inside, elsewhere)
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "thesis.tex").write_text("three years")
    (run_dir / inside).symlink_to(elsewhere)
    for command in (*COMMANDS, ("export", "run", "--format", "trec")):
        assert f"{run_dir / inside} is a link" in refused(capsys, *command)
    assert (elsewhere / "thesis.tex").read_text() == "three years"


def test_a_pipe_in_a_run_directory_is_refused_and_not_waited_for(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(run_dir / "checkpoints" / "round_00009.json")
    assert "neither a file nor a directory" in refused(capsys, "train", "resume=run")


@pytest.mark.parametrize("name", ["../../../secret.safetensors", "/etc/passwd", "..", "a\0.safetensors", 5, "x.json"])
def test_a_manifest_names_files_of_its_own_folder_only(run_dir: Path, name: Any) -> None:
    manifest = sorted((run_dir / "checkpoints").glob("round_*.json"))[-1]
    content = json.loads(manifest.read_text())["content"]
    write_checked(manifest, {**content, "files": [*content["files"], name]})
    with pytest.raises(CheckpointError, match="is not the name of one of its files"):
        CheckpointFolder(run_dir / "checkpoints").load({}, content["round_index"])


@pytest.mark.parametrize("content", [5, [], {"format": 3}, {"format": 3, "round_index": 1, "files": [], "states": 3}])
def test_a_manifest_of_another_shape_is_refused(run_dir: Path, content: Any) -> None:
    write_checked(run_dir / "checkpoints" / "round_00007.json", content)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        CheckpointFolder(run_dir / "checkpoints").load({}, 7)


def test_a_state_that_fits_no_run_is_one_message(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for manifest in (run_dir / "checkpoints").glob("round_*.json"):
        content = json.loads(manifest.read_text())["content"]
        content["states"]["population"] = {"rows": {"0": 1}}
        write_checked(manifest, content)
    assert "does not fit this run" in refused(capsys, "evaluate", "run")


@pytest.mark.parametrize(
    "record", [{}, {"host": 1}, [], {"host": "x", "pid": "1", "started": "", "job": None, "restart": 0}]
)
def test_a_damaged_record_of_the_owner_is_one_message(
    run_dir: Path, capsys: pytest.CaptureFixture[str], record: Any
) -> None:
    (run_dir / ".lock-owner").write_text(json.dumps(record))
    assert "does not name the owner" in refused(capsys, "train", "resume=run")
