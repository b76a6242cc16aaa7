"""Models in one file, converted once into ordinary Hugging Face folders in the cache: GGUF files and zipped folders."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from filelock import SoftFileLock, Timeout
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME

from fellrec.errors import BackboneError, shorten
from fellrec.models.architectures import arch_of, auto_class, check_config
from fellrec.models.packages import ModelFile, file_of, is_gguf
from fellrec.state.cache import is_intact, new_entry, writing_entry
from fellrec.state.files import write_json

log = logging.getLogger(__name__)

SOURCE = "source.json"
"""In a converted folder: what it was made from."""
_NOTES = ("backbone_file", "backbone_sha256", "backbone_package", "backbone_licence")
_FORMAT = 1
"""To be increased when the conversion changes, so that folders of the old kind are not used."""
_WAIT_SECONDS = 900.0
"""Longest wait for another process that converts the same file; after that, both do, with the same result."""
_LARGEST = 64 << 30
"""Bytes of a file in an archive; a larger size is a mistake."""


def model_folder(path: str, cache: Path) -> tuple[str, str | None]:
    """The folder or hub name that ``backbone.path`` stands for; a file is converted into the cache, once.

    Args:
        path: ``backbone.path``.
        cache: Directory of backbones.

    Returns:
        The path to load, and the model's short name if it is not that of the folder.

    Raises:
        BackboneError: If a package is missing, or the file cannot be converted.
        StorageError: If the cache cannot be written.
    """
    file = file_of(path)
    if file is None:
        return path, None
    checksum = _checksum(file.path)
    folder = cache / hashlib.sha256(f"{checksum} {_FORMAT}".encode()).hexdigest()[:16]
    if not is_intact(folder):
        with _alone(folder):
            if not is_intact(folder):
                Console(stderr=True).print(f"converting {file.path.name}, once", highlight=False)
                with new_entry(folder) as draft, writing_entry(folder):
                    convert(f"backbone.path={path}", file, draft, checksum)
    return str(folder), file.name


def convert(given: str, file: ModelFile, folder: Path, checksum: str | None = None) -> None:
    """Write the model of a file as a Hugging Face folder, with a note of where it is from.

    Args:
        given: The setting, such as ``backbone.path=…``, for messages.
        file: The file.
        folder: An empty directory.
        checksum: SHA-256 of the file, if it is known.

    Raises:
        BackboneError: If it cannot be converted.
    """
    _from_gguf(given, file.path, folder) if is_gguf(file.path.name) else _from_zip(given, file.path, folder)
    values = (file.path.name, checksum or _checksum(file.path), file.package, file.licence)
    write_json(folder / SOURCE, {name: value for name, value in zip(_NOTES, values, strict=True) if value})


def source_of(folder: Path | None) -> dict[str, str]:
    """What a converted folder was made from: file, SHA-256, package, licence; empty for any other folder."""
    try:
        found: Any = {} if folder is None else json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    values = {name: found.get(name) for name in _NOTES} if isinstance(found, dict) else {}
    return {name: shorten(value) for name, value in values.items() if isinstance(value, str)}


def _from_gguf(given: str, file: Path, folder: Path) -> None:
    """Dequantise to float32: every value that the file's blocks stand for is kept, up to float32's rounding."""
    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(file.parent, **where)
        check_config(given, config)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        kind, arguments = auto_class(arch_of(config))
        model = kind.from_pretrained(file.parent, config=config, dtype=torch.float32, **where, **arguments)
    except BackboneError:
        raise
    except Exception as error:  # whatever transformers and gguf raise for such a file
        text = shorten(" ".join(str(error).split()), 300)
        raise BackboneError(
            f"{given} cannot be converted, it may be incomplete: {type(error).__name__}: {text}"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are ordinary ones now
    save_folder(model, tokenizer, folder)


def save_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model as an ordinary Hugging Face folder, tied parameters once."""
    # Not the model's save_pretrained: that writes nothing in a process that is not the first, which may be a client's.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.config.save_pretrained(folder)
    save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _from_zip(given: str, file: Path, folder: Path) -> None:
    """Unpack the files at the top of an archive that a model folder has: JSON, texts and safetensors, nothing else."""
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename)
                if entry.is_dir() or len(name.parts) != 1 or name.suffix not in (".json", ".txt", ".safetensors"):
                    continue
                if entry.file_size > _LARGEST:
                    raise BackboneError(f"{given}: {name} in {file.name} is too large: {entry.file_size:,} bytes")
                with archive.open(entry) as source, (folder / name.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise BackboneError(f"{given}: {file.name} is not a zip archive that can be read: {error}") from error
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{given}: {file.name} has no config.json")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let other processes wait while this one converts; one that waited too long converts as well."""
    with writing_entry(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = SoftFileLock(folder.with_name(f".{folder.name}.lock"), timeout=_WAIT_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            log.warning("%s is held by another process for long; this one converts the file, too", lock.lock_file)
    try:
        yield
    finally:
        lock.release()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()
