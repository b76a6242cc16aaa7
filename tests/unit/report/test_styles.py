"""What rules look like in figures."""

from __future__ import annotations

import itertools

from fellrec.aggregation.settings import TITLES
from fellrec.report.styles import COLOURS, in_order, part_colours, styles


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2): linear light, weighted by the eye's sensitivity."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_no_two_rules_look_the_same() -> None:
    look = styles(TITLES)
    assert len({(style.colour, style.marker) for style in look.values()}) == len(TITLES)


def test_a_rule_looks_the_same_in_every_figure() -> None:
    alone = {name: styles([name])[name] for name in TITLES}
    assert styles(TITLES) == alone
    assert styles(["my_rule", "fedavg"])["my_rule"] == styles(["fellrec", "my_rule"])["my_rule"]


def test_the_rules_of_most_figures_differ_in_colour_and_in_marker() -> None:
    look = styles(["local", "fedavg", "fellrec", "centralized", "uniform", "persistence", "updatemixing", "fedprox"])
    for one, other in itertools.combinations(look.values(), 2):
        assert one.colour != other.colour
        assert one.marker != other.marker


def test_every_colour_can_be_seen_on_white() -> None:
    """Contrast to white of at least 1.9: what WCAG calls contrast, ``1.05 / (luminance + 0.05)``."""
    assert min(1.05 / (luminance(colour) + 0.05) for colour in COLOURS) > 1.9


def test_neighbouring_parts_of_a_bar_differ_in_grey() -> None:
    greys = [luminance(colour) for colour in part_colours(4)]
    assert min(abs(one - other) for one, other in itertools.pairwise(greys)) > 0.04


def test_settings_of_a_rule_and_own_rules_are_told_apart() -> None:
    lines = ["fellrec alpha=0.3", "fellrec alpha=0.7", *(f"own_{number}" for number in range(8)), "fedavg"]
    look = styles(lines)
    assert len(set(look.values())) == len(lines)
    assert look["fellrec alpha=0.3"].colour == look["fellrec alpha=0.7"].colour


def test_lines_share_a_colour_only_where_colours_are_used_up() -> None:
    for lines in (
        ["nearest_embedding", "logit_lens", "public_tail", "inverter", "chance", "most_popular"],
        list("abcdefgh"),
    ):
        assert len({style.colour for style in styles(lines).values()}) == len(lines)
    assert len({style.colour for style in styles(["fedavg", *"abcdefgh"]).values()}) == len(COLOURS)


def test_order() -> None:
    assert in_order(["mine b", "fellrec", "local", "mine a"]) == ["local", "fellrec", "mine b", "mine a"]
