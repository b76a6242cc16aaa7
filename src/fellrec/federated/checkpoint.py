"""A run's state on disk: one small manifest a checkpoint, and the files of the tensors that it names.

    checkpoints/round_00012.json                  JSON state of all parts, with a file's name for every stored version
    checkpoints/tensors/000034.….safetensors      stored versions; each is written once
    checkpoints/tensors/parts.00012.safetensors   tensors that parts hold themselves, such as a rule's moments

Every file is written beside its place and renamed, and has a checksum; the tensors' files are flushed to the disk
before the manifest that names them. One manifest for all parts keeps them consistent: a checkpoint is there as a whole
or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fellrec.errors import CheckpointError, TrainingError
from fellrec.state.files import make_folder, read_checked, sync_files, sync_folder, write_checked, writing
from fellrec.state.inside import file_in
from fellrec.state.tensor_store import SUFFIX, StoredTensors, check_file, map_tensors, write_tensors

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the run directory."""
TENSORS = "tensors"
"""Folder of the tensors' files, below that of the manifests."""

_PREFIX = "round_"
_FORMAT = 3
_STORED, _TENSOR, _PARTS = "$stored", "$tensor", "parts"

log = logging.getLogger(__name__)


class Persisted(Protocol):
    """A part of a run with state that a resume needs.

    A state is made of JSON values, and of ``Tensor`` and ``StoredTensors`` anywhere in it.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state now."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave."""


class CheckpointFolder:
    """Writes and reads the checkpoints of a run.

    Args:
        folder: The run's ``checkpoints`` folder; made when something is written.
        keep: Checkpoints that stay on disk.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._on_disk: set[str] = set()

    @property
    def tensors(self) -> Path:
        """Folder of the tensors' files."""
        return self.folder / TENSORS

    def save(self, parts: Mapping[str, Persisted], round_index: int) -> Path:
        """Write a checkpoint and remove what only older ones need.

        Args:
            parts: By name; loaded in the same order.
            round_index: Rounds that are done.

        Returns:
            The manifest.

        Raises:
            StorageError: If something cannot be written; the checkpoints that are there stay as they are.
        """
        make_folder(self.tensors)
        own: dict[str, Tensor] = {}
        written: dict[int, str] = {}
        states = {
            name: self._encode(part.state_dict(), f"{round_index:05d}", own, written, name)
            for name, part in parts.items()
        }
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "round_index": round_index,
            "files": sorted(set(written.values())),
        }
        if own:
            manifest[_PARTS] = f"{_PARTS}.{round_index:05d}{SUFFIX}"
            write_tensors(self._new(manifest[_PARTS]), own)
        path = self._path(round_index)
        needed = set(_files(path, {**manifest, "states": states}))
        sync_files([self.tensors / name for name in sorted(needed - self._on_disk)], self.tensors)
        self._on_disk = needed
        write_checked(path, {**manifest, "states": states})
        self._remove_old()
        return path

    def rounds(self) -> list[int]:
        """Rounds of the checkpoints that are whole, ascending; a warning names what is damaged."""
        checked: dict[str, str] = {}
        return [number for number in self._numbers() if self._read_or_warn(number, checked) is not None]

    def load(self, parts: Mapping[str, Persisted], round_index: int | None = None) -> int:
        """Let parts continue from a checkpoint.

        Args:
            parts: As in `save`, of the same run before its first round. Checkpoints may have further parts.
            round_index: Rounds that were done when it was written; ``None`` for the newest that is whole.

        Returns:
            The round.

        Raises:
            TrainingError: If the checkpoint does not exist.
            CheckpointError: If it is damaged, or for ``None``, if all are.
        """
        numbers = self._numbers()
        if not numbers or round_index not in (None, *numbers):
            what = "checkpoint" if round_index is None else f"checkpoint of round {round_index}"
            raise TrainingError(f"nothing to resume: no {what} in {self.folder}")
        self._on_disk = set()  # files of later rounds may be written again
        checked: dict[str, str] = {}
        if round_index is not None:
            manifest: dict[str, Any] | None = self._read(round_index, checked)
        else:
            manifest = next((m for n in reversed(numbers) if (m := self._read_or_warn(n, checked)) is not None), None)
        if manifest is None:
            raise CheckpointError(f"nothing to resume: every checkpoint in {self.folder} is damaged")
        self._restore(parts, manifest, checked)
        return int(manifest["round_index"])

    def _restore(self, parts: Mapping[str, Persisted], manifest: Mapping[str, Any], checked: Mapping[str, str]) -> None:
        """Let parts continue from a manifest whose files are whole; what is in them may still fit no run."""
        try:
            own = map_tensors(self.tensors / manifest[_PARTS]) if _PARTS in manifest else {}
            decode = _decoder(own, self._opener(checked))
            for name, part in parts.items():
                if name in manifest["states"]:
                    part.load_state_dict(decode(manifest["states"][name]))
        except (AttributeError, IndexError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
            path = self._path(int(manifest["round_index"]))
            raise CheckpointError(f"{path} does not fit this run: {type(error).__name__}: {error}") from error

    def _encode(self, value: Any, label: str, own: dict[str, Tensor], written: dict[int, str], where: str) -> Any:
        """JSON of a state; its tensors go to ``own``, and stored versions that have no file yet are written."""
        if isinstance(value, StoredTensors):
            if id(value) not in written:
                if value.path is None:
                    value.persist(self._new(f"{where.replace('/', '.')}.{label}{SUFFIX}"))
                assert value.path is not None
                assert value.path.parent == self.tensors, f"{value.path} is not of this run"
                written[id(value)] = value.path.name
            return {_STORED: written[id(value)]}
        if isinstance(value, Tensor):
            own[where] = value
            return {_TENSOR: where}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise TypeError(f"the state {where} has keys that are not text: {list(value)[:3]}")
            return {k: self._encode(v, label, own, written, f"{where}/{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._encode(item, label, own, written, f"{where}/{place}") for place, item in enumerate(value)]
        return value

    def _new(self, name: str) -> Path:
        """A file that is written now; there may have been one of the same name, if the round was saved before."""
        self._on_disk.discard(name)
        return self.tensors / name

    def _path(self, number: int) -> Path:
        return self.folder / f"{_PREFIX}{number:05d}.json"

    def _numbers(self) -> list[int]:
        numbers = [path.stem.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*.json")]
        return sorted(int(number) for number in numbers if re.fullmatch(r"\d{5,9}", number, re.ASCII))

    def _read(self, number: int, checked: dict[str, str]) -> dict[str, Any]:
        """A manifest, all of whose files are whole; the checksums that were computed are added to ``checked``."""
        path = self._path(number)
        manifest: dict[str, Any] = read_checked(path)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("round_index"), int):
            raise CheckpointError(f"{path} is damaged: it is not a checkpoint")
        if manifest.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {manifest.get('format')}, this version of fellrec reads {_FORMAT}; "
                "the run cannot be resumed, start it again"
            )
        for name in _files(path, manifest):
            if name not in checked:
                checked[name] = check_file(self.tensors / name)["checksum"]
        return manifest

    def _read_or_warn(self, number: int, checked: dict[str, str]) -> dict[str, Any] | None:
        try:
            return self._read(number, checked)
        except CheckpointError as error:
            log.warning("the checkpoint of round %d is not used: %s", number, error)
            return None

    def _opener(self, checked: Mapping[str, str]) -> Callable[[str], StoredTensors]:
        """Gives the stored version in a file, the same object whenever it is asked."""
        known: dict[str, StoredTensors] = {}

        def opened(name: str) -> StoredTensors:
            """The stored version in a file, the same object whenever it is asked."""
            if name not in known:
                known[name] = StoredTensors(path=self.tensors / name, checksum=checked[name])
            return known[name]

        return opened

    def _remove_old(self) -> None:
        """Remove all manifests but the last ones, then every file that none of those needs."""
        needed: set[str] = set()
        with writing(self.folder):
            numbers = self._numbers()
            for number in numbers[: -self.keep]:
                self._path(number).unlink()
            for number in numbers[-self.keep :]:
                try:
                    needed |= set(_files(self._path(number), read_checked(self._path(number))))
                except CheckpointError:  # it cannot be used, so what it alone needs is not needed either
                    continue
            sync_folder(self.folder)
            for path in self.tensors.iterdir():
                if path.name not in needed:
                    path.unlink()


def _files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of all files that a checkpoint needs.

    Raises:
        CheckpointError: If it has none, or one of them would not be in the folder of the tensors.
    """
    listed = manifest.get("files")
    if not isinstance(listed, list) or not isinstance(manifest.get("states"), dict):
        raise CheckpointError(f"{path} is damaged: it is not a checkpoint")
    names = [*listed, *([manifest[_PARTS]] if _PARTS in manifest else [])]
    return [file_in(path.parent / TENSORS, name, SUFFIX).name for name in names]


def _decoder(own: Mapping[str, Tensor], opened: Callable[[str], StoredTensors]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        """A state from its JSON."""
        if isinstance(value, dict):
            if set(value) == {_STORED}:
                return opened(value[_STORED])
            if set(value) == {_TENSOR}:
                return torch.clone(own[value[_TENSOR]])
            return {key: decode(item) for key, item in value.items()}
        return [decode(item) for item in value] if isinstance(value, list) else value

    return decode
