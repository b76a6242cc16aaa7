"""Versions of clients' tensors: each is written once, never changed, and lies in memory or in a safetensors file.

A run goes from state to state by pointing at other versions. What is in a file need not be in memory: it is mapped when
it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import CheckpointError
from fellrec.functional.stacks import LazyStack
from fellrec.state.files import commit, discard, draft_of, make_folder, sync_folder, writing

SUFFIX = ".safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}
_ABOUT = "__metadata__"
_UNKNOWN = "0" * 32
"""Stands for the checksum while it is computed."""

TensorSpecs = Mapping[str, tuple[torch.dtype, torch.Size]]
"""What is known of tensors before they exist: name → type and shape."""


class StoredTensors:
    """One client's tensors at one moment.

    Args:
        tensors: In memory; not to be changed. ``None`` if they are in a file only.
        path: Their file, if there is one.
        checksum: Of that file.
    """

    __slots__ = ("_tensors", "checksum", "path")

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, path: Path | None = None, checksum: str = ""):
        self._tensors = tensors
        self.path = path
        self.checksum = checksum

    def tensors(self) -> Mapping[str, Tensor]:
        """By name; those of a file are mapped, so only what is read comes into memory.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        if self._tensors is not None:
            return self._tensors
        assert self.path is not None
        try:
            return map_tensors(self.path)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def persist(self, path: Path) -> None:
        """Write what is in memory only; it stays there.

        Raises:
            StorageError: If it cannot be written.
        """
        if self.path is None:
            assert self._tensors is not None
            self.checksum = write_tensors(path, self._tensors)
            self.path = path


class TensorStore:
    """Where new versions go.

    Args:
        folder: Each version becomes a file there; ``None`` keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.number = 0

    def put(
        self, client: int, tensors: Mapping[str, Tensor], name: str = "", about: Mapping[str, str] | None = None
    ) -> StoredTensors:
        """Keep a copy of one client's tensors.

        Args:
            client: Whose.
            tensors: By name, on any device.
            name: What tells the file from the client's others; numbered if empty.
            about: Goes into the file as well.

        Raises:
            StorageError: If the file cannot be written.
        """
        if self.folder is None:
            return StoredTensors({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()})
        path = self.path_of(client, name)
        return StoredTensors(path=path, checksum=write_tensors(path, tensors, about))

    def put_rows(self, clients: Sequence[int], stack: LazyStack, kinds: TensorSpecs) -> list[StoredTensors]:
        """Keep a copy of several clients' tensors, which are read in blocks: no more than one is in memory.

        Raises:
            StorageError: If a file cannot be written.
        """
        if self.folder is None:
            whole = {name: stack[name] for name in kinds}
            return [
                StoredTensors({name: whole[name][row].to("cpu", kind, copy=True) for name, (kind, _) in kinds.items()})
                for row in range(len(clients))
            ]
        drafts = [SafetensorsWriter(self.path_of(client), kinds) for client in clients]
        try:
            for draft in drafts:
                draft.begin()
            for name in drafts[0].names if drafts else ():
                for _, block in stack.blocks(name):
                    for row, draft in enumerate(drafts):
                        draft.append(block[row].to(kinds[name][0]))
            checksums = [draft.finish() for draft in drafts]
        finally:
            for draft in drafts:
                draft.discard()
        with writing(self.folder):
            sync_folder(self.folder)
        return [StoredTensors(path=d.path, checksum=checksum) for d, checksum in zip(drafts, checksums, strict=True)]

    def path_of(self, client: int, name: str = "") -> Path:
        """The file of one of a client's versions."""
        assert self.folder is not None
        if not name:
            self.number += 1
            name = f"{self.number:08d}"
        return self.folder / f"{client:06d}.{name}{SUFFIX}"


class SafetensorsWriter:
    """A safetensors file that is written in pieces, beside the place where it will lie.

    safetensors' own writer needs all tensors of a file at once; a whole cohort's files are written side by side here.
    The file is opened for every piece: there may be more files than a process can have open.
    """

    def __init__(self, path: Path, kinds: TensorSpecs, about: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))  # as safetensors aligns them
        self._draft = draft_of(path)
        header = _header(self.names, kinds, {**(about or {}), "checksum": _UNKNOWN})
        self._place = header.index(_UNKNOWN.encode())
        self._digest = hashlib.blake2b(digest_size=len(_UNKNOWN) // 2)
        self._header = header

    def begin(self) -> None:
        """Write the header."""
        discard(self._draft)
        self._write(self._header)

    def append(self, tensor: Tensor) -> None:
        """The next entries of the tensor whose turn it is."""
        self._write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> str:
        """Flush, and give the file its name; gives the checksum."""
        checksum = self._digest.hexdigest()
        with writing(self.path):
            handle = os.open(self._draft, os.O_WRONLY)
            try:
                os.pwrite(handle, checksum.encode(), self._place)
            finally:
                os.close(handle)
            commit(self._draft, self.path)
        return checksum

    def discard(self) -> None:
        """Remove what is not finished."""
        discard(self._draft)

    def _write(self, content: Any) -> None:
        with writing(self.path), self._draft.open("ab") as file:
            file.write(content)
        self._digest.update(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically, with a checksum of all of it.

    Args:
        path: The file.
        tensors: By name, on any device.
        about: Goes into its header.

    Returns:
        The checksum.

    Raises:
        StorageError: If it cannot be written.
    """
    draft = SafetensorsWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, about)
    try:
        draft.begin()
        for name in draft.names:
            draft.append(tensors[name])
        checksum = draft.finish()
    finally:
        draft.discard()
    with writing(path.parent):
        sync_folder(path.parent)
    return checksum


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `write_tensors`, mapped: what is not read takes no memory, what is written stays here.

    safetensors' own reader (0.8.0) keeps 64 bytes per tensor for good whenever a file is mapped, which adds up over
    thousands of clients.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        first, size = file.tell(), file.seek(0, os.SEEK_END)
    entries = json.loads(header)
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[first:]
    found = {}
    for name, entry in entries.items():
        if name != _ABOUT:
            start, end = entry["data_offsets"]
            found[name] = content[start:end].view(_NAMED[entry["dtype"]]).reshape(entry["shape"])
    return found


def check_file(path: Path) -> dict[str, str]:
    """Read all of a file of `write_tensors` and compare it with its checksum.

    Returns:
        What was written about it, the checksum among it.

    Raises:
        CheckpointError: If the file is absent or is not what was written.
    """
    digest = hashlib.blake2b(digest_size=len(_UNKNOWN) // 2)
    try:
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), path.stat().st_size))
            about = json.loads(header)[_ABOUT]
            digest.update(length + header.replace(about["checksum"].encode(), _UNKNOWN.encode()))
            while piece := file.read(1 << 20):
                digest.update(piece)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not what was written there") from error
    if digest.hexdigest() != about["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    return dict(about)


def open_store(folder: Path, number: int = 0) -> TensorStore:
    """A tensor_store on the disk.

    Raises:
        StorageError: If the folder cannot be made.
    """
    make_folder(folder)
    tensor_store = TensorStore(folder)
    tensor_store.number = number
    return tensor_store


def _header(names: Sequence[str], kinds: TensorSpecs, about: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: eight bytes of length, JSON, padded so that tensors are aligned."""
    entries: dict[str, Any] = {_ABOUT: dict(about)}
    position = 0
    for name in names:
        dtype, shape = kinds[name]
        end = position + dtype.itemsize * shape.numel()
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
