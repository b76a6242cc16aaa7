"""A run's state on disk: small manifests that say which version of its tensors each client has, and those versions.

    checkpoints/round_00012.json          the manifest: scalars, and a file's name for every client of every bank
    checkpoints/clients/000034.….safetensors     one client's adapter, or its optimiser state; written once
    checkpoints/ledger_00012.json         what crossed between the checkpoint before it and this one

Every file is written beside its place, flushed and renamed, and has a checksum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fellrec.errors import CheckpointError, TrainingError
from fellrec.federated.state import RunState
from fellrec.state.bank import AdapterBank
from fellrec.state.files import make_folder, read_checked, sync_folder, write_checked, writing
from fellrec.state.tensor_store import SUFFIX, StoredTensors, check_file, map_tensors, write_tensors

CLIENTS = "clients"
"""Folder of the versions, below that of the manifests."""

_PREFIX, _MORE = "round_", "more"
_FORMAT = 2

log = logging.getLogger(__name__)


def save_state(folder: Path, state: RunState, more: Mapping[str, Tensor] | None = None, keep: int = 2) -> Path:
    """Write ``folder/round_<n>.json`` and the versions it names that are not on the disk yet; drop what is older.

    Args:
        folder: The run's ``checkpoints`` folder; made if absent.
        state: State between two rounds.
        more: Further tensors that `load_state` gives back.
        keep: Checkpoints that stay on disk.

    Returns:
        The manifest.

    Raises:
        StorageError: If something cannot be written; the checkpoints that are there stay as they are.
    """
    make_folder(folder / CLIENTS)
    for version, stem in _unwritten(state):
        state.tensor_store.number += 1
        version.persist(folder / CLIENTS / f"{stem}.{state.tensor_store.number:08d}{SUFFIX}")
    manifest = _manifest(state)
    if more:
        path = folder / CLIENTS / f"{_MORE}.{state.round_index:05d}{SUFFIX}"
        write_tensors(path, more)
        manifest[_MORE] = path.name
    final = _path(folder, state.round_index)
    write_checked(final, manifest)
    _drop_old(folder, keep)
    return final


def rounds_on_disk(folder: Path) -> list[int]:
    """Rounds of the checkpoints below ``folder`` that are whole, ascending; a warning names what is damaged."""
    checked: dict[str, str] = {}
    return [number for number in _numbers(folder) if _read_or_warn(folder, number, checked) is not None]


def load_state(folder: Path, state: RunState, round_index: int | None = None) -> dict[str, Tensor]:
    """Read a checkpoint below ``folder`` into a fresh ``state``.

    Args:
        folder: The run's ``checkpoints`` folder.
        state: A state of the same run before its first round.
        round_index: Rounds that were done when it was written; ``None`` for the newest that is whole.

    Returns:
        The further tensors that were given to `save_state`.

    Raises:
        TrainingError: If there is no such checkpoint.
        CheckpointError: If it is damaged, or for ``None``, if all are.
    """
    numbers = _numbers(folder)
    if not numbers or round_index not in (None, *numbers):
        what = "checkpoint" if round_index is None else f"checkpoint of round {round_index}"
        raise TrainingError(f"nothing to resume: no {what} in {folder}")
    checked: dict[str, str] = {}
    if round_index is not None:
        manifest: dict[str, Any] | None = _read(folder, round_index, checked)
    else:
        manifest = next((m for n in reversed(numbers) if (m := _read_or_warn(folder, n, checked)) is not None), None)
    if manifest is None:
        raise CheckpointError(f"nothing to resume: every checkpoint in {folder} is damaged")
    _restore(state, manifest, _versions(folder, checked))
    return map_tensors(folder / CLIENTS / manifest[_MORE]) if _MORE in manifest else {}


def _path(folder: Path, number: int) -> Path:
    return folder / f"{_PREFIX}{number:05d}.json"


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix(_PREFIX)) for path in folder.glob(f"{_PREFIX}*.json"))


def _banks(state: RunState) -> dict[str, AdapterBank]:
    return {name: state.bank_named(name) for name in ("current", "best", "best_per_client")}


def _unwritten(state: RunState) -> list[tuple[StoredTensors, str]]:
    """Versions that are in memory only, each once, and what their files' names begin with."""
    found: dict[int, tuple[StoredTensors, str]] = {}
    for bank in _banks(state).values():
        counts: dict[int, int] = {}
        for version in bank.versions:
            counts[id(version)] = counts.get(id(version), 0) + 1
        for client, version in enumerate(bank.versions):
            if version.path is None:
                stem = "shared" if counts[id(version)] > 1 else f"{client:06d}"
                found.setdefault(id(version), (version, stem))
    for client, version in state.optimizers.items():
        if version.path is None:
            found.setdefault(id(version), (version, f"{client:06d}"))
    return list(found.values())


def _manifest(state: RunState) -> dict[str, Any]:
    selection = state.selection
    names = {key: [_name(version) for version in bank.versions] for key, bank in _banks(state).items()}
    return {
        "format": _FORMAT,
        "round_index": state.round_index,
        "number": state.tensor_store.number,
        "local_steps": state.local_steps,
        "rounds_without_gain": state.rounds_without_gain,
        "extras": state.extras,
        "selection": {
            "value": selection.value,
            "round_index": selection.round_index,
            "client_values": selection.client_values,
            "client_rounds": selection.client_rounds,
        },
        "banks": names,
        "optimizers": {str(client): _name(version) for client, version in state.optimizers.items()},
    }


def _name(version: StoredTensors) -> str:
    assert version.path is not None
    return version.path.name


def _files(manifest: Mapping[str, Any]) -> set[str]:
    """Names of all files that a checkpoint needs."""
    names = {name for bank in manifest["banks"].values() for name in bank}
    return names | set(manifest["optimizers"].values()) | ({manifest[_MORE]} if _MORE in manifest else set())


def _read(folder: Path, number: int, checked: dict[str, str]) -> dict[str, Any]:
    """A manifest, all of whose files are whole; the checksums that were computed are added to ``checked``."""
    manifest: dict[str, Any] = read_checked(_path(folder, number))
    for name in sorted(_files(manifest)):
        if name not in checked:
            checked[name] = check_file(folder / CLIENTS / name)["checksum"]
    return manifest


def _read_or_warn(folder: Path, number: int, checked: dict[str, str]) -> dict[str, Any] | None:
    try:
        return _read(folder, number, checked)
    except CheckpointError as error:
        log.warning("the checkpoint of round %d is left out: %s", number, error)
        return None


def _versions(folder: Path, checked: Mapping[str, str]) -> Callable[[str], StoredTensors]:
    """Gives the version in a file, the same one whenever it is asked."""
    known: dict[str, StoredTensors] = {}

    def version(name: str) -> StoredTensors:
        if name not in known:
            known[name] = StoredTensors(path=folder / CLIENTS / name, checksum=checked[name])
        return known[name]

    return version


def _restore(state: RunState, manifest: Mapping[str, Any], version: Callable[[str], StoredTensors]) -> None:
    for key, bank in _banks(state).items():
        names = manifest["banks"][key]
        if len(names) != len(bank):
            raise TrainingError(f"the checkpoint has {len(names)} clients, this run has {len(bank)}")
        bank.versions = [version(name) for name in names]
    state.optimizers = {int(client): version(name) for client, name in manifest["optimizers"].items()}
    state.tensor_store.number = manifest["number"]
    for name in ("round_index", "local_steps", "rounds_without_gain", "extras"):
        setattr(state, name, manifest[name])
    for name, value in manifest["selection"].items():
        setattr(state.selection, name, value)


def _drop_old(folder: Path, keep: int) -> None:
    """Remove all manifests but the last ``keep``, then every file that none of those needs."""
    needed: set[str] = set()
    with writing(folder):
        numbers = _numbers(folder)
        for number in numbers[:-keep]:
            _path(folder, number).unlink()
        for number in numbers[-keep:]:
            try:
                needed |= _files(read_checked(_path(folder, number)))
            except CheckpointError:  # it cannot be used, so what it alone needed is of no use either
                continue
        sync_folder(folder)
        for path in (folder / CLIENTS).iterdir():
            if path.name not in needed:
                path.unlink()
