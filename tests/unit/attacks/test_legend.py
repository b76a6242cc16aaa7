"""What ``fellrec attack`` says below its table."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from fellrec.attacks.findings import Finding
from fellrec.cli.attack import _legend


@pytest.mark.parametrize(("unit", "is_said"), [("none", False), ("user", True)])
def test_updates_of_a_private_run_are_those_before_the_noise(unit: str, is_said: bool) -> None:
    config = OmegaConf.create({"privacy": {"unit": unit}})
    updates = [Finding("update_rows", {"items_of_training": 1.0}, users_per_client=1)]
    assert ("before its noise" in _legend(config, updates)) == is_said
    assert "by layers of the client's head" not in _legend(config, updates)


def test_hidden_states_have_a_legend_of_their_own() -> None:
    config = OmegaConf.create({"privacy": {"unit": "user"}})
    said = _legend(config, [Finding("logit_lens", {"token_at_1": 0.5}, depth=0)])
    assert "by layers of the client's head" in said
    assert "before its noise" not in said
