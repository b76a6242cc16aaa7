"""Data of one's own through the command line: from a file written by hand to a run that can be found again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.data.holdout import LeaveOneOut
from fellrec.data.partition import RandomPartition
from fellrec.data.prepare import prepare
from fellrec.data.readers import SyntheticReader
from fellrec.data.settings import DataSettings

FILMS = ["Heat (1995)", "Godfather, The (1972)", '"Crocodile" Dundee (1986)', "Amélie (2001)", "Alien (1979)",
         "Up (2009)", "Big (1988)", "It (2017)", "Her (2013)", "Jaws (1975)", "Casino (1995)", "Ran (1985)"]  # fmt: skip
TABLE = ["data=table", "data.path=plays.csv", "data.columns.item=Film No", "data.public_user_rate=0", "partition=random",
         "partition.num_clients=2", "trainer.cutoffs=[3]", "trainer.metric=ndcg_at_3"]  # fmt: skip


def plays() -> list[list[str]]:
    """12 people with 8 of 12 films each, on days; the last film of each is played again an hour later."""
    generator, rows = random.Random(5), []
    for person in range(12):
        films = generator.sample(range(len(FILMS)), 8)
        for place, film in enumerate([*films, films[-1]]):
            stars = generator.choice(["", "3", "4.5"])
            time = f"2021-03-{1 + min(place, 7):02d} {10 + place // 8}:00"
            rows.append([f"anna {person}", f"m{film}", stars, time, FILMS[film], "Drama|Crime"])
    return rows


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``plays.csv`` as a spreadsheet saves it: a byte order mark, semicolons, quotes, CR LF."""
    quoted = [";".join(f'"{f.replace(chr(34), chr(34) * 2)}"' if '"' in f else f for f in row) for row in plays()]
    text = "\r\n".join(["User ID;Film No;Stars;Date;Title;Genres", *quoted, ""])
    (tmp_path / "plays.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_file_written_by_hand_to_a_run(
    by_hand: Path, cache: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 of 108 plays are repeats; with the others, 7 pairs of neighbours a person and no ties."""
    given = [*TABLE, f"cache_dir={cache}"]
    main(["prepare", *given, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    counts = found["statistics"]
    assert found["name"] == "plays"
    names = ("interactions_in_files", "repeats_dropped", "interactions_after_core", "users", "items", "tied_neighbours")
    assert [counts[name] for name in names] == [108, 12, 96, 12, 12, 0]
    assert found["notes"] == [
        "12 of 108 interactions repeat a user and an item that were there before (12 pairs, at most 2 times): the last "
        "by time of each pair is kept, the others are dropped; data.repeats=first keeps the first, keep all",
        "columns of plays.csv by their names: user is User ID, time is Date, rating is Stars, title is Title, genre is "
        "Genres (see data.columns)",
    ]
    (by_hand / "mlflow.db").write_bytes(empty_store.read_bytes())
    main(["train", *given, "trainer.num_rounds=1", "backbone.pretrain.steps=2", "references.show=[popularity]"])
    (run,) = (by_hand / "runs").iterdir()
    assert "-plays-fellrec" in run.name
    (stored,) = MlflowClient(f"sqlite:///{by_hand}/mlflow.db").search_runs(["1"])
    assert stored.data.tags["data"] == "plays"
    assert [dataset.dataset.name for dataset in stored.inputs.dataset_inputs] == ["plays"]
    assert json.loads((run / "results.json").read_text())["num_users"] == 12
    capsys.readouterr()
    (by_hand / "elsewhere").mkdir()
    (by_hand / "plays.csv").rename(by_hand / "elsewhere" / "plays.csv")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    assert "plays.csv does not exist" in capsys.readouterr().err
    main(["evaluate", str(run), "data.path=elsewhere/plays.csv"])


def test_ties_repeats_and_ratings_as_told(by_hand: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the day alone as the time, a person's repeat has the time of the film before it: one tie each."""
    text = (by_hand / "plays.csv").read_bytes().decode("utf-8-sig")
    lines = [
        line if not line.startswith("anna") else line.replace(" 10:00", "").replace(" 11:00", "")
        for line in text.split("\r\n")
    ]
    (by_hand / "plays.csv").write_text("\n".join(lines))

    def found(*overrides: str) -> tuple[list[int], list[str]]:
        main(["prepare", *TABLE, f"cache_dir={cache}", *overrides, "--format", "json"])
        prepared = json.loads(capsys.readouterr().out)
        names = ("repeats_dropped", "interactions_after_core", "tied_neighbours")
        return [prepared["statistics"][name] for name in names], prepared["notes"]

    counts, notes = found("data.repeats=keep")
    assert counts == [0, 108, 12]
    assert notes[0].startswith("12 of 108 interactions repeat a user and an item that were there before (12 pairs, at ")
    assert "12 with the same time too): all are kept" in notes[0]
    assert "12 of 96 successive interactions of a user (12.5%) have equal times, 12 of them in different" in notes[-1]
    assert "data.ties=shuffle does not depend on it" in notes[-1]
    counts, notes = found("data.repeats=keep", "data.ties=shuffle")
    assert (counts, len(notes)) == ([0, 108, 12], 2)
    assert found("data.repeats=first")[0] == found("data.repeats=last")[0] == [12, 96, 0]
    missing = sum(row[2] == "" for row in plays())
    counts, notes = found("data.min_rating=3", "data.on_missing_rating=drop", "data.repeats=keep")
    assert counts[1] == 108 - missing
    assert notes[0] == f"{missing} of 108 interactions have no number as Stars and are left out"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=play.csv"], "play.csv does not exist; similar: "),
        (["data.path=."], "is a directory; give the file"),
        (["data.path=null"], "data.path=null is not allowed: the file with the interactions, given as data.path"),
        (["data.root=."], "is not allowed with data=table: give the file as data.path"),
        (["data.items=items.xlsx"], "items.xlsx: the ending '.xlsx' says no format; allowed: .csv, .tsv, "),
        (["data.columns.user=User"], "plays.csv: unknown data.columns.user 'User'; choose from: User ID, "),
        (["data.columns.item=null"], "has no column item_id, item, movie_id, product_id, track_id, parent_asin, asin; it has "
         "User ID, Film No, Stars, Date, Title, Genres: give the one with the item as data.columns.item=NAME"),
        (["data.columns.of_user=[City]"], "plays.csv: unknown data.columns.of_user 'City'; choose from: "),
        (["data.columns.of_user=City"], "data.columns.of_user=City is not allowed: a list of different names of columns"),
        (["data.columns.when=x"], "unknown setting 'data.columns.when'; choose from: "),
        (["data.reader.separator=::"], "data.reader.separator=:: is not allowed: one character, such as ; or |"),
        (["data.reader.format=xml"], "data.reader.format=xml is not allowed: auto, csv, tsv, jsonl or parquet"),
        (["data.repeats=all"], "data.repeats=all is not allowed: last, first or keep"),
        (["data.tied_times=random"], "unknown setting 'data.tied_times'; choose from: data.ties, "),
        (["data.min_rating=3"], "interactions have no number as Stars (set data.on_missing_rating=drop to leave them out), first at "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    by_hand: Path, cache: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    (by_hand / "items.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *TABLE, f"cache_dir={cache}", *overrides])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_wrong_path_is_refused_without_pytorch(tmp_path: Path) -> None:
    code = (
        "import sys; from fellrec.cli.main import main\n"
        "table = ['data=table', 'data.path=x.csv']\n"
        "for words in (['prepare', *table], ['train', *table], ['compare', *table],\n"
        "              ['prepare', 'data=ml_25m', 'data.root=x'], ['prepare', 'data=amazon_2018', 'data.root=.']):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["1"] * 5 + ["[]"], done.stdout
    named = [line.partition(": ")[2].partition("=")[0] for line in done.stderr.splitlines()]
    assert named == ["data.path"] * 3 + ["data.root"] * 2


def test_a_federation_of_tables(by_hand: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["data=federation", "data.members={films: table, again: table}", f"cache_dir={cache}", "partition=random",
             "partition.num_clients=1", "trainer.cutoffs=[3]", "trainer.metric=ndcg_at_3"]  # fmt: skip
    for name in ("films", "again"):
        given += [f"data.member.{name}.path=plays.csv", f"data.member.{name}.columns.item=Film No"]
    main(["prepare", *given, "--format", "json"])
    members = json.loads(capsys.readouterr().out)["statistics"]["members"]
    assert [members[name]["users"] for name in ("films", "again")] == [12, 12]
    with pytest.raises(SystemExit):
        main(["prepare", *given, "data.member.again.columns.user=Who"])
    assert "data.member.again.columns.user 'Who'; choose from: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["data=table", "data.path=my plays.csv.gz"], "my plays"),
        (["data=table", "data.path=x.csv", "data.name=plays"], "plays"),
        (["data=atomic", "data.root=."], "shop"),
        (["data=atomic", "data.root=.", "data.reader.name=other"], "other"),
        (["data=ml_csv", "data.root=ml-latest-small"], "ml-latest-small"),
        (["data=ml_32m", "data.root=x"], "ml_32m"),
        (["data=amazon_2018", "data.root=Books", "data.reader.name=Books_5"], "Books_5"),
        (["data=table", "data.path=.hidden.csv"], "hidden"),
    ],
)
def test_data_are_called_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.train.inter").write_text("")
    (tmp_path / "shop.test.inter").write_text("")
    assert compose(overrides).data.name == name


@pytest.mark.parametrize(("ties", "key"), [("file", "1d5ca6fce052c8b7"), ("shuffle", "a85bf785d2ca7ef5")])
def test_data_keep_the_key_that_they_had_before_settings_were_added_and_renamed(ties: str, key: str) -> None:
    """The keys are of the version before, with ``tied_times`` ``file_order`` and ``random``."""
    settings = DataSettings("x", None, ties=ties, core=2, repeats="keep", public_user_rate=0.2)  # type: ignore[arg-type]
    reader = SyntheticReader(num_users=20)
    assert prepare(reader, settings, LeaveOneOut(), RandomPartition(num_clients=2), None).key == key


def movielens_10m(folder: Path) -> None:
    """As published: half stars, UTF-8, an id that is not in the ratings, no users."""
    ratings = [(u, 1 + (u + i) % 12, 0.5 + i / 2, 838985046 + 60 * i) for u in range(1, 9) for i in range(8)]
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in ratings))
    movies = "".join(f"{1 + k}::{title}::Comedy|Romance\n" for k, title in enumerate([*FILMS, "Cité, La (1995)"]))
    (folder / "movies.dat").write_text(movies)


def movielens_csv(folder: Path) -> None:
    """As published: titles with commas in quotes, CR LF, no genres, other files beside them."""
    ratings = [(u, 1 + (u + i) % 12, 0.5 + i / 2, 838985046 + 60 * i) for u in range(1, 9) for i in range(8)]
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r:.1f},{t}" for u, i, r, t in ratings)]
    (folder / "ratings.csv").write_bytes("\r\n".join([*lines, ""]).encode())
    titles = [
        f'"{title.replace(chr(34), chr(34) * 2)}"' if {",", '"'} & {*title} else title
        for title in [*FILMS, "Cité, La"[:4]]
    ]
    lines = [
        "movieId,title,genres",
        *(f"{1 + k},{t},{('(no genres listed)', 'Comedy|Romance')[k > 0]}" for k, t in enumerate(titles)),
    ]
    (folder / "movies.csv").write_bytes("\r\n".join([*lines, ""]).encode())
    (folder / "links.csv").write_text("movieId,imdbId,tmdbId\n1,0114709,862\n")
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n2,60756,funny,1445714994\n")


@pytest.mark.parametrize(
    ("choice", "write"), [("ml_10m", movielens_10m), ("ml_25m", movielens_csv), ("ml_csv", movielens_csv)]
)
def test_movielens_as_published(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], choice: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    given = [f"data={choice}", f"data.root={tmp_path}", f"cache_dir={cache}", *TABLE[3:]]
    main(["prepare", *given, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == (choice if choice != "ml_csv" else tmp_path.name)
    assert [found["statistics"][f"{name}_as_read"] for name in ("users", "items", "interactions")] == [8, 12, 64]
    assert all(check.startswith("differs") for check in found["checks"])
    main(["prepare", *given, "data.min_rating=2", "--format", "json"])
    assert json.loads(capsys.readouterr().out)["statistics"]["interactions_after_core"] == 8 * 5
