"""docs/tutorial_rule.md as a newcomer follows it: the code as printed, the commands as printed plus a tiny size."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from preloaded import python

from fellrec.aggregation.conformance import check_rule

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial_rule.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
MODULES = {code.split()[1]: code for language, code in BLOCKS if language == "python"}
MISTAKES = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(\w+)` \|$", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE)
COMMANDS = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
ON_THE_SIDE = {"check-rule": []}
"""Verbs that take no settings of a run."""


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str], empty_store: Path
) -> tuple[Path, dict[str, str]]:
    """The folder, and what each command printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copy(empty_store, folder / "mlflow.db")
    for name, code in MODULES.items():
        (folder / name).write_text(code, encoding="utf-8")
    found = {}
    for line in COMMANDS:
        word, *arguments = shlex.split(line)
        assert word == "fellrec"
        more = ON_THE_SIDE.get(arguments[0], tiny_overrides)
        code, found[line] = python(["-m", "fellrec", *arguments, *more], folder)
        assert code == 0, f"{line}\n{found[line]}"
    return folder, found


def test_the_code_is_under_60_lines() -> None:
    assert list(MODULES) == ["my_rules.py", "my_callbacks.py"]
    assert sum(len(code.splitlines()) for code in MODULES.values()) < 60


@pytest.mark.parametrize(("right", "wrong", "law"), MISTAKES)
def test_a_mistake_of_the_tutorial_breaks_the_law_that_it_names(right: str, wrong: str, law: str) -> None:
    code = MODULES["my_rules.py"]
    assert code.count(right) == 1
    found: dict[str, Any] = {}
    exec(code.replace(right, wrong), found)
    assert law in {result.law for result in check_rule(found["MedianOfFriends"]) if result.outcome == "failed"}


def test_every_command_succeeds_and_all_laws_are_kept(outputs: tuple[Path, dict[str, str]]) -> None:
    _, found = outputs
    checks = [text for line, text in found.items() if "check-rule" in line]
    assert len(checks) == 2
    assert all("failed" not in text and "not checked" not in text for text in checks)


def test_the_comparison_has_the_rule_with_both_settings(outputs: tuple[Path, dict[str, str]]) -> None:
    _, found = outputs
    (table,) = [text for line, text in found.items() if line.startswith("fellrec compare")]
    assert {"local", "FedAvg", "FELLRec", "medianoffriends"} <= set(table.split())
    assert len(re.findall("friends=[23]", table)) >= 2


def test_mlflow_has_the_callbacks_metric(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, _ = outputs
    with sqlite3.connect(folder / "mlflow.db") as store:
        values = store.execute("select value from metrics where key = 'friends/mutual'").fetchall()
    assert len(values) == 2 * 3  # two rounds of the training and of two runs of the comparison
    assert all(0 <= value <= 1 for (value,) in values)
