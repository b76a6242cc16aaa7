"""Thousands of clients: what is in memory is the cohort's at most, in training, aggregation and evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: Path, *arguments: object) -> list[dict[str, Any]]:
    paths = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_aggregation_of_a_thousand_clients_stays_in_its_budget(tmp_path: Path) -> None:
    """FELLRec's Gram matrix and mixing, read from files and written to files: 200 MB each of start, end and mixed."""
    num_clients, block = 1000, 4 << 20
    (found,) = run(Path(__file__).with_name("aggregate_many.py"), tmp_path / "clients", num_clients, block)
    square = 8 * num_clients**2
    stack = num_clients * found["adapter_bytes"]
    # Some blocks at a time (start, end, their difference, the product), and some N x N matrices.
    budget = 8 * block + 8 * square
    assert budget < 0.75 * stack, "the test could not fail"
    assert found["taken"] < budget
    assert found["worst"] < 1e-5


@pytest.fixture(scope="module")
def populations(cache: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same rounds of eight one-user clients, of 20 and of 160."""
    small, large = run(
        BENCHMARKS / "many_clients.py",
        *("--json", "--clients", "20,160", "--cohort", "8", "--rounds", "16", "--adapter", "full"),
        *("backbone.hidden_size=64", "backbone.num_layers=2", "backbone.pretrain.steps=1", f"cache_dir={cache}"),
        *("data.reader.num_items=60", "data.reader.mean_length=8", "trainer.max_local_steps=1"),
    )
    return small, large


def test_memory_does_not_depend_on_how_many_clients_there_are(
    populations: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    small, large = populations
    assert (small["clients"], large["clients"]) == (20, 160)
    assert small["cohort"] == large["cohort"] == 8
    one_copy = (large["clients"] - small["clients"]) * large["adapter_bytes"]
    assert one_copy > 0.1 * small["peak_bytes"], "the test could not fail"
    assert large["peak_bytes"] < 1.1 * small["peak_bytes"]


def test_memory_does_not_grow_over_the_rounds(populations: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A tenth of what one copy of a cohort's adapters would add in every round."""
    for found in populations:
        bound = 0.1 * found["cohort"] * found["adapter_bytes"]
        assert found["slope_bytes_per_round"] < bound, found["round_bytes"]
