"""The GPU benchmark works where there is no GPU: on tiny shapes, with all cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parents[3]


def benchmark() -> Any:
    return load_script(ROOT / "benchmarks" / "gpu.py")


def test_all_cases_run_and_whole_and_cut_do_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    benchmark().main(["--dry-run", "--work", str(tmp_path / "work"), "--json", str(file)])
    results = {row["case"]: row for row in json.loads(file.read_text())}
    variants = {
        "ml_1m_small": [", cut"],
        "smollm2_135m": [", clients_per_step=5", ", cut", ", NCCL"],
        "llama_2_7b": [", cut"],
    }
    assert list(results) == [name for case, more in variants.items() for name in (case, *(case + end for end in more))]
    for case, more in variants.items():
        whole, *others = (results[case + end] for end in ("", *more))
        assert whole["steps"] == 10, "five clients, two steps"
        for other in others:
            assert other["tokens"] == whole["tokens"] > 0
            assert other["steps"] == whole["steps"]
            work = [row["flops_per_second"] * row["seconds_per_round"] for row in (whole, other)]
            assert work[0] == pytest.approx(work[1], rel=1e-9)
    for row in results.values():
        assert row["seconds_per_round"] > 0
        assert row["utilisation"] == row["flops_per_second"] / row["matrix_rate"] > 0
        assert row["peak_bytes"] > 0
    assert "utilisation" in capsys.readouterr().out
