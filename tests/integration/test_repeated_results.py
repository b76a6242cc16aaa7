"""Results that others can repeat: a published cell, and threads, in processes that start as a user starts them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fellrec.experiment.versions import git_commit

from .processes import ROOT, environment, free_port

PAGE = ROOT / "docs" / "evaluation.md"
COLUMNS = {"NDCG@10, mean over clients": "mean", "pooled over users": "pooled", "worst client": "worst"}
"""Columns of the published cell, and their names in ``comparison.json``."""
Cell = dict[str, dict[str, float]]
"""Rule → column of `COLUMNS` → figure."""


def published() -> tuple[str, Cell, str]:
    """Command, figures and the line below them of the section "Repeating results"."""
    section = PAGE.read_text().partition("## Repeating results\n")[2].partition("\n## ")[0]
    command = "".join(re.findall(r"^ {4}(.*\n)", section, re.MULTILINE))
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line.startswith("|")
    ]
    assert header == ["rule", *COLUMNS]
    figures = {rule: dict(zip(COLUMNS.values(), map(float, row), strict=True)) for rule, *row in rows}
    (line,) = re.findall(r"^\*Measured\*: (.*)\.$", section, re.MULTILINE)
    return command, figures, line


def of_comparison(comparison: Mapping[str, Any]) -> Cell:
    """The same figures of a ``comparison.json``."""
    return {
        rule: {name: line["mean"][f"ndcg_at_10/{name}"] for name in COLUMNS.values()}
        for rule, line in comparison["rules"].items()
    }


def tolerances(users_per_client: Sequence[int]) -> dict[str, float]:
    """How much each figure changes if one user's target changes places with its neighbour; half a digit is added.

    A user's NDCG with one target in place p is 1 / log2(1 + p); the largest difference of two neighbouring places is that
    of the first two. A client's mean changes by this divided by its number of users, at most that of the smallest client.
    """
    of_user = 1 - 1 / math.log2(3)
    of_client = of_user / min(users_per_client)
    largest = {"mean": of_client / len(users_per_client), "pooled": of_user / sum(users_per_client), "worst": of_client}
    return {name: value + 0.00005 for name, value in largest.items()}


def differing(first: Cell, second: Cell, tolerance: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rule and column of the figures that differ by more than their tolerance."""
    assert first.keys() == second.keys()
    return [
        (rule, name)
        for rule in first
        for name, largest in tolerance.items()
        if abs(first[rule][name] - second[rule][name]) > largest
    ]


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


def test_a_published_cell_can_be_repeated(tmp_path: Path) -> None:
    """The page's command as it stands, in a shell; the figures are the page's, up to one user's rank.

    On one kind of processor the bits are the same. Other kernels, and another number of threads, change the adapters by
    less than what changes a rank, but for a target that has nearly the score of another item.
    """
    command, figures, line = published()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**environment(), "PATH": path, "FELLREC_CACHE": str(tmp_path / "cache")}
    del variables["OMP_NUM_THREADS"]  # the command sets it
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "repeated"
    comparison = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert not differing(figures, of_comparison(comparison), tolerances(comparison["users_per_client"]))

    measured = comparison["measured"]
    assert (measured["num_threads"], measured["seeds"]) == ("1", [0])
    assert line.endswith(", 1 thread, seed 0"), "as on the page"
    assert measured["git_commit"] == git_commit()
    for run in figures:
        versions = json.loads((folder / f"{run}-s0" / "versions.json").read_text())
        assert {name: versions[name] for name in ("fellrec", "git_commit", "num_threads")}.items() <= measured.items()
    said = f"Measured: commit {git_commit()[:7]}"
    assert said in " ".join(done.stdout.split()) or git_commit() == "unknown"
    assert "1 thread, seed 0." in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", COLUMNS.values())
def test_a_changed_figure_of_the_published_cell_is_noticed(name: str) -> None:
    """27 of 160 users are in the smallest of 5 clients: 0.369 / 27 / 5, 0.369 / 160 and 0.369 / 27."""
    figures, allowed = published()[1], tolerances([36, 33, 32, 32, 27])
    assert allowed == pytest.approx({"mean": 0.00278, "pooled": 0.00236, "worst": 0.01372}, abs=5e-6)
    for factor, noticed in ((0.9, []), (1.1, [("fellrec", name)]), (-1.1, [("fellrec", name)])):
        changed = {rule: dict(line) for rule, line in figures.items()}
        changed["fellrec"][name] += factor * allowed[name]
        assert differing(figures, changed, allowed) == noticed
