"""Differences between rules on results made by hand or planted."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy import stats

from fellrec.metrics.summary import summarise
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.significance import print_significance, significance_text, with_significance, write_significance

NUM_USERS, NUM_CLIENTS = 300, 10
CLIENTS = torch.arange(NUM_USERS) % NUM_CLIENTS


def noise(seed: int) -> torch.Tensor:
    return torch.rand(NUM_USERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def result(
    rule: str, values: torch.Tensor, seed: int = 0, users: torch.Tensor | None = None, variant: str = ""
) -> RuleResult:
    users = torch.arange(len(values)) if users is None else users
    per_user = {"ndcg_at_10": values, "recall_at_10": values.round()}
    evaluation = summarise(per_user, users % NUM_CLIENTS, NUM_CLIENTS, "test", 0, users)
    return RuleResult(rule, seed, "learned", evaluation, variant=variant)


def compared(*results: RuleResult, num_clients: int = NUM_CLIENTS) -> Comparison:
    return with_significance(Comparison("films", (30,) * num_clients, 50, results), 10)


@pytest.fixture(scope="module")
def planted() -> Comparison:
    """Everybody gains about 0.1 from ``better``; ``same`` is FedAvg and noise that is as often up as down."""
    base = 0.4 * noise(0)
    better, same = base + 0.2 * noise(1), base + 0.1 * (noise(2) - noise(2).flip(0))
    return compared(result("better", better), result("same", same), result("fedavg", base))


def test_a_planted_difference_is_found_and_none_is_not(planted: Comparison) -> None:
    better, same = planted.differences[:2]
    assert (better.rule, better.baseline, better.metric) == ("better", "fedavg", "ndcg_at_10")
    for interval in (better.user_interval, better.client_interval):
        assert interval is not None
        assert 0 < interval[0] < 0.1 < interval[1] < 0.2
    assert better.holm_p < 1e-6
    for interval in (same.user_interval, same.client_interval):
        assert interval is not None
        assert interval[0] < 0 < interval[1]
    assert same.holm_p > 0.05


def test_figures_are_those_of_pandas_and_scipy(planted: Comparison) -> None:
    """The baseline is compared with nothing, and Holm counts both rules on both metrics."""
    assert [(item.rule, item.metric) for item in planted.differences] == [
        (rule, metric) for metric in ("ndcg_at_10", "recall_at_10") for rule in ("better", "same")
    ]
    base, better = 0.4 * noise(0), 0.4 * noise(0) + 0.2 * noise(1)
    found = planted.differences[0]
    assert found.user_difference == pytest.approx(float((better - base).mean()))
    means = pd.DataFrame({"client": CLIENTS, "better": better, "base": base}).groupby("client").mean().mean()
    assert found.client_difference == pytest.approx(means["better"] - means["base"])
    assert found.client_change_percent == pytest.approx(100 * (means["better"] - means["base"]) / means["base"])
    per_client = pd.DataFrame({"client": CLIENTS, "better": better, "base": base}).groupby("client").mean()
    spread = per_client.std(ddof=0) / per_client.mean()
    assert found.cv_difference == pytest.approx(spread["better"] - spread["base"])
    assert found.cv_interval is not None
    assert found.cv_interval[0] < found.cv_difference < found.cv_interval[1]
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(better.numpy(), base.numpy()).pvalue)
    smallest = min(planted.differences, key=lambda item: item.wilcoxon_p)
    assert smallest.holm_p == pytest.approx(4 * smallest.wilcoxon_p)


def test_the_order_of_users_does_not_matter(planted: Comparison) -> None:
    order = torch.randperm(NUM_USERS, generator=torch.Generator().manual_seed(5))
    base = 0.4 * noise(0)
    better, same = base + 0.2 * noise(1), base + 0.1 * (noise(2) - noise(2).flip(0))
    mixed = compared(
        result("better", better[order], users=order), result("same", same), result("fedavg", base.flip(0), 0, flipped())
    )
    assert mixed.differences == planted.differences


def flipped() -> torch.Tensor:
    return torch.arange(NUM_USERS).flip(0)


def test_users_are_averaged_over_seeds_first() -> None:
    """Two seeds that cancel: each user's mean difference is 0.01, though single runs differ by 0.3."""
    base, swing = 0.4 * noise(0), 0.3 * (noise(1) - 0.5)
    both = compared(
        *(result("fedavg", base, seed) for seed in (0, 1)),
        *(result("fellrec", base + 0.01 + sign * swing, seed) for seed, sign in ((0, 1), (1, -1))),
    )
    found = both.differences[0]
    assert (found.num_seeds, found.num_users) == (2, NUM_USERS)
    assert found.user_interval == pytest.approx((0.01, 0.01))
    assert found.wilcoxon_p < 1e-12


def test_only_users_whom_all_runs_evaluated_count() -> None:
    """A run that lost a client process has fewer users."""
    base = 0.4 * noise(0)
    kept = CLIENTS != 3
    found = compared(
        result("fedavg", base), result("fellrec", base[kept] + 0.1, users=torch.arange(NUM_USERS)[kept])
    ).differences[0]
    assert (found.num_users, found.num_clients) == (270, NUM_CLIENTS - 1)
    assert found.user_difference == pytest.approx(0.1)


def test_a_change_is_printed_as_in_the_paper() -> None:
    """0.07 + 41.97 % = 0.099379."""
    base = torch.full((NUM_USERS,), 0.07, dtype=torch.float64)
    frame = significance_text(compared(result("fedavg", base), result("fellrec", base + 0.029379)))
    assert frame["% users"][0] == frame["% clients"][0] == "+41.97 %"


def test_too_few_clients_have_no_interval_and_it_says_so(tmp_path: Path) -> None:
    base = 0.4 * noise(0)
    per_user = dict.fromkeys(("ndcg_at_10", "recall_at_10"), base)
    results = [
        RuleResult(rule, 0, "learned", summarise(per_user, CLIENTS % 3, 3, "test", 0)) for rule in ("fedavg", "fellrec")
    ]
    few = compared(*results, num_clients=3)
    assert few.differences[0].client_interval is None
    assert few.differences[0].wilcoxon_p == few.differences[0].holm_p == 1.0
    write_significance(few, tmp_path)
    text = (tmp_path / "significance.md").read_text()
    assert "n/a (3)" in text
    assert "an interval needs 6" in text
    frame = pd.read_csv(tmp_path / "significance.csv")
    assert frame["client_low"].isna().all()
    assert frame["user_low"].notna().all()
    assert len({line.count("|") for line in text.splitlines()[:4]}) == 1
    assert few.to_dict()["differences"][0]["client_high"] is None
    json.dumps(few.to_dict(), allow_nan=False)


def test_a_baseline_of_zeros_has_no_relative_change() -> None:
    found = compared(result("fedavg", 0 * noise(0)), result("fellrec", noise(0)))
    assert found.differences[0].user_change_percent is None
    assert significance_text(found)["% users"][0] == "n/a"


def test_without_fedavg_the_baseline_is_that_of_gains_and_without_both_there_is_no_table(tmp_path: Path) -> None:
    base = noise(0)
    (found, _) = compared(result("local", base), result("fellrec", base + 0.1)).differences
    assert found.baseline == "local"
    alone = compared(result("fellrec", base))
    assert not alone.differences
    write_significance(alone, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_variant_is_compared_with_the_baseline_of_the_same_variant() -> None:
    base = noise(0)
    cuts = ("head_layers=1", "head_layers=2")
    runs = [
        result(rule, base + shift + cut / 4, variant=cuts[cut])
        for cut in (0, 1)
        for rule, shift in (("fedavg", 0.0), ("fellrec", 0.1))
    ]
    found = compared(*runs).differences[:2]
    assert [(item.rule, item.baseline) for item in found] == [(f"fellrec {cut}", f"fedavg {cut}") for cut in cuts]
    assert [item.user_difference for item in found] == pytest.approx([0.1, 0.1])


def test_the_baseline_may_have_settings_if_it_is_there_once() -> None:
    base = 0.4 * noise(0)
    tuned = [
        result("fedavg learning_rate=0.1", base),
        result("fellrec alpha=0.2 learning_rate=0.2", base + 0.1 * noise(1)),
    ]
    found = compared(*tuned).differences
    assert {(item.rule, item.baseline) for item in found} == {(tuned[1].rule, tuned[0].rule)}
    assert not compared(*tuned, result("fedavg learning_rate=0.2", base)).differences, "which one of the two?"


@pytest.mark.parametrize("width", [80, 140])
def test_the_printed_table_fits(planted: Comparison, width: int) -> None:
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_significance(planted, console, 10)
    shown = console.export_text()
    low, high = planted.differences[0].user_interval or (0.0, 0.0)
    for text in ("NDCG@10 minus FedAvg's", "better", f"[{low:+.4f}, {high:+.4f}]", "<0.001", "4 comparisons"):
        assert text in shown
    assert "\\" not in shown
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= width
