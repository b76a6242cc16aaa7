"""Data files in other encodings, formats, columns and places: read as what they are, or refused by what is wrong."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from shop import COMMON, NOUNS, Row, inter, items, shop, write

from fellrec.cli.main import main
from fellrec.data.prepared import PreparedData
from fellrec.state.nearest import not_a_directory, similar

Prepare, Refused = Callable[..., PreparedData], Callable[..., str]
BY_ATTRIBUTE = ["partition=attribute", "partition.column=gender", "partition.num_clients=null"]


def counts(found: PreparedData) -> tuple[int, int, int]:
    return found.statistics["users"], found.statistics["items"], found.statistics["interactions_after_core"]


def movielens(folder: Path, separator: str = "::", encoding: str = "utf-8", has_users: bool = True) -> Path:
    """The interactions of the shop as ``ratings.dat`` with half stars, and titles with a letter beyond ASCII."""
    rows = [(int(u[1:]) + 1, int(i[1:]) + 1, r - 0.5, t) for u, i, r, t in shop()]
    films = [(number + 1, f"Café {noun} (1999)", "Drama|Comedy") for number, noun in enumerate(NOUNS)]
    files: dict[str, list[tuple[object, ...]]] = {"ratings": list(rows), "movies": list(films)}
    if has_users:
        files["users"] = [(user + 1, "F", 25, 3, "00000") for user in range(12)]
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        text = "".join(f"{separator.join(map(str, line))}\n" for line in lines)
        (folder / f"{name}.dat").write_bytes(text.encode(encoding))
    return folder


def as_csv(folder: Path, time: Callable[[int], object] = int, names: str = "userId,movieId,rating,timestamp") -> Path:
    ratings = "".join(f"{int(u[1:]) + 1},{int(i[1:]) + 1},{r}.0,{time(t)}\n" for u, i, r, t in shop())
    films = "".join(f'{number + 1},"Amber {noun}, The (1900)",Drama\n' for number, noun in enumerate(NOUNS))
    (folder / "ratings.csv").write_text(f"{names}\n{ratings}")
    (folder / "movies.csv").write_text(f"movieId,title,genres\n{films}")
    return folder


def with_times(time: Callable[[int, int], object]) -> str:
    return inter([(u, i, r, time(number, t)) for number, (u, i, r, t) in enumerate(shop())])  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.replace("user_id:token", " user_id:token ").encode(),
    ],
    ids=["utf-16", "utf-16-be", "utf-32", "carriage returns", "windows", "spaces in the header"],
)
def test_other_ways_to_save_a_text_give_the_same_data(
    tmp_path: Path, data: Prepare, change: Callable[[str], bytes]
) -> None:
    write(tmp_path, inter=inter(shop()), item=items())
    expected = data()
    write(tmp_path, inter=change(inter(shop())), item=change(items()))
    found = data()
    assert found.key != expected.key
    assert found.catalogue.titles == expected.catalogue.titles
    assert found.histories.values.tolist() == expected.histories.values.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (inter(shop()).encode("utf-16-le"), "null bytes; save it as UTF-8"),
        (b"\xff\xfe\x00", "is not utf-16, as its byte order mark says"),
        (gzip.compress(b"user_id", mtime=0), "is a gzip file, not a text; decompress it"),
        (b"PK\x03\x04rest", "is a zip archive (or an Excel file), not a text"),
        (b"PAR1\x15\x04", "is a Parquet file, not a text"),
        (b"\nuser_id\titem_id\n", "has 2 fields instead of 1"),
        (b"user_id\titem_id\nu i\n", "shop.inter:2 has 1 fields instead of 2 (user_id, item_id), which a tab separates, "
         "the line is 'u i'"),
    ],
)  # fmt: skip
def test_files_that_are_no_such_text_are_named(tmp_path: Path, refused: Refused, content: bytes, message: str) -> None:
    write(tmp_path, inter=content, item=items())
    assert message in refused()


def test_an_empty_item_file_is_not_taken_for_an_absent_one(tmp_path: Path, data: Prepare, refused: Refused) -> None:
    """In spite of the cache, which has the data without an item file."""
    write(tmp_path, inter=inter(shop()))
    assert data("data.on_empty_title=item_id").catalogue.titles[0].startswith("item ")
    write(tmp_path, item="")
    assert "shop.item is empty" in refused("data.on_empty_title=item_id")


def test_a_file_of_another_format_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "shop.csv").write_text(inter(shop(), ","))
    (tmp_path / "shop.inter.gz").write_bytes(b"")
    assert re.search(r"data.root=\S+ has no .inter file; there is shop.csv, shop.inter.gz$", refused())


def test_what_the_folder_has_instead_is_said(tmp_path: Path, refused: Refused) -> None:
    movielens(tmp_path)
    for verb in ("data=atomic", "data=ml_100k", "data=ml_csv"):
        assert refused(verb).endswith("; ratings.dat and movies.dat are read by data=ml_1m")
    outer = tmp_path / "downloads"
    outer.mkdir()
    (tmp_path / "ratings.dat").unlink()
    movielens(outer / "ml-1m")
    assert refused("data=ml_1m", f"data.root={outer}").endswith(f"; they are in {outer / 'ml-1m'}")
    as_csv(tmp_path)
    (tmp_path / "ratings.csv").rename(tmp_path / "rating.csv")
    assert "lacks ratings.csv; expected ratings.csv, movies.csv; there is rating.csv" in refused("data=ml_csv")


def test_movielens_10m_has_no_user_file(tmp_path: Path, data: Prepare, refused: Refused) -> None:
    folder = movielens(tmp_path, has_users=False)
    for choice in ("ml_10m", "ml_1m"):
        found = data(f"data={choice}")
        assert counts(found) == (12, 10, 72)
        assert found.catalogue.titles[0] == "Café kettle (1999)"
        assert list(found.users.columns) == ["user_id"]
    assert "partition.column=gender: the users of this data set have no attributes" in refused(
        f"data.root={folder}", "data=ml_10m", *BY_ATTRIBUTE
    )


@pytest.mark.parametrize(("separator", "shown"), [("\t", r"'1\\tCafé"), (",", "'1,Café")])
def test_another_separator_than_that_of_movielens_is_shown(
    tmp_path: Path, refused: Refused, separator: str, shown: str
) -> None:
    movielens(tmp_path, separator)
    message = refused("data=ml_1m")
    assert (
        "movies.dat:1 has 1 fields instead of 3 (item_id, title, genre), which '::' separates, the line is" in message
    )
    assert re.search(shown, message)


def test_csv_with_iso_times_and_with_other_separators(tmp_path: Path, data: Prepare, refused: Refused) -> None:
    """As Kaggle's copy of 20M has them; the order is that of the numbers."""
    as_csv(tmp_path)
    expected = data("data=ml_csv").histories.values.tolist()
    as_csv(tmp_path, lambda time: datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S"))
    assert data("data=ml_csv").histories.values.tolist() == expected
    as_csv(tmp_path, names="userId, movieId, rating, timestamp")
    assert data("data=ml_csv").histories.values.tolist() == expected
    for separator in (";", "\t"):
        text = (as_csv(tmp_path) / "ratings.csv").read_text().replace(",", separator)
        (tmp_path / "ratings.csv").write_text(text)
        assert "ratings.csv:1: columns must be separated by a comma; the header is 'userId" in refused("data=ml_csv")
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n1,"Up,Drama\n')
    as_csv(tmp_path / "..")
    (tmp_path / "ratings.csv").write_text((tmp_path / ".." / "ratings.csv").read_text())
    assert "movies.csv:2: a quoted field does not end" in refused("data=ml_csv")


@pytest.mark.parametrize("word", ["", " ", "NaN", "nan", "NULL", "None", "NA", "\\N", "NaT"])
def test_words_for_a_missing_time(tmp_path: Path, data: Prepare, refused: Refused, word: str) -> None:
    write(tmp_path, inter=with_times(lambda number, time: word if number == 3 else time), item=items())
    assert "1 interactions have no timestamp (set data.on_missing_time=" in refused()
    found = data("data.on_missing_time=drop")
    assert found.statistics["interactions_after_core"] == 71
    assert found.notes == ("1 of 72 interactions have no timestamp and are left out",)


def test_times_outside_the_range_of_nanoseconds(tmp_path: Path, data: Prepare) -> None:
    write(
        tmp_path,
        inter=with_times(lambda number, time: f"{1000 + time % 997 * 8:04}-01-0{1 + number % 9}"),
        item=items(),
    )
    by_file = data().histories
    years = {(u, i): (1000 + t % 997 * 8, 1 + number % 9) for number, (u, i, _, t) in enumerate(shop())}
    found = data()
    for user, name in enumerate(found.users["user_id"]):
        ids = [found.catalogue.item_ids[item] for item in by_file.row(user)]
        assert ids == sorted(ids, key=lambda item: years[name, item])


@pytest.mark.parametrize("time", ["0", "-1", "1600000000000"])
def test_times_that_are_far_from_the_others_are_said(tmp_path: Path, data: Prepare, time: str) -> None:
    """A number that stands for a missing time, or milliseconds among seconds."""
    write(tmp_path, inter=with_times(lambda number, given: time if number < 2 else given), item=items())
    assert any(
        note.startswith("2 of 72 interactions have a timestamp that is more than 100 times smaller or larger")
        and f"such as {time}: a missing time, or another unit?" in note
        for note in data().notes
    )
    for scale in (1, 1000, 10**6):
        write(tmp_path, inter=with_times(lambda _, given: given * scale), item=items())  # noqa: B023
        assert data().notes == ()


def test_ids_that_differ_in_spaces_are_not_two_users_or_items(tmp_path: Path, refused: Refused) -> None:
    spaced = [(f"{u} " if number % 2 else u, i, r, t) for number, (u, i, r, t) in enumerate(shop())]
    write(tmp_path, inter=inter(spaced), item=items())
    assert "user ids are there with and without spaces around them, such as 'u0" in refused()
    spaced = [(u, f" {i}" if number % 2 else i, r, t) for number, (u, i, r, t) in enumerate(shop())]
    write(tmp_path, inter=inter(spaced))
    assert "item ids are there with and without spaces around them, such as 'i" in refused(
        "data.on_empty_title=item_id"
    )


@pytest.mark.parametrize(
    ("written", "listed"), [("{:d}", "{:02d}"), ("{:d}.0", "{:d}"), ("U{:d}", "u{:d}"), ("{:d}", " {:d}")]
)
def test_an_id_that_another_file_writes_otherwise_is_shown(
    tmp_path: Path, refused: Refused, written: str, listed: str
) -> None:
    rows: list[Row] = [(written.format(int(u[1:])), i, r, t) for u, i, r, t in shop()]
    users = "".join(f"{listed.format(user)}\n" for user in range(12))
    write(tmp_path, inter=inter(rows), item=items(), user=f"user_id:token\n{users}")
    first = next(row[0] for row in rows if row[0] not in users.split("\n"))
    number = int(re.findall(r"\d+", first)[0])
    assert (
        f"have a user that is not in the user file (user '{first}'; it has '{listed.format(number)}'), first at"
        in refused()
    )


@pytest.mark.parametrize("title", ["\u200b", "\u00a0\ufeff", "\u200e \u2060"])
def test_a_title_of_which_nothing_is_seen_is_empty(tmp_path: Path, refused: Refused, title: str) -> None:
    write(
        tmp_path, inter=inter(shop()), item=items({f"i{k}": title if k == 3 else noun for k, noun in enumerate(NOUNS)})
    )
    assert "1 items have an empty title" in (line := refused())
    assert "shop.item:5" in line


@pytest.mark.parametrize(
    ("header", "values", "note"),
    [
        ("label", ("True", "False"), "the column label is not used: 36 of 72 interactions have a label of 0 or less"),
        ("label", ("yes", "no"), "72 of 72 interactions have no number in the column label, such as 'yes'"),
        ("click", ("1", "0"), "the column click is not used: 36 of 72 interactions have 0 there"),
        ("is_like", ("1", "-1"), "the column is_like is not used: 36 of 72 interactions have -1 there"),
        ("page", ("7", "8"), None),
    ],
)
def test_labels_of_any_name_and_form_are_not_ignored_without_a_word(
    tmp_path: Path, data: Prepare, header: str, values: tuple[str, str], note: str | None
) -> None:
    rows = [(u, i, values[number % 2], t) for number, (u, i, _, t) in enumerate(shop())]
    write(tmp_path, inter=inter(rows, rating=header), item=items())  # type: ignore[arg-type]
    notes = data().notes
    assert (notes == ()) if note is None else notes[0].startswith(note)
    if values[1] in ("False", "0", "-1"):
        kept = data("data.min_rating=1", f"data.reader.rating_column={header}", "partition.num_clients=1")
        assert kept.statistics["interactions_after_core"] == 36


def test_a_label_beside_a_rating_is_not_ignored_without_a_word(tmp_path: Path, data: Prepare) -> None:
    lines = inter(shop()).splitlines()
    text = "\n".join([f"{lines[0]}\tlabel:float", *(f"{line}\t{k % 2}" for k, line in enumerate(lines[1:]))])
    write(tmp_path, inter=text, item=items())
    assert data().notes[0].startswith("the column label is not used: 36 of 72 interactions have 0 there")


def users_with(gender: Callable[[int], str]) -> str:
    return "user_id:token\tgender:token\n" + "".join(f"u{user:02d}\t{gender(user)}\n" for user in range(12))


@pytest.mark.parametrize("word", ["", "nan", "NULL", " "])
def test_users_without_the_attribute_of_the_partition(
    tmp_path: Path, data: Prepare, refused: Refused, word: str
) -> None:
    write(
        tmp_path, inter=inter(shop()), item=items(), user=users_with(lambda user: word if user < 3 else "fm"[user % 2])
    )
    message = "3 of 12 users have no gender (first: user 'u00'); partition.on_missing=client makes them"
    assert message in refused(*BY_ATTRIBUTE)
    found = data(*BY_ATTRIBUTE, "partition.on_missing=client")
    of_user = dict(zip(found.users["user_id"], found.client_of_user.tolist(), strict=True))
    assert found.num_clients == 3
    assert {user for user, client in of_user.items() if client == of_user["u00"]} == {"u00", "u01", "u02"}


def test_spaces_around_an_attribute_make_no_client(tmp_path: Path, data: Prepare) -> None:
    write(tmp_path, inter=inter(shop()), item=items(), user=users_with(lambda user: ["f", " f", "m", "m "][user % 4]))
    assert data(*BY_ATTRIBUTE).statistics["users_per_client"] == [6, 6]


def parts(names: tuple[str, str, str], shift: int = 0) -> dict[str, str]:
    by_user: dict[str, list[Row]] = {}
    for row in sorted(shop(), key=lambda row: row[3]):
        by_user.setdefault(row[0], []).append(row)
    places = zip(names, (slice(0, 4), slice(4, 5), slice(5, 6)), strict=True)
    found = {name: [row for rows in by_user.values() for row in rows[place]] for name, place in places}
    found[names[2]] = [(u, i, r, t - shift) for u, i, r, t in found[names[2]]]
    return {f"{name}__inter": inter(rows) for name, rows in found.items()}


@pytest.mark.parametrize(
    "names", [("train", "dev", "test"), ("train", "val", "test"), ("training", "validation", "testing")]
)
def test_parts_of_a_split_with_other_names(tmp_path: Path, refused: Refused, names: tuple[str, str, str]) -> None:
    write(tmp_path, item=items(), **parts(names))
    assert "the parts of a split must be called NAME.train.inter, NAME.valid.inter, NAME.test.inter; rename them" in (
        refused("holdout=given")
    )


def test_a_split_beside_the_whole_is_not_ignored_without_a_word(
    tmp_path: Path, data: Prepare, refused: Refused
) -> None:
    write(tmp_path, inter=inter(shop()), item=items())
    assert data().notes == ()
    write(tmp_path, **parts(("train", "valid", "test")))
    names = "shop.train.inter, shop.valid.inter, shop.test.inter"
    assert data().notes == (f"shop.inter is read, and {names} are ignored",)
    assert f"but {names} are ignored because shop.inter is beside them" in refused("holdout=given")


def test_a_given_split_that_is_not_by_time_is_said(tmp_path: Path, data: Prepare) -> None:
    write(tmp_path, item=items(), **parts(("train", "valid", "test")))
    assert data("holdout=given").notes == ()
    write(tmp_path, **parts(("train", "valid", "test"), shift=250))
    assert data("holdout=given").notes[0].startswith("12 times a user's first interaction of a held-out part is older")


def test_similar_paths_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "ml-1m").mkdir(parents=True)
    (tmp_path / "data" / "ml-100k.zip").touch()
    wanted = f"; similar: {tmp_path / 'data' / 'ml-1m'}"
    for mistyped in ("data/ml_1m", "data/ML-1M", "dta/ml-1m", "Data/ml1m", "data/ml-1mm"):
        assert similar(tmp_path / mistyped) == wanted
    assert similar(tmp_path / "data") == ""
    assert similar(tmp_path / "nothing" / "at" / "all") == f"; {tmp_path / 'nothing'} does not exist"
    assert similar(tmp_path / ("x" * 5000)) == similar(Path("a\0b")) == ""
    assert not_a_directory("data.root=x", tmp_path / "data" / "ml-100k.zip").endswith("but an archive; decompress it")
    monkeypatch.chdir(tmp_path)
    assert not_a_directory("resume=dta", Path("dta")) == "resume=dta is not a directory; similar: data"


def test_every_setting_that_is_a_path_offers_similar_ones(
    run_dir: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    folder = run_dir.parent
    movielens(folder / "ml-1m")
    (folder / "model").mkdir()
    at = f"; similar: {folder}"
    assert f"{at}/ml-1m" in refused("data=ml_1m", f"data.root={folder}/ml_1m")
    shop_root = write(folder, inter=inter(shop()), item=items())
    common = [*COMMON, f"data.root={shop_root}", "tracking.uri=null"]
    for verb, arguments in (
        ("train", [*common, "backbone=hf", f"backbone.path={folder}/modle"]),
        ("train", [*common, "adapter=lora", f"adapter.path={folder}/modle"]),
        ("plan", [*COMMON, f"data.root={shop_root}", "backbone=hf", f"backbone.config={folder}/modle"]),
        ("submit", ["--dry-run", *COMMON, f"data.root={folder}/modle"]),
    ):
        with pytest.raises(SystemExit):
            main([verb, *arguments])
        assert f"{at}/model" in capsys.readouterr().err, arguments
    for arguments in (
        ["evaluate", f"{folder}/rnu"],
        ["train", f"resume={folder}/rnu"],
        ["submit", f"resume={folder}/rnu", "--dry-run"],
        ["export", f"{folder}/rnu", "--format", "trec"],
        ["sync", f"{folder}/rnu"],
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        shown = capsys.readouterr()
        assert f"{at}/run" in shown.err + shown.out, arguments
