"""Tables and figures of a comparison made by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch
from rich.console import Console

from fellrec.errors import ConfigError
from fellrec.metrics.summary import summarise
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.main_table import comparison_frame, print_comparison, write_tables
from fellrec.report.plots import client_dots, heat_map, save_png
from fellrec.report.provenance import Provenance
from fellrec.report.tables import display_name
from fellrec.tracking.store import check_reachable

CLIENT = torch.tensor([0, 0, 1])


def result(rule: str, seed: int, values: list[float], kind: str = "learned", seconds: float | None = 2.0) -> RuleResult:
    per_user = {name: torch.tensor(values, dtype=torch.float64) for name in ("ndcg_at_10", "recall_at_10")}
    return RuleResult(rule, seed, kind, summarise(per_user, CLIENT, 2, "test", 0), seconds)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        "films",
        (2, 1),
        50,
        [
            result("local", 0, [0.2, 0.4, 0.6]),
            result("fedavg", 0, [0.5, 0.5, 0.2], seconds=4.0),
            result("local", 1, [0.4, 0.4, 0.8]),
            result("fedavg", 1, [0.5, 0.7, 0.4], seconds=6.0),
            result("popularity", 0, [0.1, 0.1, 0.1], kind="reference", seconds=None),
        ],
    )


def test_figures_by_hand(comparison: Comparison) -> None:
    """local: client means (0.3, 0.6), (0.4, 0.8) → 0.45, 0.6; fedavg: (0.5, 0.2), (0.6, 0.4) → 0.35, 0.5."""
    assert comparison.mean_and_sd("local", "ndcg_at_10/mean") == pytest.approx((0.525, 0.15 / 2**0.5))
    assert comparison.gain("fedavg", "ndcg_at_10") == pytest.approx(((0.2 - 0.4) + (0.2 - 0.4)) / 4)
    assert comparison.gain("local", "ndcg_at_10") == 0.0
    assert comparison.difference("local", "fedavg", "ndcg_at_10") == pytest.approx([-0.2, 0.4])
    assert comparison.seconds_per_round("fedavg") == 5.0
    assert comparison.seconds_per_round("popularity") is None
    assert comparison.rules("learned") == ["local", "fedavg"]


def test_the_dictionary_is_json_and_has_the_tables_figures(comparison: Comparison) -> None:
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    frame = comparison_frame(comparison, 10)
    assert frame["rule"].tolist() == ["local", "FedAvg", "popularity"]
    for rule, row in zip(("local", "fedavg", "popularity"), frame.to_dict("records"), strict=True):
        assert row["NDCG@10"].startswith(f"{plain['rules'][rule]['mean']['ndcg_at_10/mean']:.4f}")
        assert row["worst"].startswith(f"{plain['rules'][rule]['mean']['ndcg_at_10/worst']:.4f}")


def test_a_client_without_users_is_null_in_json() -> None:
    per_user = {"ndcg_at_10": torch.tensor([0.5]), "recall_at_10": torch.tensor([0.5])}
    lonely = RuleResult("local", 0, "learned", summarise(per_user, torch.tensor([1]), 2, "test", 0))
    fedavg = RuleResult("fedavg", 0, "learned", lonely.evaluation)
    plain = json.loads(json.dumps(Comparison("films", (0, 1), 5, [lonely, fedavg]).to_dict(), allow_nan=False))
    assert plain["rules"]["local"]["minus_fedavg_per_client"]["ndcg_at_10"] == [None, 0.0]
    assert plain["rules"]["local"]["runs"][0]["per_client"]["ndcg_at_10"] == [None, 0.5]


@pytest.mark.parametrize("width", [80, 120])
def test_the_printed_table_has_every_rule_and_fits(comparison: Comparison, width: int) -> None:
    single = Comparison("films", (2, 1), 50, [item for item in comparison.results if item.seed == 0])
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_comparison(single, console)
    shown = console.export_text()
    for text in ("local", "FedAvg", "popularity", "0.4500", "0.3500", "-0.1000", "4.0", "films: 3 users of 2 clients"):
        assert text in shown
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "…" not in shown


def test_the_csv_has_numbers_and_no_column_twice(comparison: Comparison, tmp_path: Path) -> None:
    write_tables(comparison, tmp_path)
    found = pd.read_csv(tmp_path / "comparison.csv").set_index("rule")
    assert (tmp_path / "comparison.csv").read_text().splitlines()[0].count("pooled,") == 2, "of NDCG and of Recall"
    assert found.loc["local", "ndcg_at_10_mean"] == pytest.approx(0.525)
    assert found.loc["local", "ndcg_at_10_mean_sd"] == pytest.approx(0.15 / 2**0.5)
    assert found.loc["fedavg", "recall_at_10_gain_over_local"] == pytest.approx(-0.1)
    assert found.loc["local", "ndcg_at_10_cv"] == pytest.approx((0.15 / 0.45 + 0.2 / 0.6) / 2)
    assert all(map(pd.api.types.is_numeric_dtype, found.dtypes.drop("kind")))
    assert "validation" not in found, "nothing is known"
    assert len(set(markdown_columns(tmp_path / "comparison.md"))) == len(markdown_columns(tmp_path / "comparison.md"))


def markdown_columns(path: Path) -> list[str]:
    return [name.strip() for name in path.read_text().splitlines()[0].strip("|").split("|")]


def shown(comparison: Comparison, width: int = 140, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), **options)
    print_comparison(comparison, console)
    return console.file.getvalue()


def test_the_best_value_of_each_column_is_marked_and_its_direction_shown(comparison: Comparison) -> None:
    """With seed 0 the means are 0.45 and 0.35, and both are 0.4 over users."""
    single = replace(comparison, results=[item for item in comparison.results if item.seed == 0])
    plain = shown(single)
    header = plain.splitlines()[2]
    for heading in ("mean↑", "pooled↑", "std↓", "CV↓", "worst↑", "gain↑", "s/round↓"):
        assert heading in header
    local, fedavg = (next(line for line in plain.splitlines() if line.startswith(name)) for name in ("local", "FedAvg"))
    assert local.split()[1:3] == ["0.4500*", "0.4000*"]
    assert fedavg.split()[1:3] == ["0.3500", "0.4000*"]
    assert "*: best of the learned rules." in " ".join(plain.split())
    assert "\x1b[1m" in shown(single, force_terminal=True, color_system="standard")


def test_seeds_that_changed_nothing_are_told(comparison: Comparison) -> None:
    assert "identical" not in shown(comparison)
    first = [item for item in comparison.results if item.seed == 0]
    again = [replace(item, seed=7) for item in first if item.rule == "local"]
    both = replace(comparison, results=[*first, *again])
    assert "Seeds 0, 7 gave identical results, so ±0 is not their variation: local." in " ".join(shown(both).split())


def test_counting_rankers_that_win_are_explained_in_one_sentence(comparison: Comparison) -> None:
    assert "How to read this" not in shown(comparison), "popularity does not win"
    alone = result("client_popularity", 0, [0.9, 0.9, 0.9], kind="reference", seconds=None)
    assert "How to read this" not in shown(replace(comparison, results=[*comparison.results, alone])), (
        "it is not central"
    )
    won = [*comparison.results, alone, result("markov", 0, [0.9, 0.9, 0.9], kind="reference", seconds=None)]
    text = " ".join(shown(replace(comparison, results=won)).split())
    assert "How to read this: Markov beats the learned rules by counting" in text
    assert text.count("How to read this") == 1


def test_columns_without_a_figure_are_left_out(comparison: Comparison) -> None:
    untimed = [replace(item, seconds_per_round=None) for item in comparison.results]
    assert "s/round" not in shown(replace(comparison, results=untimed))
    cpu = [replace(i, cpu_seconds_per_round=3.0 if i.kind == "learned" else None) for i in comparison.results]
    assert "CPU s/round↓" in shown(replace(comparison, results=cpu))
    some = [replace(i, cpu_seconds_per_round=3.0 if i.rule == "local" else None) for i in comparison.results]
    assert " s/round↓" in shown(replace(comparison, results=some)), "one rule ran in several processes"


def test_without_local_training_the_table_has_no_gain(comparison: Comparison, tmp_path: Path) -> None:
    others = Comparison("films", (2, 1), 50, [item for item in comparison.results if item.rule != "local"])
    for shown, has_gain in ((comparison, True), (others, False)):
        console = Console(width=120, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
        print_comparison(shown, console)
        assert ("gain" in console.export_text()) == has_gain
        write_tables(shown, tmp_path)
        assert ("gain" in (tmp_path / "comparison.md").read_text()) == has_gain


@pytest.mark.parametrize("width", [80, 120])
def test_several_seeds_are_never_cut(comparison: Comparison, width: int) -> None:
    """The seeds of local have means 0.45 and 0.6: 0.525 with deviation 0.15 / √2 = 0.1061."""
    names = ("centralized", "markov_decay", "pretrained", "popularity")
    longer = [result(name, seed, [0.1, 0.2, 0.3]) for name in names for seed in (0, 1)]
    several = Comparison("films", (2, 1), 50, [*comparison.results, *longer])
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_comparison(several, console)
    shown = console.export_text()
    assert "…" not in shown
    assert "0.5250" in shown
    assert "±.1061" in shown
    assert max(len(line) for line in shown.splitlines()) <= width


def test_the_best_learned_value_is_bold_whoever_has_it(comparison: Comparison) -> None:
    console = Console(width=140, force_terminal=True, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_comparison(comparison, console)
    shown = console.export_text(styles=True)
    assert "\x1b[1m0.5250 ±0.1061" in shown
    assert "\x1b[1m0.4250" not in shown


def test_the_table_says_of_which_rules_the_start_was_tested(comparison: Comparison) -> None:
    rounds = {"local": -1, "fedavg": 1, "popularity": None}
    results = [replace(item, best_round=rounds[item.rule]) for item in comparison.results]
    console = Console(width=200, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_comparison(replace(comparison, results=results), console)
    assert "Tested at the start, as no round was better on validation: local." in console.export_text()


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    write_tables(comparison, tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_names() -> None:
    assert display_name("fellrec") == "FELLRec"
    assert display_name("myrule") == "myrule"


@pytest.mark.parametrize("size", [1, 5, 60])
def test_figures_are_pictures_with_something_on_them(size: int, tmp_path: Path) -> None:
    matrix = torch.eye(size).tolist()
    save_png(heat_map(matrix, list(range(size)), "mixing, round 0", is_mixing=True), tmp_path / "map.png")
    dots = {"local": [0.1] * size, "FedAvg": [0.2] * size}
    save_png(client_dots(dots, "NDCG@10", {"popularity": 0.05}), tmp_path / "dots.png")
    for name in ("map", "dots"):
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 200
        assert picture.std() > 0.02


def test_a_store_that_cannot_be_one_is_refused_and_unchanged(tmp_path: Path) -> None:
    note = tmp_path / "notes.txt"
    note.write_text("not a database")
    for path in (note, tmp_path):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_reachable(f"sqlite:///{path}")
    assert note.read_text() == "not a database"
    check_reachable(f"sqlite:///{tmp_path / 'new.db'}")
    assert not (tmp_path / "new.db").exists()


def test_tables_say_what_they_were_measured_with(comparison: Comparison, tmp_path: Path) -> None:
    with_it = replace(comparison, provenance=Provenance("0.3.0", "0123456789abcdef" * 2 + "01234567-dirty", "2"))
    said = "commit 0123456-dirty, 2 threads, seeds 0, 1"
    assert with_it.to_dict()["measured"] == {
        "fellrec": "0.3.0",
        "git_commit": "0123456789abcdef0123456789abcdef01234567-dirty",
        "num_threads": "2",
        "seeds": [0, 1],
    }
    write_tables(with_it, tmp_path, 10)
    assert (tmp_path / "comparison.md").read_text().endswith(f"|\n\n*Measured*: {said}.\n")
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(with_it, console, 10)
    assert f"Measured: {said}." in console.export_text()
