"""A run with secure sums and drop-outs: the plain run within rounding, and tables of costs with masks, keys and shares."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fellrec.cli.main import main
from fellrec.functional.fixed_point import rounding_bound

from .processes import adapters

CLIENTS, DROPPED = 6, 5
"""Client 5 drops out of round 0, by the seed."""
HOW = [
    *("aggregation=fedavg", f"partition.num_clients={CLIENTS}", "partition=random", "participation.dropout=0.2"),
    *("trainer.max_local_steps=2", "trainer.num_rounds=1", "references.show=[]", "tracking.uri=null"),
]


def test_a_secure_run_is_the_plain_one_within_rounding(
    lean_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry of the mean is off by at most n 2^-25, and by the rounding of both results to float32."""
    for name, how in (("plain", []), ("secure", ["exchange.secure=true"])):
        main(["train", *lean_overrides, *HOW, *how, f"run_dir={tmp_path / name}"])
    shown = capsys.readouterr().out
    assert shown.count("masked updates") == shown.count("keys and shares") == 1
    plain, secure = (adapters(tmp_path / name)[0] for name in ("plain", "secure"))
    largest = max(float((plain[name] - secure[name]).abs().max()) for name in plain)
    size = max(float(tensor.abs().max()) for tensor in plain.values())
    assert 0 < largest <= rounding_bound(CLIENTS, 24) + 2**-23 * size
    ledger = pd.read_csv(tmp_path / "secure" / "ledger.csv")
    sums = ledger[ledger["phase"] == "train"].groupby(["kind", "direction"])["bytes"].sum()
    entries = sum(tensor.numel() for tensor in secure.values())
    dropped = json.loads((tmp_path / "secure" / "results.json").read_text())["dropped_clients"]
    assert dropped == {"0": [DROPPED]}
    assert sums["masked", "up"] == (CLIENTS - 1) * entries * 4
    assert ("adapter", "up") not in sums
    assert sums["key", "up"] == CLIENTS * (64 + 98 * (CLIENTS - 1)) + (CLIENTS - 1) * 37 * CLIENTS
