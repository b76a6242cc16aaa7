"""The reference of all settings in the documentation has every setting that a run can have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from scripts import load_script

from fellrec.config.compose import compose
from fellrec.config.describe import choices
from fellrec.config.paths import group_choices
from fellrec.functional.nested import flatten

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    return str(load_script(DOCS / "settings_page.py").reference())


def test_every_group_and_choice_has_a_section_and_every_setting_a_row(page: str) -> None:
    rows = set(re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE))
    for group in group_choices():
        assert f"\n## {group}\n" in page
        for choice in choices(group):
            assert f"\n### {group}={choice.name}\n" in page
            assert {setting.key for setting in choice.settings} <= rows


@pytest.mark.parametrize(
    "overrides", [[], ["backbone=hf", "backbone.path=x", "objective=generative", "data=games", "data.root=x"]]
)
def test_the_settings_of_composed_configurations_are_in_the_page(page: str, overrides: list[str]) -> None:
    """Keys of Hydra's own composition; ``_target_``, callbacks and what a choice fixes are not settings."""
    found = flatten(OmegaConf.to_container(compose(overrides), resolve=False))
    fixed = re.compile(r"(_target_|\.name$|^(callbacks|data\.expected|data\.member|partition\.factors|experiment)\b)")
    missing = [key for key in found if not fixed.search(key) and f"| `{key}` |" not in page]
    assert not missing


def test_a_row_has_default_range_and_description(page: str) -> None:
    """As in METHOD §3: α is 0.7. A bar in a cell would end it."""
    assert "| `aggregation.alpha` | `0.7` | a number of at least 0 | α of the learning speed" in page
    for line in page.splitlines():
        if line.startswith("| `"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line
