"""What somebody who did not know the program ran into: each case was reported."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.errors import ConfigError


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail by one message and print no results; gives the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert done.value.code == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert not shown.out
    return " ".join(shown.err.split())


def test_a_run_that_is_not_finished_is_not_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is after Ctrl-C in the second round."""
    (run_dir / "results.json").unlink()
    (run_dir / "rankings.parquet").unlink()
    (run_dir / "checkpoints" / "round_00002.json").unlink()
    for stage in ("val", "test"):
        shown = refused(capsys, "evaluate", "run", "--stage", stage)
        assert "run: round 1 of 2, not finished; resume it: fellrec train resume=run" in shown
    assert "the run is not finished" in refused(capsys, "export", "run", "--format", "trec")


def test_a_run_without_checkpoints_is_not_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    shown = refused(capsys, "evaluate", "run")
    assert "run has no checkpoint, and nothing to evaluate" in shown
    assert "~callbacks.checkpoint" in shown
    assert "resume" not in shown


def test_a_comparison_is_not_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("local-s0", "fedavg-s0"):
        (run_dir.parent / "both" / name).mkdir(parents=True)
        shutil.copy(run_dir / "config.yaml", run_dir.parent / "both" / name)
    hint = "it is a comparison or a sweep; give one of its runs: fedavg-s0, local-s0"
    for command in (
        ("evaluate", "both"),
        ("train", "resume=both"),
        ("submit", "resume=both", "--dry-run"),
        ("export", "both", "--format", "trec"),
    ):
        assert hint in refused(capsys, *command)


def test_sync_skips_files_and_goes_on_after_a_directory_that_is_not_a_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``fellrec sync runs/*``: Hydra writes files there."""
    (run_dir.parent / "multirun.yaml").touch()
    (run_dir.parent / "notes").mkdir()
    for given, code in ((["multirun.yaml", "run"], 0), (["notes", "run"], 1)):
        with pytest.raises(SystemExit) as done:
            main(["sync", *given])
        assert done.value.code == code
        shown = capsys.readouterr()
        assert "run: 0 sent, 0 left" in shown.out
        assert given[0] in shown.err


def test_doctor_writes_nothing(
    run_dir: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where nothing is nor beside the database of a run."""
    monkeypatch.setattr("fellrec.launch.reach.check_all_reduce", lambda *_: "")
    monkeypatch.setenv("COLUMNS", "400")
    shutil.copy(trained / "mlflow.db", run_dir / "used.db")
    before = {path: path.stat().st_mtime_ns for path in run_dir.parent.rglob("*")}
    for file in ("mlflow.db", "run/used.db"):
        with pytest.raises(SystemExit) as done:
            main(["doctor", f"tracking.uri=sqlite:///{file}", "cache_dir=cache", "run_dir=new/run"])
        assert done.value.code == 0, capsys.readouterr().out
    assert "mlflow.db, which the first run creates" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run_dir.parent.rglob("*")} == before


def listing(folder: Path) -> dict[Path, int | None]:
    """Every directory below a folder, and every file with its time."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


def test_doctor_as_a_process_leaves_nothing_behind(trained: Path, tmp_path: Path) -> None:
    """No file or directory of fellrec or of a package that it imports: PyTorch's and matplotlib's caches among them."""
    places = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "tmp"}
    for folder in (*places.values(), here := tmp_path / "here"):
        folder.mkdir()
    shutil.copy(trained / "mlflow.db", here)
    unset = ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "FELLREC_CACHE", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    before = listing(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "fellrec", "doctor"],
        env={**environment, **places, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"},
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{places['HOME']}/.cache/fellrec" in done.stdout
    assert listing(tmp_path) == before


def test_a_multirun_as_json_is_one_list(
    trained: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's lines are on standard error, and it leaves no empty log files."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr("sys.argv", ["fellrec"])
    logging.getLogger().addHandler(handler := logging.StreamHandler(shown := io.StringIO()))
    fast = [*tiny_overrides, "trainer.num_rounds=1", "references.show=[]", "tracking.uri=null"]
    try:
        main(["train", "-m", *fast, "aggregation=local,fedavg", "--format", "json"])
    finally:
        logging.getLogger().removeHandler(handler)
    found = json.loads(capsys.readouterr().out)
    assert [list(run["rules"]) for run in found] == [["local"], ["fedavg"]]
    assert "Launching 2 jobs" in shown.getvalue()
    assert not list(trained.rglob("*.log"))


def test_json_and_settings_of_a_multirun_are_not_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    joblib = refused(capsys, "train", "-m", "seed=0,1", "hydra/launcher=joblib", "--format", "json")
    assert "--format json is not allowed with hydra/launcher=joblib" in joblib
    main(["train", "-m", "seed=0,1", "--show-config"])
    assert [node["seed"] for node in yaml.safe_load_all(capsys.readouterr().out)] == [0, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks.mine._target_=my.Mine"], "unknown callback 'mine'; choose from: "),
        (["callbacks.mine._target_=my.Mine"], "; if it is new, put + before it: +callbacks.mine._target_=…"),
        (
            ["~callbacks.ballance"],
            "unknown callback 'ballance'; choose from: balance, checkpoint, client_metrics, costs, ",
        ),
        (["aggregation._target_=my.Rule", "aggregation.friends=3"], "put + before it: +aggregation.friends=…"),
        (
            ["adapter=full", "adapter.rank=4"],
            "unknown setting 'adapter.rank'; choose from: adapter.layers, adapter._target_; adapter=lora, lora_heads, "
            "lora_mixed, lora_sb have it",
        ),
        (["aggregation=fellrec", "aggregation.mu=1"], "; aggregation=fedamp, fedasync, fedprox have it"),
        (
            ["aggregation=fedavg,fellrec"],
            "aggregation=fedavg,fellrec gives several values: only compare, plan, train -m",
        ),
        (
            ["resume=runs/base"],
            "resume=runs/base is not allowed here: a run is resumed by fellrec train resume=runs/base",
        ),
        (
            ["+resume=runs/base"],
            "resume=runs/base is not allowed here: a run is resumed by fellrec train resume=runs/base",
        ),
    ],
)
def test_messages_say_what_to_write(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert message in str(caught.value)
    if overrides[0].startswith("~"):
        assert "put +" not in str(caught.value)


def test_the_transform_of_the_documentation(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the entries are kept, the largest."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"```python\n# my_transforms.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_transforms.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    transform = importlib.import_module("my_transforms").TopK(0.5)
    update = {"a.weight": torch.tensor([[1.0, -4.0], [3.0, 0.5]])}
    decoded = transform.decode(transform.encode(update, 0, 0))
    assert {name: tensor.tolist() for name, tensor in decoded.items()} == {"a.weight": [[0.0, -4.0], [3.0, 0.0]]}
    given = [*tiny_overrides, "trainer.num_rounds=1", "references.show=[]", "tracking.uri=null"]
    node = "exchange.transforms=[{_target_: my_transforms.TopK, fraction: 0.05}]"
    main(["train", *given, "aggregation=fedavg", node, "run_dir=top"])
    assert (tmp_path / "top" / "results.json").is_file()


def test_a_resumed_run_shows_its_directory_as_before(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "resume=run", f"tracking.uri=sqlite:///{run_dir.parent}/mlflow.db"])
    assert f"Run directory: {run_dir}\n" in capsys.readouterr().out
