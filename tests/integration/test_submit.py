"""``fellrec submit`` where there is no SLURM: everything is checked first, and a dry run only shows."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.config.stored import to_yaml

ROOT = Path(__file__).resolve().parents[2]
READY = ROOT / "experiments" / "slurm"
COMMANDS = dict(re.findall(r"\((\w+)\.sbatch\).*\n\n    fellrec (submit .*)\n", (READY / "README.md").read_text()))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.stem for path in READY.glob("*.sbatch")))
def test_the_ready_files_are_what_the_command_writes(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "ml-1m").mkdir()
    main([*shlex.split(COMMANDS[name]), "--dry-run"])
    script = capsys.readouterr().out
    assert script.replace(str(workplace), "/path/to/project") == (READY / f"{name}.sbatch").read_text()
    assert [path.name for path in workplace.iterdir()] == ["ml-1m"], "a dry run writes nothing"
    checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_kind_of_job_has_a_ready_file() -> None:
    assert set(COMMANDS) == {path.stem for path in READY.glob("*.sbatch")} == {
        *("one_node", "several_nodes", "array", "container")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aggregation=fedavgg"], "unknown aggregation 'fedavgg'"),
        (["aggregation.alpha=-1"], "alpha"),
        (["data=ml_1m", "data.root=nowhere"], "data.root="),
        (["launcher.nodez=2"], "unknown setting 'launcher.nodez'; choose from: launcher.nodes, "),
        (["+launcher.nodez=2"], "unknown setting 'launcher.nodez'; choose from: launcher.nodes, "),
        (["launcher.nodes=0"], "launcher.nodes=0 is not allowed: a whole number of at least 1"),
        (["launcher.setup=x"], "launcher.setup=x is not allowed: a list"),
        (["launcher.job_name='a\tb'"], "launcher.job_name='a\\tb' is not allowed: one line of text"),
        (["aggregation=fedavg,fellrec"], "several values of a setting make a sweep: fellrec submit -m"),
        (["-m", "aggregation=fedavg,fellrec", "trainer.num_rounds=1,0"], "trainer.num_rounds=0 is not allowed"),
        (["split=executed", "split.transport=distributed"], "split.transport=distributed needs at least 2 processes"),
        (["split=executed", "launcher.nodes=2"], "is not allowed with split.transport=inprocess: it has one process"),
        (["resume=nowhere"], "resume=nowhere: no config.yaml there"),
    ],
)
def test_mistakes_get_one_message_and_nothing_is_written(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["submit", *arguments])
    shown = capsys.readouterr()
    assert done.value.code == 1
    assert message in shown.err
    assert shown.out == ""
    assert not list(workplace.iterdir())


def test_what_ends_badly_on_most_clusters_is_warned_of(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One writer of a sqlite store is allowed, and so are all settings that were given."""
    several = ["submit", "-m", "seed=0,1,2", "--dry-run"]
    main([*several, "launcher.gpus_per_node=1"])
    found = [record.getMessage() for record in caplog.records]
    assert [text.split(" is not set")[0] for text in found[:3]] == [
        *("launcher.cpus_per_task", "launcher.memory", "launcher.time")
    ]  # fmt: skip
    assert found[3].startswith("3 jobs write to sqlite:///")
    caplog.clear()
    main([*several, "launcher.time=60", "launcher.max_parallel=1"])
    assert not caplog.records


def test_without_sbatch_the_run_directory_is_not_kept(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(workplace))
    with pytest.raises(SystemExit):
        main(["submit", "run_dir=run"])
    assert "sbatch not found: run this on a SLURM login node" in capsys.readouterr().err
    assert not list(workplace.iterdir())


def test_a_directory_that_another_job_has_reserved_is_refused(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "run" / "slurm").mkdir(parents=True)
    for verb in ("submit", "train"):
        with pytest.raises(SystemExit):
            main([verb, "run_dir=run"])
        assert "run_dir=run exists and is not empty" in capsys.readouterr().err


def test_a_run_goes_on_with_other_resources(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workplace / "my run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(compose(["seed=3"])))
    main(["submit", f"resume={run}", "launcher.time=2:00:00", "--dry-run"])
    script = capsys.readouterr().out
    assert f"run_dir='{run}'" in script
    assert "#SBATCH --time=2:00:00" in script
    assert "#SBATCH --job-name=synthetic-fellrec-s3" in script
    with pytest.raises(SystemExit):
        main(["submit", f"resume={run}", "seed=4", "--dry-run"])
    assert "'seed=4' is not allowed: a run keeps its own configuration" in capsys.readouterr().err
