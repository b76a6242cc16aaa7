"""Tables of one's own: every format says the same, and what is wrong with a file is said with its place."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fellrec.data.clean import clean
from fellrec.data.files import files_name
from fellrec.data.readers import TableReader
from fellrec.data.schema import RawData
from fellrec.data.settings import DataSettings
from fellrec.data.table_settings import ColumnSettings, TableSettings
from fellrec.errors import ConfigError, DataError

ROWS = [
    ("u1", "7", 4.5, "2020-03-01T12:30:00+02:00", 'Café "du" Nord, The', "Drama|Crime"),
    ("u1", "8", None, "2020-03-01 10:30:01", "Alien\nResurrection", ""),
    ("ü2", "7", 3.0, "2020-02-29", 'Café "du" Nord, The', "Drama|Crime"),
]
NAMES = ("user_id", "item_id", "rating", "timestamp", "title", "genre")
SECONDS = [
    datetime.datetime(2020, 3, 1, 10, 30, 0, tzinfo=datetime.UTC).timestamp(),
    datetime.datetime(2020, 3, 1, 10, 30, 1, tzinfo=datetime.UTC).timestamp(),
    datetime.datetime(2020, 2, 29, tzinfo=datetime.UTC).timestamp(),
]
OBJECTS = [dict(zip(NAMES, row, strict=True)) for row in ROWS]


def csv_text(separator: str, end: str = "\n") -> str:
    frame = pd.DataFrame(ROWS, columns=list(NAMES))
    return frame.to_csv(index=False, sep=separator, lineterminator=end)


def json_lines() -> str:
    """With a blank line, another order of keys, a list, and without the keys that have no value."""
    lists = [{**row, "genre": str(row["genre"]).split("|")} for row in reversed(OBJECTS)]
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in lists]
    return "\n\n".join(reversed(lines)) + "\n"


def parquet(folder: Path) -> Path:
    """Whole numbers as ids, a time zone, a category and a list."""
    times = pa.array([round(time * 1e6) for time in SECONDS], type=pa.timestamp("us", tz="Europe/Berlin"))
    table = pa.table(
        {
            "user_id": pa.array([row[0] for row in ROWS]).dictionary_encode(),
            "item_id": pa.array([int(row[1]) for row in ROWS]),
            "rating": pa.array([row[2] for row in ROWS]),
            "timestamp": times,
            "title": [row[4] for row in ROWS],
            "genre": [str(row[5]).split("|") for row in ROWS],
        }
    )
    pq.write_table(table, folder / "plays.parquet")
    return folder / "plays.parquet"


def text_file(name: str, text: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        content = text.encode(encoding)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return folder / name

    return write


FILES = {
    "csv": text_file("plays.csv", csv_text(",")),
    "csv of Excel": text_file("plays.csv", csv_text(";", "\r\n"), "utf-8-sig"),
    "csv in utf-16": text_file("plays.csv", csv_text("\t"), "utf-16"),
    "csv with bars, compressed": text_file("plays.csv.gz", csv_text("|")),
    "tsv": text_file("plays.tsv", csv_text("\t")),
    "json lines": text_file("plays.jsonl", json_lines()),
    "json lines with a mark, compressed": text_file("plays.json.gz", json_lines(), "utf-8-sig"),
    "parquet": parquet,
}


def read(path: Path, **settings: object) -> RawData:
    return TableReader(TableSettings(str(path), **settings)).read()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    path = FILES[name](tmp_path)
    raw = read(path)
    assert raw.interactions[["user_id", "item_id"]].to_numpy().tolist() == [list(row[:2]) for row in ROWS]
    assert raw.interactions["timestamp"].tolist() == SECONDS
    assert raw.interactions["rating"].fillna(-1).tolist() == [4.5, -1, 3]
    cleaned = clean(raw, DataSettings("plays", None)).raw
    assert cleaned.items.to_numpy().tolist() == [
        ["7", 'Café "du" Nord, The', "Drama Crime"],
        ["8", "Alien Resurrection", ""],
    ]
    assert cleaned.users["user_id"].tolist() == ["u1", "ü2"]
    assert files_name({"path": str(path), "root": None}) == "plays"


def test_places_of_rows_are_lines_of_the_file(tmp_path: Path) -> None:
    """A title with a line break takes two lines, a blank line of JSON one."""
    places = {
        "csv": ["plays.csv:2", "plays.csv:3", "plays.csv:5"],
        "json lines": ["plays.jsonl:1", "plays.jsonl:3", "plays.jsonl:5"],
        "parquet": ["plays.parquet, row 1", "plays.parquet, row 2", "plays.parquet, row 3"],
    }
    for name, expected in places.items():
        raw = read(FILES[name](tmp_path))
        assert [raw.where_interaction(row).removeprefix(f"{tmp_path}/") for row in range(3)] == expected
        assert raw.where_item(1) == raw.where_interaction(1)
        assert raw.where_user(1) == raw.where_interaction(2)


PLAYS = "who,what,when,land\nana,x,3,DE\nbo,y,2,\nana,y,5,FR\nbo,x,9,US\n"
COLUMNS = ColumnSettings(user="who", item="what", time="when", of_user=("land",))


def test_items_and_users_of_other_files_and_other_names(tmp_path: Path) -> None:
    (tmp_path / "plays.csv").write_text(PLAYS)
    (tmp_path / "songs.jsonl").write_text(
        '{"id": "x", "name": "Nord", "artist": ["A", "B"], "year": 1999, "title": "not this"}\n'
        '{"id": "y", "name": "Süd", "genres": "Pop|Rock"}\n'
    )
    columns = ColumnSettings(user="who", item="what", time="when", title="name", item_of_items="id")
    raw = read(tmp_path / "plays.csv", items=str(tmp_path / "songs.jsonl"), columns=columns)
    assert {tuple(row.items()) for row in raw.items.to_dict("records")} == {
        (("item_id", "x"), ("title", "Nord"), ("genre", ""), ("artist", "A B"), ("year", "1999")),
        (("item_id", "y"), ("title", "Süd"), ("genre", "Pop Rock"), ("artist", ""), ("year", "")),
    }
    (tmp_path / "people.tsv").write_text("who\tage\nana\t30\nbo\t40\n")
    raw = read(tmp_path / "plays.csv", users=str(tmp_path / "people.tsv"), columns=COLUMNS)
    assert raw.users.to_dict("list") == {"user_id": ["ana", "bo"], "age": ["30", "40"]}


def test_what_the_interactions_say_of_users_and_items_is_the_first_value(tmp_path: Path) -> None:
    (tmp_path / "plays.csv").write_text(
        PLAYS.replace("land\n", "land,title\n")
        .replace("DE\n", "DE,\n")
        .replace(",\nana", ",,Süd\nana")
        .replace("FR\n", "FR,Sud\n")
        .replace("US\n", "US,Nord\n")
    )
    raw = read(tmp_path / "plays.csv", columns=COLUMNS)
    assert raw.users.to_dict("list") == {"user_id": ["ana", "bo"], "land": ["DE", "US"]}
    assert raw.items.to_dict("list") == {"item_id": ["x", "y"], "title": ["Nord", "Süd"]}
    assert raw.notes == ("1 items have several titles, such as 'y': 'Süd' and 'Sud'; the first is used",)


def test_a_file_without_a_header_and_times_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "plays.csv").write_text("ana;x;01.02.2020 13:00\nbo;y;02.01.2020 13:00\n")
    header = ("user", "item", "time")
    settings = {"header": header, "separator": ";", "time_format": "%d.%m.%Y %H:%M"}
    times = read(tmp_path / "plays.csv", **settings).interactions["timestamp"].tolist()
    expected = [datetime.datetime(2020, month, day, 13, tzinfo=datetime.UTC) for day, month in ((1, 2), (2, 1))]
    assert times == [time.timestamp() for time in expected]
    with pytest.raises(
        DataError, match=r"csv:1: '01.02.2020 13:00' has not the format %Y for time; 2 such fields, the next at .*csv:2"
    ):
        read(tmp_path / "plays.csv", **{**settings, "time_format": "%Y"})
    with pytest.raises(ConfigError, match="data.reader.time_format=%Q is not allowed"):
        read(tmp_path / "plays.csv", **{**settings, "time_format": "%Q"})


def test_items_that_are_listed_again(tmp_path: Path) -> None:
    (tmp_path / "plays.csv").write_text(PLAYS)
    (tmp_path / "items.csv").write_text("what,title\nx,Nord\nx,Nord\ny,Süd\nx,North\n\nz,\n")
    given = {"items": str(tmp_path / "items.csv"), "columns": COLUMNS}
    with pytest.raises(
        DataError, match=r"1 items are listed again .*\(item 'x'\), first at .*items.csv:5; data.reader.d"
    ):
        read(tmp_path / "plays.csv", **given)
    raw = read(tmp_path / "plays.csv", **given, duplicate_items="first")
    assert raw.items["title"].tolist() == ["Nord", "Süd", ""]
    assert raw.where_item(2).endswith("items.csv:7")


def test_the_fingerprint_follows_files_and_columns_but_not_their_folder(tmp_path: Path) -> None:
    found = set()
    for folder, text in (("a", PLAYS), ("b", PLAYS), ("c", f"{PLAYS}bo,z,9,US\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plays.csv").write_text(text)
        found.add(TableReader(TableSettings(str(tmp_path / folder / "plays.csv"), columns=COLUMNS)).fingerprint())
    other = ColumnSettings(user="who", item="land", time="when")
    found.add(TableReader(TableSettings(str(tmp_path / "a" / "plays.csv"), columns=other)).fingerprint())
    assert len(found) == 3


LINE = "user,item,time,title\n"
WRONG = {
    "no such column": ("plays.csv", LINE.replace("user", "who"), "has no column user_id, user, .*; it has who, item, time"),
    "soon": ("plays.csv", LINE + "a,b,soon,T\na,c,2020-01-01,T\na,d,now,U\n", r"csv:2: 'soon' is not a number or an ISO .* for time; 2 such fields, the next at .*plays.csv:4; data.reader.time_format"),
    "both": ("plays.csv", LINE + "a,b,2020-01-01,T\na,c,17,T\n", "plays.csv:2: '2020-01-01' is not a number for time"),
    "short": ("plays.csv", LINE + "a,b,1,T\na,c\n", r"plays.csv:3 has 2 fields instead of 4 \(user, item, time, title\)"),
    "quote": ("plays.csv", LINE + 'a,b,1,"T\n', "plays.csv:2: a quoted field does not end"),
    "latin-1": ("plays.csv", LINE.encode() + b"a,b,1,Caf\xe9\n", "plays.csv:2 is not utf-8: byte 0xe9"),
    "empty": ("plays.csv", "", "plays.csv is empty"),
    "blank": ("plays.jsonl", "\n\n", "plays.jsonl is empty"),
    "twice": ("plays.csv", "user,item,time,user\n", "has the column 'user' more than once"),
    "parquet as csv": ("plays.csv", b"PAR1\x15\x04", "plays.csv is a Parquet file, not a text"),
    "gzip as csv": ("plays.csv", gzip.compress(b"user"), "plays.csv is a gzip file, not a text"),
    "csv as gzip": ("plays.csv.gz", LINE, "plays.csv.gz is not a gzip file, or a damaged one"),
    "cut gzip": ("plays.jsonl.gz", gzip.compress(b'{"user": 1}\n' * 999)[:-9], "is not a gzip file, or a damaged one"),
    "csv as parquet": ("plays.parquet", LINE, "plays.parquet is not a Parquet file"),
    "csv as json": ("plays.json", LINE, "plays.json:1 is not JSON: Expecting value"),
    "list": ("plays.json", '[{"user": 1}]', "plays.json:1 is a list, not an object"),
    "pretty": ("plays.json", '[\n {"user": 1}\n]', "plays.json:1 is not JSON: .*one object a line"),
    "bytes": ("plays.jsonl", b'{"user": "\xe9"}\n', "plays.jsonl:1 is not utf-8: byte 0xe9"),
    "ending": ("plays.xlsx", "x", "data.path=.*plays.xlsx: the ending '.xlsx' says no format; allowed: .csv, .tsv, .jsonl"),
    "no ending": ("plays", LINE, "data.path=.*plays: the ending 'plays' says no format"),
    "one column": ("plays.tsv", LINE, "plays.tsv:1: columns must be separated by a tab; the header is 'user,item,time,t"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str) -> None:
    file, content, message = WRONG[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read(tmp_path / file)


def test_what_is_wrong_with_the_files_of_items_and_users_is_said(tmp_path: Path) -> None:
    (tmp_path / "plays.csv").write_text(PLAYS)
    (tmp_path / "items.csv").write_text("sku,title\nx,Nord\n")
    (tmp_path / "people.csv").write_text("name\nana\n")
    cases = {
        "data.items=.*song.csv does not exist": {"items": str(tmp_path / "song.csv")},
        "data.users=.* is a directory; give the file": {"users": str(tmp_path)},
        "items.csv: unknown data.columns.item 'what'; choose from: .*sku": {"items": str(tmp_path / "items.csv")},
        "people.csv: unknown data.columns.user 'who'; choose from: name": {"users": str(tmp_path / "people.csv")},
        "plays.csv: unknown data.columns.of_user 'city'; choose from": {"columns": ColumnSettings("who", "what", of_user=("city",))},
    }  # fmt: skip
    for message, settings in cases.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / "plays.csv", **{"columns": COLUMNS, **settings})
    (tmp_path / "items.csv").write_text("what,text\nx,Nord\n")
    with pytest.raises(DataError, match="items.csv has no column title, .*, and data.columns.title is not given"):
        read(tmp_path / "plays.csv", items=str(tmp_path / "items.csv"), columns=COLUMNS)


def test_without_titles_or_times_a_setting_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "plays.csv").write_text("user,item\na,x\na,y\n")
    raw = read(tmp_path / "plays.csv")
    with pytest.raises(
        DataError, match="data.items is not given, and .* so items have no titles .*data.on_empty_title"
    ) as e:
        clean(raw, DataSettings("plays", None))
    assert "plays.csv has no column timestamp, " in str(e.value)
    settings = DataSettings("plays", None, on_empty_title="item_id", on_missing_time="file_order")
    assert clean(raw, settings).raw.interactions["timestamp"].tolist() == [0, 1]
