"""The benchmark of the generative family runs from end to end on a few synthetic users."""

from __future__ import annotations

import generative


def test_padding_and_speed_are_measured(tiny_overrides: list[str]) -> None:
    overrides = [*tiny_overrides, "objective.max_title_tokens=8"]
    tokens = generative.padding(overrides)
    assert tokens["without padding"] <= tokens["by length"] < tokens["shuffled"]
    speed = generative.measure(overrides, num_users=8)
    assert set(speed) == {*generative.RANKERS, "generate, 20 beams"}
    assert min(speed.values()) > 0
