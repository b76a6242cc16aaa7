"""Folders of the cache that cannot be written to, or were written by something else."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from fellrec.cli.main import main
from fellrec.errors import CheckpointError, StorageError
from fellrec.state.cache import is_intact, new_entry
from fellrec.state.files import read_checked
from fellrec.state.tensor_store import check_file

SMALL = (
    "data.reader.num_users=40", "data.reader.num_items=20", "data.reader.mean_length=8", "partition=random",
    "partition.num_clients=2", "trainer.cutoffs=[5]", "trainer.metric=ndcg_at_5",
)  # fmt: skip


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_cache_that_cannot_be_written_to_is_one_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Case c07: a traceback of FileNotFoundError."""
    with pytest.raises(SystemExit, match="1"):
        main([verb, *SMALL, "cache_dir=/proc/nope"])
    shown = capsys.readouterr().err
    line = shown.rstrip("\n")
    assert "\n" not in line, shown
    assert line.startswith(f"fellrec {verb}: cannot write /proc/nope/data/")
    assert line.endswith("set cache_dir (or FELLREC_CACHE) to a folder that can be written to")


def test_a_file_in_the_place_of_the_cache_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", *SMALL, f"cache_dir={tmp_path / 'cache'}"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "0123"
    with new_entry(folder) as draft:
        (draft / "a").write_bytes(b"content")
    return folder


def test_an_entry_is_for_its_user_only_and_can_be_read_where_nothing_can_be_written(entry: Path) -> None:
    assert entry.stat().st_mode & 0o777 == 0o700
    for folder in (entry, entry.parent):
        folder.chmod(0o500)
    try:
        assert is_intact(entry)
    finally:
        for folder in (entry.parent, entry):
            folder.chmod(0o700)


def test_an_entry_of_a_shell_that_lets_everybody_write_is_used_again(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with new_entry(tmp_path / "0123") as draft:
            (draft / "a").write_bytes(b"content")
    finally:
        os.umask(before)
    assert is_intact(tmp_path / "0123")


def test_what_is_made_while_another_process_was_faster_is_dropped_and_what_is_damaged_is_replaced(entry: Path) -> None:
    with new_entry(entry) as draft:
        (draft / "a").write_bytes(b"other")
    assert (entry / "a").read_bytes() == b"content"
    (entry / "a").write_bytes(b"changed")
    with new_entry(entry) as draft:
        (draft / "a").write_bytes(b"other")
    assert (entry / "a").read_bytes() == b"other"
    assert [path.name for path in entry.parent.iterdir()] == ["0123"]


@pytest.mark.parametrize("place", ["entry", "file", "manifest"])
def test_links_and_pipes_are_not_followed(entry: Path, tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "0123"
    if place == "entry":
        entry.rename(elsewhere)
        entry.symlink_to(elsewhere)
    else:
        name = "a" if place == "file" else "entry.json"
        (entry / name).rename(tmp_path / name)
        (entry / name).symlink_to(tmp_path / name) if place == "file" else os.mkfifo(entry / name)
    assert not is_intact(entry)
    with new_entry(entry) as draft:
        (draft / "a").write_bytes(b"new")
    assert (entry / "a").read_bytes() == b"new"
    if place != "manifest":
        kept = elsewhere / "a" if place == "entry" else tmp_path / "a"
        assert kept.read_bytes() == b"content", "what the link named is not changed"


def test_a_copy_of_another_entry_is_none(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(entry, entry.with_name("4567"))
    with caplog.at_level(logging.WARNING):
        assert not is_intact(entry.with_name("4567"))
    assert "is not used and made again: it is a copy of another entry" in caplog.text


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"set cache_dir \(or FELLREC_CACHE\)"), new_entry(Path("/proc/nope/x")):
        pass
    with pytest.raises(RuntimeError), new_entry(tmp_path / "x"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


NESTED = b"[" * 100_000


def test_files_with_deeply_nested_json_are_damaged(entry: Path, tmp_path: Path) -> None:
    (entry / "entry.json").write_bytes(NESTED)
    assert not is_intact(entry)
    (tmp_path / "x").write_bytes(NESTED)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checked(tmp_path / "x")
    (tmp_path / "x").write_bytes(len(NESTED).to_bytes(8, "little") + NESTED)
    with pytest.raises(CheckpointError, match="is damaged"):
        check_file(tmp_path / "x")


@pytest.mark.parametrize("checksum", ["", "0", "0" * 33])
def test_a_checksum_of_another_length_is_refused_at_once(tmp_path: Path, checksum: str) -> None:
    """It is looked for in the header, and each place where an empty or short one is found would become longer."""
    header = json.dumps({"__metadata__": {"checksum": checksum, "x": "0" * 2_000_000}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is damaged: its header"):
        check_file(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 4 * len(header)
    tracemalloc.stop()
