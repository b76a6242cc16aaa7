"""What is distributed, and the files that describe an environment: they agree with ``pyproject.toml``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]


def distributed(builder: SdistBuilder | WheelBuilder) -> set[str]:
    return {file.distribution_path for file in builder.recurse_included_files()}


def files_of(*folders: str) -> set[str]:
    """The files of folders as a checkout has them, without what Python writes beside them."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_source_distribution_has_documentation_and_tests_and_no_stray_file() -> None:
    """Of the files at the top, those that a reader or a build needs (hatch adds ``pyproject.toml``); a README only where its directory is included."""
    folders = ("src", "conf", "docs", "tests", "experiments", "benchmarks")
    found = distributed(SdistBuilder(str(ROOT)))
    assert found - files_of(*folders) == {
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE"),
        *("Makefile", "constraints.txt", "environment.yml"),
    }
    assert files_of("src", "conf", "docs", "tests") <= found
    assert {"experiments/common.sh", "benchmarks/README.md"} <= found


def test_the_wheel_has_the_package_with_its_configuration() -> None:
    expected = {path.removeprefix("src/") for path in files_of("src/fellrec")}
    expected |= {f"fellrec/{path}" for path in files_of("conf")}
    assert distributed(WheelBuilder(str(ROOT))) == expected
    assert {"fellrec/py.typed", "fellrec/conf/config.yaml", "fellrec/report/templates/report.html"} <= expected


def test_the_conda_environment_agrees_with_the_project() -> None:
    """One interpreter that the project supports; every package by pip, with the same bounds and pins as ``make``."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, *others, installed = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert python.removeprefix("python=") in PYTHONS
    assert others == ["pip"]
    assert installed == {"pip": ["-c constraints.txt", "-e .[dev]"]}
    assert "dev" in PROJECT["optional-dependencies"]


def test_the_supported_versions_of_python_are_those_that_may_install_it() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert PYTHONS
    assert all(allowed.contains(version) for version in PYTHONS)
    assert not allowed.contains("3.10")


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        assert {"<", ">="} <= {one.operator for one in requirement.specifier}, requirement
