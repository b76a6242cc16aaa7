"""The number of threads, which changes the last bits of results, in processes that start as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .processes import environment, free_port


def start(arguments: Sequence[str], folder: Path, num_threads: int, **variables: object) -> subprocess.Popen[str]:
    """``fellrec ARGUMENTS`` in a new process: OpenMP reads its setting when it is loaded, so not in a fork."""
    own = {"OMP_NUM_THREADS": num_threads, **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "fellrec", *arguments],
        cwd=folder,
        env={**environment(), **{name: str(value) for name, value in own.items()}},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_resume_with_another_number_of_threads_is_recorded_and_shown(
    tmp_path: Path, tiny_overrides: list[str]
) -> None:
    train = ["train", *tiny_overrides, "references.show=[]", "tracking.uri=null", "run_dir=run"]
    recorded = []
    for command, threads in ((train, 1), (["train", "resume=run"], 2)):
        process = start(command, tmp_path, threads)
        shown, errors = process.communicate()
        assert process.returncode == 0, errors
        found = json.loads((tmp_path / "run" / "versions.json").read_text())["num_threads"]
        assert f"{found} thread{'' if found == '1' else 's'}, seed 0." in " ".join(shown.split())
        recorded.append((found, "OMP_NUM_THREADS=1 keeps the number of threads" in errors))
    assert recorded == [("1", False), ("1 then 2", True)]


def test_processes_with_other_numbers_of_threads_refuse_each_other(tmp_path: Path, tiny_overrides: list[str]) -> None:
    command = ["train", *tiny_overrides, "tracking.uri=null", "run_dir=run", "trainer.devices=2"]
    together = {
        "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "TORCHELASTIC_RUN_ID": "test", "FELLREC_SECRET": "the secret of these tests",
    }  # fmt: skip
    processes = [start(command, tmp_path, 1 + rank, RANK=rank, LOCAL_RANK=rank, **together) for rank in (0, 1)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "process 0 and process 1 differ in number of threads (OMP_NUM_THREADS): 1 and 2" in errors[0]
    assert not list((tmp_path / "run").glob("[!.]*")), "nothing was begun"
