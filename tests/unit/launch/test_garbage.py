"""The garbage collector while a command starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fellrec.launch.garbage import begin_imports, end_imports


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    limits = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*limits)


def test_a_command_looks_for_garbage_as_usual_after_its_imports() -> None:
    usual = gc.get_threshold()
    begin_imports()
    assert gc.get_threshold()[0] > 10 * usual[0]
    kept: list[list[int]] = [[] for _ in range(1000)]
    end_imports()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() >= len(kept)


def test_a_library_that_is_imported_leaves_the_collector_alone() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    end_imports()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)
