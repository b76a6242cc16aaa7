"""What a run leaves in its directory at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fellrec.callbacks.outputs import RunOutputs
from fellrec.federated.ledger import Ledger
from fellrec.federated.records import FitResult
from fellrec.models.peft_folder import write_tensors
from fellrec.state.tensor_store import StoredTensors

FILE = "weights.safetensors"


def write(run_dir: Path, served: list[StoredTensors], bases: list[tuple[StoredTensors, ...]]) -> list[Path]:
    """Write adapters as a run does; gives the directories in the order in which they were written as a whole."""
    written = []

    def save(tensors: Mapping[str, Tensor], base: tuple[StoredTensors, ...], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, folder / FILE)
        written.append(folder)

    outputs = RunOutputs(run_dir, Ledger(), lambda result, more: None, save)
    result: Any = SimpleNamespace(served=served, bases=bases, is_shared=False, failed_clients={})
    outputs.on_fit_end(cast(FitResult, result))
    return written


@pytest.mark.parametrize("has_links", [True, False])
def test_a_version_is_written_once(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients 0 and 2 have one version, client 1 another, client 3 that of client 0 with a changed base."""
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    one, other, change = (StoredTensors({"a": torch.full((2,), value)}) for value in (1.0, 2.0, 3.0))
    served = [one, other, one, one]
    bases: list[tuple[StoredTensors, ...]] = [(), (), (), (change,)]
    for _ in range(2):  # a run that is stopped while it writes writes all of them again
        written = write(tmp_path, served, bases)
        assert [folder.name for folder in written] == ["client_00", "client_01", "client_03"]
    files = [tmp_path / "adapters" / f"client_{client:02d}" / FILE for client in range(4)]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[2] == contents[3] != contents[1]
    assert os.path.samefile(files[0], files[2]) == has_links
    assert not os.path.samefile(files[0], files[3])
    assert [path.name for path in files[2].parent.iterdir()] == [FILE], "no draft is left"
