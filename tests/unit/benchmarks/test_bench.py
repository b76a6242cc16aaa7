"""``make bench`` on a minimal workload: the hand-written loop's losses are ours, and tables say when they are not."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bench import __main__ as bench
from bench import commands, rounds, rows
from bench.plain import Workload
from bench.rows import Result


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are measured without starting another process, which would import everything again."""

    def in_process(work: Path, module: str, arguments: Sequence[str]) -> Any:
        assert module == "rounds"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            rounds.main(arguments)
        return json.loads(out.getvalue().splitlines()[-1])

    monkeypatch.setattr(commands, "in_process", in_process)


@pytest.mark.usefixtures("_in_this_process")
def test_the_hand_written_loop_has_our_losses(tmp_path: Path, tiny_overrides: list[str]) -> None:
    more = [*tiny_overrides, "trainer.max_local_steps=1", "trainer.cutoffs=[10]"]
    results = bench.main(["--rows", "loop", "--repeats", "1", "--work", str(tmp_path), *more])
    same = [result for result in results if "hand-written" in result.what]
    assert len(same) == 2
    for result in results:
        assert result.difference is not None
        assert not result.is_void
        assert len(result.ours) == len(result.rival) > 0
    assert max(result.difference or 0 for result in same) < 1e-5
    workload = Workload(tmp_path / "workloads" / "generative")
    batch = workload.batches(0, 0)[0]
    assert (batch["labels"] != -100).sum() == len(batch["targets"])
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"] for row in written["results"]] == [result.what for result in results]
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("ours", "rival", "expected"),
    [
        ([[2.0, 4.0]], [[2.0, 4.0]], 0.0),
        ([[2.0, 4.4]], [[2.0, 4.0]], 0.1),
        ([[2.0]], [[2.0, 4.0]], float("inf")),
        ([], [], float("inf")),
    ],
)
def test_losses_of_another_shape_never_agree(ours: Any, rival: Any, expected: float) -> None:
    assert rows.difference(ours, rival) == pytest.approx(expected)


def test_a_row_whose_losses_disagree_is_void() -> None:
    result = Result("row", "what", target=0.5, ours=[1.0, 2.0, 3.0], rival=[4.0, 4.0, 4.0], difference=1e-7)
    assert (result.value, result.is_reached) == (0.5, True)
    assert result.to_dict()["spread"] == [0.25, 0.75]
    result.difference = 1e-3
    assert result.is_void
    assert (result.value, result.is_reached) == (None, None)
    result.difference = float("nan")
    assert result.is_void


def test_an_unknown_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rows", "flowers", "--work", str(tmp_path)])
    assert "unknown rows flowers" in capsys.readouterr().err
