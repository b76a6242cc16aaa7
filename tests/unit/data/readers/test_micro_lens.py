"""MicroLens as published, and the generated set in its shape: written as published, it is read unchanged."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fellrec.cli.prepare import verify
from fellrec.config.compose import compose
from fellrec.config.instantiate import instantiate
from fellrec.data.clean import clean
from fellrec.data.readers import MicroLensReader, SyntheticReader
from fellrec.data.readers.micro_lens import PAIRS, TITLES
from fellrec.data.schema import RawData
from fellrec.data.settings import DataSettings
from fellrec.errors import ConfigError, DataError
from fellrec.experiment.build import build_data


def shaped_reader(**settings: float) -> SyntheticReader:
    config = compose(["data=micro_lens_shaped", *(f"data.reader.{key}={settings[key]}" for key in settings)])
    return instantiate(config.data.reader, "data.reader")


@pytest.fixture(scope="module")
def shaped() -> RawData:
    return shaped_reader().read()


def write(folder: Path, raw: RawData) -> None:
    """As published: pairs with a header, titles without one, with a space before the title and CRLF."""
    pairs = raw.interactions.set_axis(["user", "item", "timestamp"], axis=1)
    pairs.assign(timestamp=pairs["timestamp"].astype("int64")).to_csv(folder / PAIRS, index=False)
    lines = [f"{item}, {title}\r\n" for item, title in zip(raw.items["item_id"], raw.items["title"], strict=True)]
    (folder / TITLES).write_bytes("".join(lines).encode())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    (tmp_path / PAIRS).write_text("user,item,timestamp\n7,1,1583378629552\n7,2,1584436682313\n9,1,1585000000000\n")
    (tmp_path / TITLES).write_bytes("1, wait, what? 🥹 # anime\r\n2, the iron cook\r\n3,  \r\n".encode())
    return tmp_path


def test_what_is_written_as_published_is_read_as_it_was(shaped: RawData, tmp_path: Path) -> None:
    write(tmp_path, shaped)
    read = MicroLensReader(str(tmp_path)).read()
    pd.testing.assert_frame_equal(read.interactions, shaped.interactions)
    pd.testing.assert_frame_equal(read.items, shaped.items)
    pd.testing.assert_frame_equal(read.users, shaped.users[["user_id"]])


def test_published_files(published: Path) -> None:
    """A comma is part of a title; a header, a byte order mark and LF change nothing."""
    raw = MicroLensReader(str(published)).read()
    assert raw.items.to_numpy().tolist() == [["1", "wait, what? 🥹 # anime"], ["2", "the iron cook"], ["3", ""]]
    assert raw.interactions["timestamp"].tolist() == [1583378629552.0, 1584436682313.0, 1585000000000.0]
    assert raw.users["user_id"].tolist() == ["7", "9"]
    text = "\ufeffitem,title\n" + (published / TITLES).read_text(encoding="utf-8")
    (published / TITLES).write_text(text, encoding="utf-8")
    again = MicroLensReader(str(published)).read()
    pd.testing.assert_frame_equal(again.items, raw.items)
    assert (raw.where_item(0)[-2:], again.where_item(0)[-2:]) == (":1", ":2")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (PAIRS, "user,video,time\n7,1,5\n", r"pairs.csv:1 lacks the column item, timestamp; it has user, video, time"),
        (PAIRS, "user,item,timestamp\n7,1\n", r"pairs.csv:2 has 2 fields instead of 3"),
        (
            PAIRS,
            "user,item,timestamp\n7,1,soon\n",
            r"pairs.csv:2: 'soon' is not a number or an ISO 8601 time for timestamp",
        ),
        (PAIRS, "user,item,timestamp\n7,8,5\n", r"1 interactions have an item .* first at .*pairs.csv:2"),
        (TITLES, "1, a\n2\n", r"title_en.csv:2 has 1 fields instead of 2"),
        (TITLES, "1, a\n1, b\n2, c\n", r"1 item ids are duplicates, first at .*title_en.csv:2"),
        (TITLES, "item,title\n1, a\n2,\n", r"1 items have an empty title \(set data.on_empty_title.*title_en.csv:3"),
    ],
)
def test_bad_lines_are_named(published: Path, file: str, text: str, message: str) -> None:
    if file == PAIRS:
        (published / TITLES).write_text("1, a\n2, b\n")
    (published / file).write_text(text)
    with pytest.raises(DataError, match=message):
        clean(MicroLensReader(str(published)).read(), DataSettings("micro_lens", None))


def test_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"lacks {PAIRS}, {TITLES}; expected {PAIRS}, {TITLES}"):
        MicroLensReader(str(tmp_path)).read()
    with pytest.raises(DataError, match="nowhere is not a directory"):
        MicroLensReader(str(tmp_path / "nowhere")).read()


def test_it_is_prepared_and_its_counts_are_checked(published: Path, shaped: RawData, tmp_path: Path) -> None:
    write(published, shaped)
    with (published / TITLES).open("a") as file:
        file.write("100000,\n")  # as published, a video may lack its title
    config = compose(["data=micro_lens", f"data.root={published}", f"cache_dir={tmp_path}"])
    lines = verify(config, build_data(config).statistics)
    assert lines == [
        "differs: users (as read) 3,000, published 100,000",
        "differs: items (as read) 592, published 19,738",
        f"differs: interactions (as read) {len(shaped.interactions):,}, published 719,405",
    ]


def test_the_shape_is_micro_lens_s(shaped: RawData) -> None:
    """Against 100,000 users, 19,738 items, 719,405 interactions; a user's number is 5 and a geometric one.

    With mean 2.194 its standard deviation is √(2.194 · 3.194) = 2.65, and 0.05 of the mean of 3,000.
    """
    per_user = shaped.interactions["user_id"].value_counts()
    per_item = shaped.interactions["item_id"].value_counts()
    assert (len(shaped.users), len(shaped.items)) == (3000, 592)
    assert (len(per_user), per_user.min()) == (3000, 5)
    assert abs(per_user.mean() - 7.194) < 0.2
    assert len(per_item) >= 0.98 * 592
    assert 0.25 < per_item.iloc[:59].sum() / per_item.sum() < 0.5, "a tenth of the videos"
    assert per_item.median() < 0.8 * per_item.mean()
    assert shaped.items["title"].is_unique
    assert 10 < shaped.items["title"].str.split().str.len().mean() < 15
    assert not shaped.interactions.duplicated(["user_id", "item_id"]).any()
    times = shaped.interactions.groupby("user_id")["timestamp"]
    assert (times.diff().dropna() > 0).all()


def test_the_shaped_set_is_seeded(shaped: RawData) -> None:
    again, other = shaped_reader().read(), shaped_reader(seed=1).read()
    for mine, theirs in ((again.interactions, shaped.interactions), (again.items, shaped.items)):
        pd.testing.assert_frame_equal(mine, theirs)
    assert not other.interactions.equals(shaped.interactions)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_users": 90},
        {"num_items": 19},
        {"num_items": 90_000},
        {"num_groups": 0},
        {"habit_rate": 0.9, "random_rate": 0.2},
        {"shared_rate": 1.1},
        {"random_rate": -0.1},
    ],
)
def test_shaped_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"data.reader.{next(iter(settings))}"):
        shaped_reader(**settings).read()
