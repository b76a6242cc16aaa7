"""Cases of data and partitions that users meet: small inputs made here, and what each must give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from shop import COMMON, NOUNS, TITLES, Row, inter, items, shop, write

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.data.prepared import PreparedData
from fellrec.experiment.build import build_data

TRAIN = [
    "trainer.num_rounds=1",
    "backbone.pretrain.steps=2",
    "references.show=[popularity]",
    "tracking.max_logged_clients=0",
]


def counts(prepared: PreparedData) -> tuple[int, int, int]:
    statistics = prepared.statistics
    return statistics["users"], statistics["items"], statistics["interactions_after_core"]


def train(folder: Path, tmp_path: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    """``results.json`` of a run."""
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    given = [*COMMON, *TRAIN, f"data.root={folder}", f"cache_dir={cache}", f"run_dir={run_dir}", f"tracking.uri={uri}"]
    main(["train", *given, *overrides])
    found: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return found


def test_d01_a_byte_order_mark_is_no_part_of_the_first_column(
    tmp_path: Path, data: Callable[..., PreparedData]
) -> None:
    bom = b"\xef\xbb\xbf"
    write(tmp_path, inter=bom + inter(shop()).encode(), item=bom + items().encode())
    assert counts(data()) == (12, 10, 72)


@pytest.mark.parametrize("separator", [",", ";", "|", " "])
def test_d02_another_separator_is_named(tmp_path: Path, refused: Callable[..., str], separator: str) -> None:
    text = inter(shop(), separator)
    write(tmp_path, inter=text, item=items())
    assert f"columns must be separated by a tab; the header is {text.splitlines()[0]!r}" in refused()


def test_d03_equal_lines_of_the_user_file_count_once(tmp_path: Path, data: Callable[..., PreparedData]) -> None:
    users = "".join(f"u{number:02d}\tf\n" for number in (*range(12), 3, 5))
    write(
        tmp_path,
        inter=inter(shop()),
        item=items() + items().splitlines()[4] + "\n",
        user=f"user_id:token\tgender:token\n{users}",
    )
    assert counts(data()) == (12, 10, 72)


def test_d03_users_with_different_lines_are_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    users = "".join(f"u{number:02d}\tf\n" for number in range(12)) + "u03\tm\n"
    write(tmp_path, inter=inter(shop()), item=items(), user=f"user_id:token\tgender:token\n{users}")
    assert "1 users are listed again with other values (user 'u03'), first at" in (line := refused())
    assert "shop.user:14" in line


def test_d04_the_title_column_is_the_one_that_is_named(tmp_path: Path, data: Callable[..., PreparedData]) -> None:
    lines = [f"{item}\tsku {item}\t{title}\tkitchen\tall" for item, title in TITLES.items()]
    header = "item_id:token\ttitle:token\titem_name:token_seq\tgenre:token_seq\tgenres:token_seq"
    write(tmp_path, inter=inter(shop()), item="\n".join([header, *lines]) + "\n")
    assert data("data.reader.title_column=item_name").catalogue.titles == tuple(TITLES.values())
    assert data("data.reader.title_column=item_id").catalogue.titles == tuple(TITLES)
    assert data().catalogue.titles[0] == "sku i0"


@pytest.mark.parametrize("header", ["item_id:token\ttitle:token\ttitle:token_seq", "item_id\ttitle\titem_id"])
def test_columns_with_one_name_are_refused(tmp_path: Path, refused: Callable[..., str], header: str) -> None:
    write(tmp_path, inter=inter(shop()), item=items(header=header))
    assert "shop.item:1 has the column" in (line := refused())
    assert "more than once" in line


def test_d05_without_an_item_file_a_setting_calls_items_by_their_ids(
    tmp_path: Path, cache: Path, refused: Callable[..., str]
) -> None:
    write(tmp_path, inter=inter(shop()))
    sasrec = ["backbone=sasrec", "backbone.hidden_size=8", "~backbone.pretrain"][:2]
    assert "shop.item does not exist, so items have no titles (set data.on_empty_title=item_id" in refused(*sasrec)
    given = [name for name in TRAIN if "pretrain" not in name]
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    main(["train", *COMMON, *given, *sasrec, "data.on_empty_title=item_id", f"data.root={tmp_path}", f"run_dir={run_dir}",
          f"cache_dir={cache}", f"tracking.uri={uri}"])  # fmt: skip
    assert json.loads((run_dir / "results.json").read_text())["num_users"] == 12


def test_d06_items_without_a_line_are_called_by_their_ids_or_left_out(
    tmp_path: Path, data: Callable[..., PreparedData]
) -> None:
    write(
        tmp_path,
        inter=inter(shop()),
        item=items({item: title for item, title in TITLES.items() if item not in ("i3", "i7")}),
    )
    named = data("data.on_empty_title=item_id")
    assert counts(named) == (12, 10, 72)
    assert dict(zip(named.catalogue.item_ids, named.catalogue.titles, strict=True))["i3"] == "item i3"
    assert named.notes[0] == '2 items have no line in the item file and are called "item <id>"'
    dropped = data("data.on_empty_title=drop", "holdout.min_length=3")
    lost = sum(row[1] in ("i3", "i7") for row in shop())
    assert counts(dropped)[1:] == (8, 72 - lost)
    assert dropped.notes[0].startswith(f"{lost} of 72 interactions have an item without a title")


def split() -> dict[str, list[Row]]:
    by_user: dict[str, list[Row]] = {}
    for row in sorted(shop(), key=lambda row: row[3]):
        by_user.setdefault(row[0], []).append(row)
    places = {"train": slice(0, 4), "valid": slice(4, 5), "test": slice(5, 6)}
    return {stage: [row for rows in by_user.values() for row in rows[place]] for stage, place in places.items()}


def test_d07_a_split_is_taken_as_given(
    tmp_path: Path, data: Callable[..., PreparedData], refused: Callable[..., str]
) -> None:
    parts = split()
    parts["train"], parts["test"] = [(u, i, r, t + 10**6) for u, i, r, t in parts["train"]], parts["test"]
    write(tmp_path, item=items(), **{f"{stage}__inter": inter(rows) for stage, rows in parts.items()})
    assert "is split already" in (line := refused())
    assert "holdout=given" in line
    found = data("holdout=given")
    assert [found.statistics[stage] for stage in ("train", "valid", "test")] == [48, 12, 12]
    by_user = {row[0]: row[1] for row in parts["test"]}
    assert [found.catalogue.item_ids[item] for item in found.test.values] == [
        by_user[user] for user in found.users["user_id"]
    ]
    (tmp_path / "shop.valid.inter").unlink()
    assert "lacks shop.valid.inter" in refused("holdout=given")


def test_d07_a_given_split_needs_files_that_are_split(tmp_path: Path, refused: Callable[..., str]) -> None:
    write(tmp_path, inter=inter(shop()), item=items())
    assert "holdout=given needs data that are split" in refused("holdout=given")


def test_d08_movielens_as_csv(tmp_path: Path, data: Callable[..., PreparedData], refused: Callable[..., str]) -> None:
    ratings = "".join(f"{int(u[1:]) + 1},{int(i[1:]) + 1},{r}.0,{t}\n" for u, i, r, t in shop())
    movies = "".join(f'{k + 1},"Amber {noun}, The ""{k}"" (1900)",Drama|Comedy\n' for k, noun in enumerate(NOUNS))
    (tmp_path / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n{ratings}")
    (tmp_path / "movies.csv").write_text(f"movieId,title,genres\n{movies}")
    found = data("data=ml_csv")
    assert counts(found) == (12, 10, 72)
    assert found.catalogue.titles[0] == 'Amber kettle, The "0" (1900)'
    assert found.catalogue.attributes["genre"][0] == "Drama Comedy"
    assert "ratings.csv and movies.csv are read by data=ml_csv" in refused("data=ml_1m")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
def test_d09_movielens_1m_as_published_and_as_utf8(
    tmp_path: Path, data: Callable[..., PreparedData], refused: Callable[..., str], encoding: str
) -> None:
    ratings = "".join(f"{int(u[1:]) + 1}::{int(i[1:]) + 1}::{r}::{t}\n" for u, i, r, t in shop())
    movies = "".join(f"{k + 1}::Café {noun} (1999)::Drama|Comedy\n" for k, noun in enumerate(NOUNS))
    users = "".join(f"{user + 1}::F::25::3::00000\n" for user in range(12))
    for name, text in (("ratings", ratings), ("movies", movies), ("users", users)):
        (tmp_path / f"{name}.dat").write_bytes(text.encode(encoding))
    assert data("data=ml_1m").catalogue.titles[0] == "Café kettle (1999)"
    if encoding == "utf-8":
        (tmp_path / "movies.dat").write_bytes(movies.encode() + "11::Señor::Drama\n".encode("latin-1"))
        assert "movies.dat:11 is not utf-8: byte 0xf1, but other letters are, so it is not latin-1" in refused(
            "data=ml_1m"
        )


@pytest.mark.parametrize("first", [0, 1])
def test_d10_positions_are_no_times(tmp_path: Path, refused: Callable[..., str], first: int) -> None:
    place = {row: first + k for rows in _by_user().values() for k, row in enumerate(rows)}
    write(tmp_path, inter=inter([(*row[:3], place[row]) for row in shop()]), item=items())
    assert "only the position of each interaction in its user's history" in refused("holdout=global_time")
    assert "only the position" in refused("holdout=global_time", "data.core=4"), "also before a filter"


def test_d11_equal_times_are_no_times(
    tmp_path: Path, refused: Callable[..., str], data: Callable[..., PreparedData]
) -> None:
    write(tmp_path, inter=inter([(*row[:3], 1_600_000_000) for row in shop()]), item=items())
    assert "all timestamps are equal, so a split over time would divide users" in refused("holdout=global_time")
    assert (
        data().notes[0].startswith("60 of 60 successive interactions of a user (100.0%) have equal times, 24 of them")
    )


def test_ties_at_the_cut_of_a_split_over_time_are_said(tmp_path: Path, data: Callable[..., PreparedData]) -> None:
    """72 interactions on 6 days, 12 a day: the last two days hold 24, and 14 are held out."""
    place = {row: 100 * k for rows in _by_user().values() for k, row in enumerate(rows)}
    late = [(*row[:3], place[row] + (7 if row[0] == "u00" else 0)) for row in shop()]
    write(tmp_path, inter=inter(late), item=items())  # u00 begins later, so that these are times
    found = data("holdout=global_time", "partition.num_clients=1")
    assert found.statistics["tied_at_cuts"] == 22
    assert found.notes[-1].startswith("22 interactions have the time at which two stages are divided")


def _by_user() -> dict[str, list[Row]]:
    by_user: dict[str, list[Row]] = {}
    for row in sorted(shop(), key=lambda row: row[3]):
        by_user.setdefault(row[0], []).append(row)
    return by_user


def test_d12_tied_times_are_said_and_can_be_drawn(tmp_path: Path, cache: Path) -> None:
    """The same lines in two orders: with random ties the histories are equal, by file order they are not."""
    rows = [(*row[:3], 1_600_000_000 + 86_400 * (k // 3)) for rows in _by_user().values() for k, row in enumerate(rows)]
    orders: dict[str, list[Row]] = {"given": rows, "by_item": sorted(rows, key=lambda row: row[1])}
    users = "user_id:token\n" + "".join(f"u{number:02d}\n" for number in range(12))
    found: dict[tuple[str, str], PreparedData] = {}
    for name, lines in orders.items():
        (tmp_path / name).mkdir()
        folder = write(tmp_path / name, inter=inter(lines), item=items(), user=users)
        for ties in ("file", "shuffle"):
            overrides = [*COMMON, f"data.root={folder}", f"cache_dir={cache}", f"data.ties={ties}"]
            found[name, ties] = build_data(compose(overrides))
    by_file, drawn = ([found[name, ties].histories.values.tolist() for name in orders] for ties in ("file", "shuffle"))
    assert by_file[0] != by_file[1]
    assert drawn[0] == drawn[1]
    assert drawn[0] != by_file[1]
    assert found["given", "shuffle"].notes == ()
    # 6 interactions on 2 days: 4 of 5 pairs are on one day, and the last 2 interactions are held out.
    note = "48 of 60 successive interactions of a user (80.0%) have equal times, 24 of them in different stages"
    assert found["given", "file"].notes[0].startswith(note)


def test_train_says_what_prepare_says(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """d12, d13, d14 and d15: ties, repeats, labels; and the headline counts tested users."""
    rows = [(u, i, r % 2, t // 10_000 * 10_000) for u, i, r, t in shop()] + [
        (*row[:3], row[3] + 5) for row in shop()[:20]
    ]
    few = [(f"v{k}", item, 1, 1_600_000_000 + k) for k in range(8) for item in ("i0", "i1")]
    folder = write(tmp_path, inter=inter([*rows, *few], rating="label"), item=items())  # type: ignore[list-item]
    results = train(folder, tmp_path, cache, "trainer.cold_users_below=99", "trainer.sampled_candidates=50")
    assert "trainer.sampled_candidates=50: there are 10 items, and all of them are candidates" in caplog.text
    assert "successive interactions of a user" in caplog.text
    assert "20 of 108 interactions repeat a user and an item" in caplog.text
    assert "the column label is not used" in caplog.text
    assert results["num_users"] == 12
    assert results["cold"]["users"] == results["summary"]["cold_users/num_users"] == 12


def test_d13_repeats_are_kept_on_request(tmp_path: Path, cache: Path, data: Callable[..., PreparedData]) -> None:
    again = [(*row[:3], row[3] + 500_000) for row in shop()[:20]]
    write(tmp_path, inter=inter([*shop(), *again]), item=items())
    assert counts(data()) == (12, 10, 72)
    assert data().notes[0].startswith("20 of 92 interactions repeat a user and an item")
    assert counts(data("data.repeats=keep")) == (12, 10, 92)
    assert train(tmp_path, tmp_path, cache, "data.repeats=keep")["num_users"] == 12


def test_d14_only_what_is_positive_is_kept_on_request(
    tmp_path: Path, data: Callable[..., PreparedData], refused: Callable[..., str]
) -> None:
    write(tmp_path, inter=inter(shop()), item=items())
    kept = sum(row[2] >= 3 for row in shop())
    found = data("data.min_rating=3", "partition.num_clients=1")
    assert found.statistics["interactions_after_core"] == kept
    assert (found.statistics["interactions_as_read"], found.statistics["below_min_rating"]) == (72, 72 - kept)
    assert "data.min_rating=9 leaves no interactions" in refused("data.min_rating=9")
    labels = [(u, i, int(r >= 3), t) for u, i, r, t in shop()]
    write(tmp_path, inter=inter(labels, rating="label"))
    assert data().notes[0].startswith(f"the column label is not used: {72 - kept} of 72 interactions have a label of 0")
    assert data("data.min_rating=1", "partition.num_clients=1").statistics["interactions_after_core"] == kept


def test_d16_odd_titles_arrive_unchanged(tmp_path: Path, cache: Path, data: Callable[..., PreparedData]) -> None:
    odd = ['"', "{title}", "NA", "null", "nan", "日本語 🥹", "[bold]x[/y]", "a,b;c|d", "None ' \\n", "العربية"]
    titles = dict(zip(TITLES, odd, strict=True))
    write(tmp_path, inter=inter(shop()), item=items(titles))
    assert data().catalogue.titles == tuple(odd)
    train(tmp_path, tmp_path, cache, "data.name='[bold]x'")
    stored = next(path for path in (cache / "data").glob("*/items.parquet") if len(pd.read_parquet(path)) == 10)
    assert stored


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("partition.seed=-1", "partition.seed=-1 is not allowed: a whole number from 0 to 4294967295"),
        ("partition.seed=4294967296", "partition.seed=4294967296 is not allowed"),
        ("partition.num_factors=0", "partition.num_factors=0 is not allowed: a whole number of at least 1"),
        ("data.core=-1", "data.core=-1 is not allowed: a whole number of at least 0"),
        ("data.min_user_interactions=-1", "data.min_user_interactions=-1 is not allowed"),
        ("data.min_rating=nan", "data.min_rating=nan is not allowed"),
    ],
)
def test_c05_numbers_of_partitions_and_data(
    tmp_path: Path, refused: Callable[..., str], override: str, message: str
) -> None:
    write(tmp_path, inter=inter(shop()), item=items())
    assert message in refused("partition=kmeans", override)


def test_c06_fewer_clients_than_asked_are_said(tmp_path: Path, data: Callable[..., PreparedData]) -> None:
    write(tmp_path, inter=inter(shop()), item=items())
    found = data("partition=dirichlet", "partition.num_clients=5", "partition.concentration=0.001")
    assert found.num_clients < 5
    assert f"partition.num_clients=5 was asked for, but {found.num_clients} clients have users" in found.notes
    few = data("partition=per_user", "partition.num_clients=5", "data.max_users=99", "data.max_train_samples=999")
    assert few.notes == (
        "partition.num_clients=5 was asked for, but 12 clients have users",
        "data.max_users=99 was asked for, but 12 users exist",
        "data.max_train_samples=999 was asked for, but 36 training targets exist",
    )
