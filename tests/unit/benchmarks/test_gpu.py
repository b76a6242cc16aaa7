"""The GPU benchmark works where there is no GPU: on tiny shapes, with all cases."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_cases_run_and_whole_and_cut_do_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    benchmark().main(["--dry-run", "--work", str(tmp_path / "work"), "--json", str(file)])
    results = {row["case"]: row for row in json.loads(file.read_text())}
    assert list(results) == ["ml_1m_small", "ml_1m_small, cut", "llama_2_7b", "llama_2_7b, cut"]
    for case in ("ml_1m_small", "llama_2_7b"):
        whole, cut = results[case], results[f"{case}, cut"]
        assert whole["tokens"] == cut["tokens"] > 0
        assert whole["steps"] == cut["steps"] == 10, "five clients, two steps"
        work = [row["flops_per_second"] * row["seconds_per_round"] for row in (whole, cut)]
        assert work[0] == pytest.approx(work[1], rel=1e-9)
    for row in results.values():
        assert row["seconds_per_round"] > 0
        assert row["utilisation"] == row["flops_per_second"] / row["matrix_rate"] > 0
        assert row["peak_bytes"] > 0
    assert "utilisation" in capsys.readouterr().out
