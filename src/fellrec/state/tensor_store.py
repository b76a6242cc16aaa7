"""Versions of clients' tensors: each is written once, never changed, and kept in memory or in a safetensors file.

The state of a run refers to versions; a new state refers to other versions. Files are memory-mapped when they are read.
They are whole whenever the process is killed; a checkpoint flushes those that it refers to before it is written, so
that they are whole too if the machine loses power.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import CheckpointError
from fellrec.functional.stacks import LazyStack
from fellrec.state.files import discard, draft_of, make_folder, writing

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
_LARGEST_HEADER = 100 << 20
"""Of safetensors, in bytes."""
_BUFFER_BYTES = 32 << 20
"""Bytes that are collected before they are written, of all files that are written side by side."""
_UNKNOWN = "0" * 32
"""Placeholder in the header while the checksum is computed."""

TensorSpecs = Mapping[str, tuple[torch.dtype, torch.Size]]
"""Name → type and shape."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class StoredTensors:
    """One client's tensors at one moment.

    Attributes:
        memory: In memory, by name; not to be changed. ``None`` if they are only in a file.
        path: Their file, if there is one.
        checksum: Of that file.
    """

    memory: Mapping[str, Tensor] | None = None
    path: Path | None = None
    checksum: str = ""

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name; those of a file are memory-mapped, so only what is read takes memory.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        if self.memory is not None:
            return self.memory
        assert self.path is not None
        try:
            return map_tensors(self.path)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def persist(self, path: Path) -> None:
        """Write tensors that are only in memory; they stay there.

        Raises:
            StorageError: If it cannot be written.
        """
        if self.path is None:
            assert self.memory is not None
            self.checksum = write_tensors(path, self.memory)
            self.path = path


class TensorStore:
    """Creates new versions.

    Args:
        folder: Directory in which each version is a file; ``None`` keeps them in memory.
        number: Number of the last file, from which names are counted on.
    """

    def __init__(self, folder: Path | None = None, number: int = 0) -> None:
        self.folder = folder
        self.number = number

    def put(
        self, client: int, tensors: Mapping[str, Tensor], name: str = "", about: Mapping[str, str] | None = None
    ) -> StoredTensors:
        """Keep a copy of one client's tensors.

        Args:
            client: Its row.
            tensors: By name, on any device.
            name: Distinguishes the file from the client's others; numbered if empty.
            about: Metadata for the file.

        Raises:
            StorageError: If the file cannot be written.
        """
        if self.folder is None:
            return StoredTensors({key: _copy(tensor, tensor.dtype) for key, tensor in tensors.items()})
        path = self.path_of(client, name)
        return StoredTensors(path=path, checksum=write_tensors(path, tensors, about))

    def put_rows(self, clients: Sequence[int], stack: LazyStack, kinds: TensorSpecs) -> list[StoredTensors]:
        """Keep a copy of several clients' tensors, which are read in blocks: at most one block is in memory.

        Raises:
            StorageError: If a file cannot be written.
        """
        if self.folder is None:
            whole = {name: stack[name] for name in kinds}
            return [
                StoredTensors({name: _copy(whole[name][row], kind) for name, (kind, _) in kinds.items()})
                for row in range(len(clients))
            ]
        with ExitStack() as open_writers:
            size = _BUFFER_BYTES // max(1, len(clients))
            writers = [
                open_writers.enter_context(SafetensorsWriter(self.path_of(client), kinds, buffer_bytes=size))
                for client in clients
            ]
            for name in writers[0].names if writers else ():
                for _, block in stack.blocks(name):
                    for row, writer in enumerate(writers):
                        writer.append(block[row].to(kinds[name][0]))
            checksums = [writer.finish() for writer in writers]
        return [StoredTensors(path=w.path, checksum=checksum) for w, checksum in zip(writers, checksums, strict=True)]

    def path_of(self, client: int, name: str = "") -> Path:
        """The file of one of a client's versions."""
        assert self.folder is not None
        if not name:
            self.number += 1
            name = f"{self.number:08d}"
        return self.folder / f"{client:06d}.{name}{SUFFIX}"


class SafetensorsWriter:
    """Writes a safetensors file in pieces to a draft beside its path; a context in which `finish` renames the draft.

    safetensors' own writer needs all tensors of a file at once; here the files of a whole cohort are written side by
    side. Pieces are collected, and the file is opened only to write them: there may be more files than a process can
    have open.

    Args:
        path: The file.
        kinds: Its tensors.
        about: Metadata for its header.
        buffer_bytes: Bytes that are collected before they are written.
    """

    def __init__(
        self,
        path: Path,
        kinds: TensorSpecs,
        about: Mapping[str, str] | None = None,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        self.path = path
        self.names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))  # as safetensors aligns them
        self._draft = draft_of(path)
        self._header = _header(self.names, kinds, {**(about or {}), "checksum": _UNKNOWN})
        self._digest = hashlib.blake2b(digest_size=len(_UNKNOWN) // 2)
        self._buffer, self._buffer_bytes = bytearray(), buffer_bytes

    def __enter__(self) -> SafetensorsWriter:
        discard(self._draft)
        try:
            self._append(self._header)
        except BaseException:
            discard(self._draft)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        discard(self._draft)

    def append(self, tensor: Tensor) -> None:
        """Append entries; tensors follow each other in the order of ``names``."""
        self._append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> str:
        """Write the rest and the checksum, and rename.

        Returns:
            The checksum.
        """
        checksum = self._digest.hexdigest()
        self._write()
        with writing(self.path):
            handle = os.open(self._draft, os.O_WRONLY)
            try:
                os.pwrite(handle, checksum.encode(), self._header.index(_UNKNOWN.encode()))
            finally:
                os.close(handle)
            self._draft.replace(self.path)
        return checksum

    def _append(self, content: Any) -> None:
        self._digest.update(content)
        if len(self._buffer) + len(content) < self._buffer_bytes:
            self._buffer += content
        else:
            self._write(content)

    def _write(self, content: Any = b"") -> None:
        with writing(self.path), self._draft.open("ab") as file:
            file.write(self._buffer)
            file.write(content)
        self._buffer.clear()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically, with a checksum of all of it.

    Args:
        path: The file.
        tensors: By name, on any device.
        about: Metadata for its header.

    Returns:
        The checksum.

    Raises:
        StorageError: If it cannot be written.
    """
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, about) as writer:
        for name in writer.names:
            writer.append(tensors[name])
        return writer.finish()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `write_tensors`, memory-mapped privately: changes to them do not reach the file.

    safetensors' own reader (0.8.0) leaks 64 bytes per tensor whenever a file is mapped, which adds up over thousands of
    clients.
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
    """Read a file of `write_tensors` and compare it with its checksum.

    Returns:
        The metadata, which include the checksum.

    Raises:
        CheckpointError: If the file is missing or differs from what was written.
    """
    digest = hashlib.blake2b(digest_size=len(_UNKNOWN) // 2)
    try:
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), path.stat().st_size, _LARGEST_HEADER))
            about = json.loads(header)[_ABOUT]
            if len(about["checksum"]) != len(_UNKNOWN):
                raise ValueError(about["checksum"])
            digest.update(length + header.replace(about["checksum"].encode(), _UNKNOWN.encode()))
            while piece := file.read(1 << 20):
                digest.update(piece)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header differs from what was written") from error
    if digest.hexdigest() != about["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    return dict(about)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with the memory layout that it would have from a file, on which the bits of products depend."""
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def open_store(folder: Path, number: int = 0) -> TensorStore:
    """A store on the disk.

    Raises:
        StorageError: If the directory cannot be created.
    """
    make_folder(folder)
    return TensorStore(folder, number)


def _header(names: Sequence[str], kinds: TensorSpecs, about: Mapping[str, str]) -> bytes:
    """The header of a safetensors file: eight bytes of length, and JSON, padded so that tensors are aligned."""
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
