"""What is declared, what is pinned and what is installed agree, and known malicious releases are none of them."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DOCS = [Requirement(text) for text in EXTRAS["docs"]]
"""Installed by ``make docs`` only."""
DECLARED = [Requirement(text) for text in dict.fromkeys([*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["models"]])]
PINNED = {
    re.sub(r"[-_.]+", "-", name).lower(): pin
    for name, pin in (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
}
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_a_dependency_has_an_upper_bound_and_the_pinned_version_is_within_it(requirement: Requirement) -> None:
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    assert any(one.operator == "<" for one in requirement.specifier)
    assert requirement.specifier.contains(PINNED[name])
    assert requirement.specifier.contains(version(requirement.name))


@pytest.mark.parametrize("requirement", DOCS, ids=lambda requirement: requirement.name)
def test_what_builds_the_documentation_is_bounded_and_pinned(requirement: Requirement) -> None:
    assert any(one.operator == "<" for one in requirement.specifier)
    assert requirement.specifier.contains(PINNED[requirement.name])


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_releases_are_excluded(name: str) -> None:
    assert PINNED[name] not in MALICIOUS[name]
    for requirement in DECLARED:
        if requirement.name == name:
            assert not any(requirement.specifier.contains(release) for release in MALICIOUS[name])
