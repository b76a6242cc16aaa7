"""Troubles with configurations, the command line, run directories and batch scripts: each was reported or tried."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.config.stored import moved, read_config
from fellrec.config.sweep import expand
from fellrec.errors import CheckpointError, ConfigError
from fellrec.experiment.run_dir import note_versions, provenance
from fellrec.experiment.versions import commit_of, git_commit
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.launch.settings import LauncherSettings
from fellrec.launch.slurm import Job, JobEnvironment, batch_script
from fellrec.state.files import write_checked

ROOT = Path(__file__).resolve().parents[2]

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
        ("seed: ${oc.env:HOME}\n", "has an interpolation"),
        ("data:\n  name: ${oc.decode:x}\n", "has an interpolation"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("a: " + 40 * "[" + 40 * "]" + "\n", "too many levels"),
        ("a: !!python/object/apply:os.system [touch ran]\n", "cannot be read"),
        ("a: [1\n", "cannot be read"),
        ("- 1\n", "has no settings"),
        ("format: 1\n", "callbacks=None is not allowed"),
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


def test_ctrl_c_several_times_counts_once() -> None:
    """Three SIGINTs within 100 ms: the first raises, the others do not interrupt what cleans up after it."""
    code = (
        "import atexit, os, signal, sys, time\n"
        "from fellrec.cli import main, train\n"
        "def interrupt(*_):\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.02)\n"
        "def run(options):\n"
        "    try:\n        interrupt()\n    finally:\n        interrupt(); print('cleaned up', flush=True)\n"
        "train.run = run\n"
        "atexit.register(lambda: (interrupt(), print('left', flush=True)))\n"
        "sys.argv = ['fellrec', 'train']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")) == (130, ["cleaned up", "left", ""])
    assert done.stderr == "\nfellrec train: interrupted\n"


@pytest.mark.parametrize(("body", "status"), [("pass", 0), ("raise FellrecError('wrong')", 1)])
def test_ctrl_c_after_the_end_does_not_interrupt_exit_handlers(body: str, status: int) -> None:
    """MLflow has exit handlers; an interrupt there was a traceback, with status 0."""
    code = (
        "import atexit, os, signal, sys, time\n"
        "from fellrec.cli import main, train\n"
        "from fellrec.errors import FellrecError\n"
        f"def run(options):\n    {body}\n"
        "train.run = run\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.02), print('left', flush=True)))\n"
        "sys.argv = ['fellrec', 'train']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "left\n")
    assert done.stderr == ("" if status == 0 else "fellrec train: wrong\n")


GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z"]


def committed(folder: Path) -> str:
    """Commit everything in a folder, which becomes a repository; gives the commit."""
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "thesis"]):
        subprocess.run([*GIT, *arguments], cwd=folder, check=True, capture_output=True)
    return subprocess.run([*GIT, "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True).stdout[
        :-1
    ]


def test_the_commit_is_fellrecs_own_wherever_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = committed(tmp_path)
    monkeypatch.chdir(tmp_path)
    git_commit.cache_clear()
    assert git_commit().partition("-")[0] != users
    assert commit_of(tmp_path) == users, "it is found for a checkout of fellrec there"


def change(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("changed\n")


@pytest.mark.parametrize(
    ("changed", "mark"),
    [
        ("src/code.py", "-dirty"),
        ("src/new.py", "-dirty"),
        ("conf/trainer.yaml", "-dirty"),
        ("src/code.pyc", ""),
        ("README.md", ""),
        ("runs/results.json", ""),
    ],
)
def test_a_commit_whose_source_was_changed_is_marked(changed: str, mark: str, tmp_path: Path) -> None:
    """As `git describe --dirty` does, but of what fellrec computes with: its code and its configuration."""
    for file in ("src/code.py", "conf/trainer.yaml", "README.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("as committed\n")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    commit = committed(tmp_path)
    assert commit_of(tmp_path) == commit
    change(tmp_path / changed)
    assert commit_of(tmp_path) == commit + mark


def test_a_commit_that_cannot_be_found_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(tmp_path) == "unknown"
    committed(tmp_path)
    (tmp_path / "inside").mkdir()
    assert commit_of(tmp_path / "inside") == "unknown", "a folder inside another repository is no checkout of fellrec"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == "unknown", "git is not installed"


def test_versions_and_threads_are_recorded_and_a_resume_with_others_says_so(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = str(torch.get_num_threads())
    recorded = json.loads((run_dir / "versions.json").read_text())
    assert recorded["num_threads"] == now
    note_versions(run_dir)
    assert not caplog.records
    assert provenance(run_dir).num_threads == now
    (run_dir / "versions.json").write_text(json.dumps({**recorded, "num_threads": "64", "torch": "1.0"}))
    assert provenance(run_dir).num_threads == f"64 then {now}", "as `evaluate` says"
    note_versions(run_dir)
    assert f"num_threads 64 (now {now})" in caplog.text
    assert "OMP_NUM_THREADS=64" in caplog.text
    assert "torch 1.0 (now" in caplog.text
    noted = json.loads((run_dir / "versions.json").read_text())
    assert noted == {**recorded, "num_threads": f"64 then {now}", "torch": f"1.0 then {recorded['torch']}"}
    assert provenance(run_dir).num_threads == f"64 then {now}"
    caplog.clear()
    note_versions(run_dir)
    assert not caplog.records, "the second resume has what the first one had"


def test_versions_of_someone_elses_run_are_not_printed_if_they_are_no_versions(run_dir: Path) -> None:
    odd = {"git_commit": "\x1b[2J", "num_threads": ["1"], "fellrec": "9" * 100_000}
    (run_dir / "versions.json").write_text(json.dumps(odd))
    assert provenance(run_dir) == provenance()


@pytest.mark.parametrize("sweep", sorted((ROOT / "experiments").glob("*/sweep.sh")), ids=lambda path: path.parent.name)
def test_every_sweep_sets_the_number_of_threads(sweep: Path, tmp_path: Path) -> None:
    """Every command of a sweep has one thread, or the number that the user sets."""
    said = tmp_path / "said"
    (tmp_path / "say").write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" >> "{said}"\n')
    (tmp_path / "say").chmod(0o755)
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    tools = {"FELLREC": str(tmp_path / "say"), "PYTHON": str(tmp_path / "say")}
    for chosen, expected in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        said.unlink(missing_ok=True)
        command = ["sh", str(sweep), str(tmp_path / "out"), "a", "b", "c"]
        subprocess.run(command, env={**unset, **tools, **chosen}, check=True, capture_output=True)
        assert set(said.read_text().split("\n")[:-1]) == {expected}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("run_dir=2026", "2026"),
        ("run_dir=1e3", "1e3"),
        ("run_dir=007", "007"),
        ("run_dir=true", "true"),
        ("run_dir=cmp/fedavg-learning_rate=0.001-s0/adapters", "cmp/fedavg-learning_rate=0.001-s0/adapters"),
        ("run_dir=büro=1", "büro=1"),
        ("run_dir=data (copy)", "data (copy)"),
        ("run_dir=it's [here]", "it's [here]"),
        ("run_dir=[here]", "[here]"),
        ("run_dir='quoted for Hydra'", "quoted for Hydra"),
        ("run_dir=with:colon", "with:colon"),
        ("tracking.experiment=2026", "2026"),
    ],
)
def test_names_and_paths_need_no_quotes(text: str, wanted: str) -> None:
    """Their text is taken as it stands, as ``resume=PATH`` is, in one run and in sweeps."""
    key = text.partition("=")[0]
    assert OmegaConf.select(compose([text]), key) == wanted
    (run, other) = expand([text, "seed=0,1"])
    assert [OmegaConf.select(compose(given), key) for given in (run, other)] == [wanted, wanted]


def test_null_several_values_and_interpolations_of_paths_keep_their_meaning() -> None:
    assert compose(["run_dir=null"]).run_dir is None
    assert compose(["run_dir=runs/${seed}", "seed=3"]).run_dir == "runs/3"
    assert expand(["run_dir=a,b"]) == [["run_dir=a"], ["run_dir=b"]]


@pytest.mark.parametrize(
    ("overrides", "offered", "other"),
    [
        ("data=atomic data.root=x data.reader.title_colum=title", "data.reader.title_column", "habit_rate"),
        ("adapter=lora adapter.r=4", "adapter.rank", "num_heads"),
        ("backbone=hf backbone.path=model backbone.dtyp=bfloat16", "backbone.dtype", "num_heads"),
        ("aggregation=fedavg aggregation.alpha=1", "aggregation._target_", "aggregation.beta"),
    ],
)
def test_the_settings_that_are_offered_are_those_of_the_chosen_group(overrides: str, offered: str, other: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides.split())
    assert offered in str(caught.value)
    assert other not in str(caught.value)


def test_a_multirun_writes_its_runs_into_its_run_dir(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``fellrec submit -m`` does; and a folder with files is refused before the first run."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    monkeypatch.setattr("fellrec.cli.train.train", lambda config, _, folder: made.append(folder))
    monkeypatch.setattr("sys.argv", ["fellrec"])
    main(["train", "-m", "aggregation=fedavg,fellrec", "aggregation.alpha=0.3,0.7", "run_dir=here"])
    names = ["000-fedavg-s0", "001-fellrec-s0", "002-fellrec-s0"]
    assert made == [tmp_path / "here" / name for name in names]
    alphas = [read_config(folder).aggregation.get("alpha") for folder in made]
    assert alphas == [None, 0.3, 0.7], "what each run is was written before the first one starts"
    made.clear()
    with pytest.raises(SystemExit):
        main(["train", "-m", "seed=0,1", "run_dir=here"])
    assert not made


@pytest.mark.parametrize(
    ("options", "is_nv"),
    [
        ("{gres: gpu:1}", True),
        ("{gres: 'gpu:a100:2,shard:1'}", True),
        ("{gres: 'lustre:1,gpu'}", True),
        ("{gpus: 4}", True),
        ("{gpus: a100:2}", True),
        ("{gpus-per-task: 1}", True),
        ("{gpus-per-node: 2}", True),
        ("{gpus-per-socket: 'volta:1'}", True),
        ("{tres-per-task: 'gres/gpu:1'}", True),
        ("{tres-per-task: 'cpu=2,gres/gpu=1'}", True),
        ("{tres-per-job: 'gres:gpu:1'}", True),
        ("{gres: 'lustre:1'}", False),
        ("{gres: none}", False),
        ("{gres: 'gpu:0'}", False),
        ("{gpus: 0}", False),
        ("{constraint: gpu}", False),
        ("{exclusive: true}", False),
    ],
)
def test_gpus_of_every_option_are_given_to_the_container(
    capsys: pytest.CaptureFixture[str], options: str, is_nv: bool
) -> None:
    main(["submit", "--dry-run", "launcher.container=/images/f.sif", f"launcher.options={options}"])
    assert ("apptainer exec --nv /images/f.sif" in capsys.readouterr().out) == is_nv


def test_no_line_break_gets_into_a_batch_script(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "x\ntouch /tmp/owned\n#"
    for overrides in ([f"data.name='{evil}'"], [f"+launcher.options.comment='{evil}'"], [f"run_dir='{evil}'"]):
        assert "one line" in refused(capsys, "submit", "--dry-run", *overrides)
    store(run_dir, put("data.name", evil))
    assert "one line" in refused(capsys, "submit", "--dry-run", "resume=run")
    with pytest.raises(ConfigError, match="one line"):
        batch_script(LauncherSettings(), [Job(Path("/x"), ())], JobEnvironment(evil, Path("/x"), "/x", "python"))


def test_names_with_brackets_and_colons_are_shown_as_they_are(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["prepare", *tiny_overrides, "data.name=[red]:bomb: data[bold]", f"cache_dir={tmp_path / '[blue]'}"])
    shown = capsys.readouterr().out
    assert "[red]:bomb: data[bold], key" in shown
    assert f"{tmp_path / '[blue]'}" in shown.replace("\n", "")


def test_moved_data_are_found_where_the_command_says(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A place that the run does not have, or another setting, is refused; the hash of the data decides."""
    files = "data.root, data.path, data.items, data.users"
    places = f"Only {files}, backbone.path, cache_dir, participation.sampler.path can be changed"
    assert places in refused(capsys, "evaluate", "run", "seed=1")
    assert "can be changed" in refused(capsys, "evaluate", "run", "data.root=x")
    new = tmp_path / "büro=1 (copy)"
    assert moved(read_config(run_dir), [f"cache_dir={new}"]).cache_dir == str(new)
    (run_dir / "data.json").write_text(json.dumps({"key": "other"}))
    assert "the data changed since" in refused(capsys, "evaluate", "run")
    assert "the data changed since" in refused(capsys, "train", "resume=run")


@pytest.mark.parametrize("key", ["participation.on_failure", "partition._target_", "trainer.checkpoint_every"])
@pytest.mark.parametrize(
    "value", ["\x1b]0;title\x07\x1b[2J\x9b2J", "x" * 20_000, [1] * 9_000], ids=["terminal", "long", "list"]
)
def test_a_message_has_little_of_a_file_and_nothing_that_a_terminal_obeys(
    run_dir: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OmegaConf.load(run_dir / "config.yaml")
    OmegaConf.update(config, key, value)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", "run"])
    shown = capsys.readouterr().err
    assert shown.startswith("fellrec evaluate: ")
    assert len(shown) < 3000
    assert shown.count("\n") == 1
    assert shown.rstrip("\n").isprintable()


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_no_entry_of_a_cache_is_written_where_a_run_directory_says(
    run_dir: Path, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``evaluate`` made folders in ``/etc``, which a stored configuration named."""
    monkeypatch.setenv("FELLREC_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    config = OmegaConf.load(run_dir / "config.yaml")
    config.cache_dir = str(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(config))
    main(["evaluate", "run"] if verb == "evaluate" else ["train", "resume=run"])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert len(list((tmp_path / "own" / "data").iterdir())) == 1
    assert "which has no entries of a cache" in caplog.text


@pytest.mark.parametrize("name", ["round_x", "round_", "round_-1", "round_١٢٣٤٥", "round_" + "9" * 200])
def test_files_beside_checkpoints_are_none(run_dir: Path, name: str) -> None:
    (run_dir / "checkpoints" / f"{name}.json").write_text("{}")
    assert CheckpointFolder(run_dir / "checkpoints").rounds() == [1, 2]


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    """The first import of the command line, and that of a verb, raise what a signal raises there."""
    for module in ("fellrec.cli.main", "fellrec.launch.slurm"):
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == {module!r}:\n            raise KeyboardInterrupt\nsys.meta_path.insert(0, Finder())\n"
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        found = subprocess.run(
            [sys.executable, "-m", "fellrec", "doctor"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode, found.stderr) == (130, "\nfellrec: interrupted\n")
