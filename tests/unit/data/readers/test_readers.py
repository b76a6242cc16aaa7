"""Readers on small files made here: formats agree with each other, and every bad line is named."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from fellrec.data.clean import Cleaned, clean
from fellrec.data.readers import AtomicReader, MovieLens1MReader, MovieLens100KReader, SyntheticReader
from fellrec.data.settings import DataSettings
from fellrec.errors import ConfigError, DataError

INTER = "user_id:token\titem_id:token\ttimestamp:float\nu1\ti1\t5\nu1\ti2\t6\nu2\ti1\t1\n"
ITEM = 'item_id:token\tmovie_title:token_seq\tgenre:token_seq\ni1\tAmélie "2001"\tComedy Romance\ni2\tHeat\tCrime\n'
USER = "user_id:token\tgender:token\nu1\tF\nu2\tM\n"


@pytest.fixture
def atomic(tmp_path: Path) -> Path:
    for kind, text in (("inter", INTER), ("item", ITEM), ("user", USER)):
        (tmp_path / f"films.{kind}").write_text(text, encoding="utf-8")
    return tmp_path


def read(folder: Path, **settings: object) -> Cleaned:
    return clean(AtomicReader(str(folder)).read(), DataSettings("films", str(folder), **settings))  # type: ignore[arg-type]


def test_atomic_files(atomic: Path) -> None:
    raw = AtomicReader(str(atomic)).read()
    assert raw.interactions["timestamp"].tolist() == [5.0, 6.0, 1.0]
    assert raw.items["title"].tolist() == ['Amélie "2001"', "Heat"]
    assert raw.users["gender"].tolist() == ["F", "M"]


def test_without_a_user_file_the_users_are_those_of_the_interactions(atomic: Path) -> None:
    (atomic / "films.user").unlink()
    assert AtomicReader(str(atomic)).read().users["user_id"].tolist() == ["u1", "u2"]


def test_the_fingerprint_follows_the_contents(atomic: Path) -> None:
    before = AtomicReader(str(atomic)).fingerprint()
    assert AtomicReader(str(atomic)).fingerprint() == before
    (atomic / "films.item").write_text(ITEM + "i3\tAlien\tHorror\n", encoding="utf-8")
    assert AtomicReader(str(atomic)).fingerprint() != before


def test_published_1m_files_equal_atomic_ones(tmp_path: Path) -> None:
    """The same films in the published format: ``::`` between fields, genres with bars, latin-1."""
    published, atomic = tmp_path / "published", tmp_path / "atomic"
    published.mkdir()
    atomic.mkdir()
    (published / "ratings.dat").write_bytes(b"1::10::5::978300760\n1::11::3::978300761\n2::10::4::978300762\n")
    (published / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n11::Heat (1995)::Action\n".encode("latin-1")
    )
    (published / "users.dat").write_bytes(b"1::F::1::10::48067\n2::M::56::16::70072\n")
    (atomic / "m.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n1\t10\t978300760\n1\t11\t978300761\n2\t10\t978300762\n"
    )
    (atomic / "m.item").write_text(
        "item_id:token\tmovie_title:token_seq\tgenre:token_seq\n10\tMisérables, Les (1995)\tDrama Musical\n11\tHeat (1995)\tAction\n",
        encoding="utf-8",
    )
    left, right = (MovieLens1MReader(str(folder)).read() for folder in (published, atomic))
    pd.testing.assert_frame_equal(left.interactions.drop(columns="rating"), right.interactions)
    pd.testing.assert_frame_equal(left.items, right.items)


def test_published_100k_files(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_bytes(b"1\t1\t5\t881250949\n")
    flags = "0|0|0|1|1|1" + "|0" * 13
    (tmp_path / "u.item").write_bytes(f"1|Cité (1995)|01-Jan-1995||http://x|{flags}\n".encode("latin-1"))
    (tmp_path / "u.user").write_bytes(b"1|24|M|technician|85711\n")
    raw = MovieLens100KReader(str(tmp_path)).read()
    assert raw.items.loc[0, ["title", "genre"]].tolist() == ["Cité (1995)", "Animation Children's Comedy"]
    assert raw.users["occupation"].tolist() == ["technician"]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("inter", INTER.replace("timestamp:float", "when:float"), r"films.inter:1 lacks the column timestamp"),
        ("inter", INTER + "u2\ti2\n", r"films.inter:5 has 2 fields instead of 3 .*1 such lines"),
        ("inter", INTER + "u2\ti2\tsoon\n", r"films.inter:5: 'soon' is not a number for timestamp"),
        ("inter", INTER + "u2\ti9\t3\nu1\ti9\t3\n", r"2 interactions have an item .* first at .*films.inter:5"),
        ("inter", INTER + "u9\ti1\t3\n", r"1 interactions have a user .* first at .*films.inter:5"),
        ("inter", INTER.splitlines()[0] + "\n", r"the interactions are empty"),
        ("inter", "", r"films.inter is empty"),
        ("item", ITEM.replace("Heat", " "), r"1 items have an empty title .* first at .*films.item:3"),
        ("item", ITEM + "i1\tTwice\tDrama\n", r"1 item ids are duplicates, first at .*films.item:4"),
        ("item", ITEM.replace("movie_title", "headline"), r"has no title: unknown column 'title or"),
        ("item", "item_id:token\ttitle:token_seq\ni1\n", r"films.item:2 has 1 fields instead of 2"),
    ],
)
def test_bad_lines_are_named(atomic: Path, kind: str, text: str, message: str) -> None:
    path = atomic / f"films.{kind}"
    path.write_text(text, encoding="utf-8")
    before = {file: file.read_bytes() for file in atomic.iterdir()}
    with pytest.raises(DataError, match=message):
        read(atomic)
    assert {file: file.read_bytes() for file in atomic.iterdir()} == before


def test_a_title_that_is_not_utf8_is_named(atomic: Path) -> None:
    (atomic / "films.item").write_bytes(ITEM.encode("latin-1"))
    with pytest.raises(DataError, match=r"films.item:2 is not utf-8: byte 0xe9"):
        read(atomic)


def test_missing_files_are_named(atomic: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        read(atomic / "nowhere")
    (atomic / "films.item").unlink()
    with pytest.raises(
        DataError, match=r"films.item does not exist, so items have no titles \(set data.on_empty_title=item_id"
    ):
        read(atomic)
    (atomic / "films.inter").unlink()
    with pytest.raises(DataError, match=r"has no .inter file"):
        read(atomic)
    with pytest.raises(
        DataError, match=r"lacks ratings.dat, movies.dat; expected ratings.dat, movies.dat, or RecBole's"
    ):
        MovieLens1MReader(str(atomic)).read()


def test_empty_titles_can_be_allowed(atomic: Path) -> None:
    (atomic / "films.item").write_text(ITEM.replace("Heat", ""), encoding="utf-8")
    assert read(atomic, on_empty_title="item_id").raw.items["title"].tolist()[1] == "item i2"


def test_repeated_interactions_keep_the_last_time(atomic: Path) -> None:
    (atomic / "films.inter").write_text(INTER + "u1\ti1\t9\nu2\ti1\t0\n", encoding="utf-8")
    cleaned = read(atomic)
    assert cleaned.counts["repeats_dropped"] == 2
    times = cleaned.raw.interactions.set_index(["user_id", "item_id"])["timestamp"].to_dict()
    assert times == {("u1", "i1"): 9.0, ("u1", "i2"): 6.0, ("u2", "i1"): 1.0}


@pytest.mark.parametrize(
    "settings", [{"num_items": 10}, {"num_items": 600}, {"mean_length": 300}, {"num_groups": 0}, {"random_rate": 0.1}]
)
def test_synthetic_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"data.reader.{next(iter(settings))}"):
        SyntheticReader(**settings).read()


def test_synthetic_is_seeded() -> None:
    same, other = SyntheticReader(num_users=20).read(), SyntheticReader(num_users=20, seed=1).read()
    pd.testing.assert_frame_equal(SyntheticReader(num_users=20).read().interactions, same.interactions)
    assert not same.interactions.equals(other.interactions)
    assert not same.interactions.duplicated(["user_id", "item_id"]).any()


def test_titles_of_genre_films_fit_their_genre() -> None:
    """Each noun occurs in one genre only, in no title twice; as many films of each genre."""
    items = SyntheticReader(preset="genre_films", num_users=20, num_items=400).read().items
    assert items["title"].is_unique
    assert items["genre"].value_counts().tolist() == [50] * 8
    nouns = items["title"].str.split().str[-1]
    assert (items["genre"].groupby(nouns).nunique() == 1).all()
    assert set(nouns[items["genre"] == "Western"]) <= set(
        "Sheriff Cowboy Saloon Outlaw Ranch Rodeo Gunslinger Stagecoach".split()
    )


@pytest.mark.parametrize("character", ["\r", "\x85", "\u2028", "\0", "\x1c"])
def test_only_a_line_feed_begins_a_line(atomic: Path, character: str) -> None:
    """A carriage return in a title is no new item; line breaks within a title become a space."""
    title = f"The{character}Heat"
    (atomic / "films.item").write_text(ITEM.replace("Heat", title), encoding="utf-8", newline="")
    titles = read(atomic).raw.items["title"].tolist()
    assert titles == ['Amélie "2001"', title.replace("\r", " ")]


def test_iso_times_are_seconds(atomic: Path) -> None:
    """Against Python's datetime; without an offset a time is in UTC."""
    times = ["2020-03-01T12:30:00+02:00", "2020-03-01 10:30:01.5", "2020-02-29"]
    lines = INTER.splitlines()
    text = "\n".join([lines[0], *(f"{line.rpartition(chr(9))[0]}\t{time}" for line, time in zip(lines[1:], times))])
    (atomic / "films.inter").write_text(text)
    expected = [datetime.fromisoformat(time) for time in times]
    expected = [time if time.tzinfo else time.replace(tzinfo=UTC) for time in expected]
    assert AtomicReader(str(atomic)).read().interactions["timestamp"].tolist() == [t.timestamp() for t in expected]
    (atomic / "films.inter").write_text(text.replace("2020-02-29", "2020-02-30"))
    with pytest.raises(DataError, match=r"films.inter:4: '2020-02-30' is not a number or an ISO 8601 time"):
        read(atomic)
    (atomic / "films.inter").write_text(text.replace("2020-02-29", "1583000000"))
    with pytest.raises(DataError, match=r"films.inter:2: '2020-03-01T12:30:00\+02:00' is not a number for timestamp"):
        read(atomic)


def test_missing_times_are_refused_dropped_or_replaced_by_the_order_of_the_file(atomic: Path) -> None:
    (atomic / "films.inter").write_text(INTER.replace("\t6\n", "\t\n"))
    with pytest.raises(DataError, match=r"1 interactions have no timestamp .*on_missing_time.* first at .*inter:3"):
        read(atomic)
    dropped = read(atomic, on_missing_time="drop")
    assert dropped.raw.interactions["timestamp"].tolist() == [5.0, 1.0]
    assert dropped.notes == ("1 of 3 interactions have no timestamp and are left out",)
    assert read(atomic, on_missing_time="file_order").raw.interactions["timestamp"].tolist() == [0.0, 1.0, 0.0]
    (atomic / "films.inter").write_text("user_id\titem_id\nu1\ti2\nu1\ti1\n")
    with pytest.raises(
        DataError, match=r"inter:1 lacks the column timestamp; it has user_id, item_id \(set data.on_mi"
    ):
        read(atomic)
    assert read(atomic, on_missing_time="file_order").raw.interactions["timestamp"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("inter", INTER + "\ti1\t3\n", r"1 interactions have an empty user id, first at .*films.inter:5"),
        ("item", ITEM + " \tNobody\tDrama\n", r"1 item ids are empty, first at .*films.item:4"),
        ("item", ITEM.replace("Heat", "a" * 10_001), r"1 items have a title of more than 10,000 .* first .*item:3"),
        ("inter", INTER + "u1\ti1\tinf\n", r"1 timestamps are not finite numbers, first at .*films.inter:5"),
    ],
)
def test_empty_ids_and_endless_titles_are_refused(atomic: Path, kind: str, text: str, message: str) -> None:
    (atomic / "films.user").unlink()
    (atomic / f"films.{kind}").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(atomic)


def test_a_rating_that_is_no_number_is_refused_if_it_is_used(atomic: Path) -> None:
    (atomic / "films.inter").write_text("user_id\titem_id\tstars\ttimestamp\nu1\ti1\tgood\t3\nu1\ti2\t4\t4\n")
    reader = AtomicReader(str(atomic), rating_column="stars")
    settings = DataSettings("films", str(atomic))
    assert len(clean(reader.read(), settings).raw.interactions) == 2
    with pytest.raises(
        DataError, match=r"1 interactions have no number as stars .*on_missing_rating=drop.* first at .*films.inter:2"
    ):
        clean(reader.read(), replace(settings, min_rating=3))
    with pytest.raises(DataError, match="data.min_rating=3 needs a column with ratings or labels"):
        read(atomic, min_rating=3)


def test_several_data_sets_in_a_folder_are_selected_by_name(atomic: Path) -> None:
    (atomic / "books.inter").write_text(INTER)
    with pytest.raises(DataError, match="has the .inter files of books, films; select one with data.reader.name"):
        read(atomic)
    assert len(AtomicReader(str(atomic), name="films").read().items) == 2
    with pytest.raises(DataError, match="unknown data.reader.name 'film'; choose from: films, books"):
        AtomicReader(str(atomic), name="film").read()
