"""The batch script: SLURM's notation, quoting of unusual names, rejected values."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.launch.settings import LauncherSettings, seconds_of
from fellrec.launch.slurm import Job, JobEnvironment, batch_script

ODD = """a b'c"d;$(touch hacked)`touch hacked`$HOME\\&|#%=,{x}[y]é"""
"""A name with special characters of bash, sbatch and Hydra."""


def script_of(jobs: list[Job], folder: Path = Path("/work"), **settings: Any) -> str:
    return batch_script(LauncherSettings(**settings), jobs, JobEnvironment("name", folder, "/work/%j.out", "python"))


def options_of(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7 * 60),
        ("7:30", 7 * 60 + 30),
        ("12:00:00", 12 * 3600),
        ("1-6", 30 * 3600),
        ("1-6:30", 30 * 3600 + 30 * 60),
        ("1-6:30:15", 30 * 3600 + 30 * 60 + 15),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_parsed_like_sbatch(text: str, seconds: int | None) -> None:
    """The six forms of ``man sbatch``: min, min:s, h:min:s, d-h, d-h:min, d-h:min:s."""
    assert seconds_of(text) == seconds


def test_one_process_per_gpu_by_default() -> None:
    job = [Job(Path("/run"), [])]
    assert "gpus-per-node" not in options_of(script_of(job))
    assert options_of(script_of(job))["ntasks-per-node"] == "1"
    four = options_of(script_of(job, gpus_per_node=4, nodes=2))
    assert (four["nodes"], four["gpus-per-node"], four["ntasks-per-node"]) == ("2", "4", "4")
    assert options_of(script_of(job, gpus_per_node=4, tasks_per_node=1))["ntasks-per-node"] == "1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["time"]),
        ({"time": "1:00:00"}, []),
        ({"options": {"time": "1:00:00"}}, []),
        ({"gpus_per_node": 1, "time": 60}, ["cpus_per_task", "memory"]),
        ({"options": {"gres": "gpu:2"}, "time": 60}, ["cpus_per_task", "memory"]),
        ({"gpus_per_node": 1, "time": 60, "cpus_per_task": 4, "memory": "64G"}, []),
        ({"gpus_per_node": 1, "time": 60, "options": {"exclusive": True, "mem": 0}}, []),
        ({"gpus_per_node": 1, "time": 60, "options": {"exclusive": False, "mem-per-gpu": "32G"}}, ["cpus_per_task"]),
    ],
)
def test_what_is_left_to_the_site_is_named(settings: dict[str, Any], named: list[str]) -> None:
    """Cores and memory only of jobs with GPUs: others start with what a site gives to everyone."""
    found = list(LauncherSettings(**settings).left_to_the_site())
    assert [re.match(r"launcher\.(\w+) is not set", text)[1] for text in found] == named  # type: ignore[index]


def test_every_setting_is_an_sbatch_option() -> None:
    found = options_of(
        script_of(
            [Job(Path("/run"), [])],
            cpus_per_task=8,
            memory="64G",
            time="12:00:00",
            partition="gpu",
            account="me",
            qos="long",
            job_name="mine",
            signal_seconds=90,
            options={"constraint": "a100", "exclusive": True},
        )
    )
    assert found == {
        **{"job-name": "mine", "chdir": "/work", "output": "/work/%j.out", "open-mode": "append", "nodes": "1"},
        **{"ntasks-per-node": "1", "cpus-per-task": "8", "mem": "64G", "time": "12:00:00", "partition": "gpu"},
        **{"account": "me", "qos": "long", "requeue": "", "signal": "B:USR1@90", "constraint": "a100", "exclusive": ""},
    }
    assert "no-requeue" in options_of(script_of([Job(Path("/run"), [])], requeue=False))
    assert "scontrol requeue" not in script_of([Job(Path("/run"), [])], requeue=False)


def test_a_container_runs_the_same_command() -> None:
    job = [Job(Path("/run"), [])]
    script = script_of(job, container="/images/my image.sif", container_options=["--bind", "/a b"], gpus_per_node=1)
    line = next(line for line in script.splitlines() if line.startswith("srun"))
    assert "apptainer exec --nv --bind '/a b' '/images/my image.sif' python -m fellrec train" in line
    assert "--nv" not in script_of(job, container="/image.sif")


@pytest.mark.parametrize("task", [0, 1])
def test_bash_passes_every_value_unchanged(task: int, tmp_path: Path) -> None:
    """Bash executes the script up to the start of the run, and prints the run's arguments."""
    given = [["seed=1", f"data.root='{number} $(touch hacked); `touch hacked` \"$HOME\" *'"] for number in range(2)]
    jobs = [Job(tmp_path / f"{number}{ODD}", words) for number, words in enumerate(given)]
    script = script_of(jobs, folder=tmp_path / ODD, environment={"A_NAME": ODD}, job_name=ODD)
    runs = script[: script.index("# Rendezvous")]
    exports = re.search(r"^export A_NAME=.*$", script, re.MULTILINE)
    assert exports
    show = "import json, os, sys; print(json.dumps([os.environ['A_NAME'], *sys.argv[1:]]))"
    end = f"""{exports[0]}\n{sys.executable} -c "{show}" "$run_dir" "${{overrides[@]}}"\n"""
    done = subprocess.run(
        ["bash", "-eu", "-c", runs + end],
        env={"SLURM_ARRAY_TASK_ID": str(task), "HOME": "/root", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    value, run_dir, own, *words = json.loads(done.stdout)
    assert value == ODD
    assert run_dir == str(jobs[task].run_dir)
    assert words == given[task]
    assert compose([own]).run_dir == str(jobs[task].run_dir), "Hydra reads the path literally"
    assert not list(tmp_path.iterdir()), "no part of a name was executed"


def test_a_sweep_is_a_job_array() -> None:
    jobs = [Job(Path(f"/{number}"), []) for number in range(6)]
    assert options_of(script_of(jobs))["array"] == "0-5"
    assert options_of(script_of(jobs, max_parallel=2))["array"] == "0-5%2"
    assert "array" not in options_of(script_of(jobs[:1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"job_name": "a\nb"}, "launcher.job_name='a\\nb' is not allowed: one line of text"),
        ({"partition": "a\n#SBATCH --uid=0"}, "launcher.partition="),
        ({"setup": ["module load x", "a\nb"]}, "launcher.setup='a\\nb'"),
        ({"environment": {"A B": 1}}, "launcher.environment has 'A B', which is not a valid variable name"),
        ({"environment": {"A": "x\ny"}}, "launcher.environment.A='x\\ny'"),
        ({"options": {"a b": 1}}, "launcher.options has 'a b', which is not the name of an sbatch option"),
        ({"options": {"constraint": ["a"]}}, "launcher.options.constraint=['a']"),
        ({"time": "1:00"}, "launcher.time=1:00 is too short for launcher.signal_seconds=120"),
        ({"time": 2}, "launcher.time=2 is too short for launcher.signal_seconds=120"),
    ],
)
def test_values_that_cannot_be_written_into_a_script_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LauncherSettings(**settings)
    assert message in str(caught.value)


def test_a_path_with_a_line_break_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one line of text"):
        script_of([Job(Path("/a\nb"), [])])
