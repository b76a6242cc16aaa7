"""Damaged and hostile data files: every outcome is prepared data or one clear message, in bounded time and memory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.mutations import inputs
from fuzz.outcomes import OK, Outcomes

from fellrec.data import readers
from fellrec.data.holdout import GlobalTime, LeaveOneOut
from fellrec.data.partition import KMeansPartition, RandomPartition
from fellrec.data.prepare import prepare
from fellrec.data.schema import Reader
from fellrec.data.settings import DataSettings
from fellrec.data.table_settings import TableSettings

INPUTS = 400
"""For each format."""

_PAIRS = [
    (user, item, 1_600_000_000 + 1000 * user + item) for user in range(8) for item in range(user % 3, 8, 1 + user % 2)
]
_NAMES = ["Heat", "Café du Nord", "Alien", "Amélie", "Up", "It", "Big", "Her"]
_FLAGS = "|".join(["0"] * 19)


def _table(separator: str, header: list[str] | None, rows: list[tuple[object, ...]]) -> str:
    return "".join(f"{separator.join(map(str, row))}\n" for row in ([header] if header else []) + rows)  # type: ignore[operator]


def _atomic(prefix: str = "") -> dict[str, str]:
    header = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    rows: list[tuple[object, ...]] = [(f"u{u}", f"i{i}", 1 + (u + i) % 5, t) for u, i, t in _PAIRS]
    films: list[tuple[object, ...]] = [(f"i{k}", name, "Drama") for k, name in enumerate(_NAMES)]
    return {
        f"shop{prefix}.inter": _table("\t", header, rows),
        "shop.item": _table("\t", ["item_id:token", "title:token_seq", "genre:token_seq"], films),
        "shop.user": _table("\t", ["user_id:token", "gender:token"], [(f"u{u}", "fm"[u % 2]) for u in range(8)]),
    }


def _movielens(separator: str, bar: str) -> tuple[str, str, str]:
    ratings = _table(separator, None, [(u, i, 1 + (u + i) % 5, t) for u, i, t in _PAIRS])
    films = _table(bar, None, [(k, name, "Drama|Comedy") for k, name in enumerate(_NAMES)])
    return ratings, films, _table(bar, None, [(u, "F", 25, 3, "00000") for u in range(8)])


def _of_tables(root: str) -> readers.TableReader:
    return readers.TableReader(TableSettings(f"{root}/plays.csv", items=f"{root}/films.jsonl"))


def _json_lines(rows: list[dict[str, object]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _formats() -> dict[str, tuple[Callable[[str], Reader], dict[str, str]]]:
    ratings_1m, films_1m, users_1m = _movielens("::", "::")
    ratings_100k, _, users_100k = _movielens("\t", "|")
    films_100k = _table("|", None, [(k, name, "1990", "", "", _FLAGS) for k, name in enumerate(_NAMES)])
    csv_rows: list[tuple[object, ...]] = [(u, i, 3.5, t) for u, i, t in _PAIRS]
    quoted: list[tuple[object, ...]] = [(k, f'"{name}, The"', "Drama|Comedy") for k, name in enumerate(_NAMES)]
    pairs: list[tuple[object, ...]] = [(u, i, t) for u, i, t in _PAIRS]
    films = [
        {"item_id": k, "title": name, "genres": ["Drama", None, 3], "more": {"a": [1]}} for k, name in enumerate(_NAMES)
    ]
    reviews = [{"user_id": f"A{u}", "parent_asin": f"B{i}", "rating": 4.0, "timestamp": 1000 * t} for u, i, t in _PAIRS]
    metadata = [{"parent_asin": f"B{k}", "title": name, "categories": ["A &amp; B"]} for k, name in enumerate(_NAMES)]
    titles = _table(",", None, [(k, f" {name}, wait, what?") for k, name in enumerate(_NAMES)])
    return {
        "atomic": (readers.AtomicReader, _atomic()),
        "ml_1m": (
            readers.MovieLens1MReader,
            {"ratings.dat": ratings_1m, "movies.dat": films_1m, "users.dat": users_1m},
        ),
        "ml_100k": (readers.MovieLens100KReader, {"u.data": ratings_100k, "u.item": films_100k, "u.user": users_100k}),
        "ml_csv": (
            readers.MovieLensCsvReader,
            {
                "ratings.csv": _table(",", ["userId", "movieId", "rating", "timestamp"], csv_rows),
                "movies.csv": _table(",", ["movieId", "title", "genres"], quoted),
            },
        ),
        "table": (
            _of_tables,
            {
                "plays.csv": _table(";", ["user_id", "item_id", "stars", "timestamp"], csv_rows),
                "films.jsonl": _json_lines(films),
            },
        ),
        "amazon": (
            readers.AmazonReader,
            {"Games.jsonl": _json_lines(reviews), "meta_Games.jsonl": _json_lines(metadata)},
        ),
        "micro_lens": (
            readers.MicroLensReader,
            {
                "MicroLens-100k_pairs.csv": _table(",", ["user", "item", "timestamp"], pairs),
                "MicroLens-100k_title_en.csv": titles,
            },
        ),
    }


PIECES = [
    b"\r", b"\r\n", b"\n", b"\n\n", b"\0", b"\t", b",", b"::", b"|", b'"', b'""', b"'", b"\\", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9",
    b"\xc3\xa9", b"\x85", b"\xe2\x80\xa8", b"nan", b"inf", b"-1e999", b"1e400", b"-1", b"0x10", b"2020-01-01", b"9" * 400, b"</s>", b"[/x]",
    b" ", b"", b"user_id", b"item_id:token", b"title", b"timestamp:float", b"rating", b"{title}", b"${oc.env:HOME}", b"\xed\xa0\x80", b"a" * 30_000,
    b"\xf0\x9f\xa5\xb9" * 9, b"=1+1", b"None", b"1_0", b"True",
]  # fmt: skip


def damaged(content: bytes, generator: random.Random) -> bytes:
    """One to three changes of bytes, fields, lines or columns."""
    for _ in range(generator.randint(1, 3)):
        lines = content.split(b"\n")
        line, at = generator.randrange(len(lines)), generator.randint(0, len(content))
        match generator.randrange(9):
            case 0:
                content = content[:at] + generator.choice(PIECES) + content[at:]
            case 1:
                content = content[:at] + content[at + generator.randint(1, 9) :]
            case 2:
                content = content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :]
            case 3:
                content = content[:at]
            case 4:
                lines.insert(generator.randint(0, len(lines)), lines[line])
                content = b"\n".join(lines)
            case 5:
                del lines[line]
                content = b"\n".join(lines)
            case 6:
                content = content.replace(generator.choice([b"\t", b",", b"::", b"|"]), generator.choice(PIECES))
            case 7:
                separator = next((s for s in (b"\t", b"::", b"|", b",") if s in lines[line]), b"\t")
                fields = lines[line].split(separator)
                fields[generator.randrange(len(fields))] = generator.choice(PIECES)
                lines[line] = separator.join(fields)
                content = b"\n".join(lines)
            case _:
                lines[0] = generator.choice([lines[line], b"", generator.choice(PIECES), lines[0].replace(b":", b"")])
                content = b"\n".join(lines)
    return content


def settings_of(generator: random.Random) -> dict[str, Any]:
    """Settings that say what to do about gaps, ratings and repeats."""
    choices: dict[str, list[Any]] = {
        "on_empty_title": ["error", "item_id", "drop"],
        "on_missing_time": ["error", "drop", "file_order"],
        "repeats": ["last", "first", "keep"],
        "ties": ["file", "shuffle"],
        "min_rating": [None, None, 2.0],
        "on_missing_rating": ["error", "drop"],
        "core": [0, 0, 2],
    }
    return {name: generator.choice(values) for name, values in choices.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _formats())
def test_every_damaged_input_is_read_or_refused(tmp_path: Path, name: str) -> None:
    reader, files = _formats()[name]
    with Outcomes(f"data files, {name}") as outcomes:
        for generator in inputs(INPUTS):
            changed = generator.choice(sorted(files))
            encoding = generator.choice(["utf-8", "latin-1" if name in ("ml_1m", "ml_100k") else "utf-8"])
            content = damaged(files[changed].encode(encoding), generator)
            for file, text in files.items():
                (tmp_path / file).write_bytes(content if file == changed else text.encode(encoding))
            settings = DataSettings("x", str(tmp_path), **settings_of(generator))
            holdout = generator.choice([LeaveOneOut(), GlobalTime()])
            partition = KMeansPartition(num_clients=2) if generator.random() < 0.05 else RandomPartition(num_clients=2)
            outcomes.of(lambda: prepare(reader(str(tmp_path)), settings, holdout, partition, None), content)  # noqa: B023
    assert outcomes.found[OK] > sum(outcomes.found.values()) / 20, outcomes.found
