"""The published counts of the real data sets, and the reference rankers' known figures on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fellrec.cli.prepare import verify
from fellrec.config.compose import compose
from fellrec.experiment.build import build_data


def checks(overrides: list[str], cache: Path) -> list[str]:
    config = compose([*overrides, f"cache_dir={cache}"])
    return verify(config, build_data(config).statistics)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=ml_100k", "data.core=0"], ["1,682", "943", "100,000"]),
        (["data=ml_100k"], ["1,349", "99,287"]),
        (["data=ml_100k", "holdout=global_time"], ["79,431", "9,928"]),
        (["data=ml_1m"], ["6,040", "3,706", "1,000,209"]),
        (["data=ml_1m", "data.core=5"], ["3,416", "999,611"]),
        (["data=games"], ["50,546", "16,859", "452,989"]),
    ],
)
def test_published_counts(overrides: list[str], expected: list[str], real_data: Path, cache: Path) -> None:
    folder = {"ml_100k": "ml-100k", "ml_1m": "ml-1m", "games": "games-5core"}[overrides[0].removeprefix("data=")]
    lines = checks([*overrides, f"data.root={real_data / folder}"], cache)
    assert lines
    assert all(line.startswith("ok: ") for line in lines), lines
    for count in expected:
        assert any(f"published {count}" in line for line in lines), (count, lines)


def test_a_title_is_not_an_id(real_data: Path, cache: Path) -> None:
    config = compose(["data=ml_100k", "data.core=0", f"data.root={real_data / 'ml-100k'}", f"cache_dir={cache}"])
    statistics = build_data(config).statistics
    assert (statistics["items"], statistics["distinct_titles"]) == (1682, 1664)


def test_original_times_are_sorted(real_data: Path, cache: Path) -> None:
    """User 196's history of ML-100K against the file, sorted by hand."""
    config = compose(["data=ml_100k", "data.core=0", "data.public_user_rate=0", f"data.root={real_data / 'ml-100k'}"])
    config.cache_dir = str(cache)
    data = build_data(config)
    lines = [line.split("\t") for line in (real_data / "ml-100k" / "u.data").read_text().splitlines()]
    wanted = sorted((int(time), item) for user, item, _, time in lines if user == "196")
    user = int(np.flatnonzero(data.users["user_id"] == "196")[0])
    row = np.concatenate([data.train.row(user), data.valid.row(user), data.test.row(user)])
    times = {item: time for time, item in wanted}
    got = [times[data.catalogue.item_ids[item]] for item in row]
    assert got == [time for time, _ in wanted]
