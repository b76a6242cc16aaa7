"""Partial models of the client or the server, read from safetensors files without loading the whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from fellrec.errors import BackboneError, shorten
from fellrec.models.architectures import ArchSpec, arch_of, decoder_layers, model_of
from fellrec.models.remote import Cut, RemoteLayer, server_shell, without_missing_head

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


def load_partial(folder: Path, side: str, head_layers: int, tail_layers: int, dtype: torch.dtype) -> Any:
    """Load the client's or the server's partial model; the tensors of the other side are not read.

    Args:
        folder: A Hugging Face model folder with ``config.json`` and one or several safetensors files.
        side: ``"client"`` (embedding, head, tail, final norm, LM head) or ``"server"`` (body).
        head_layers: Decoder layers of the head.
        tail_layers: Decoder layers of the tail.
        dtype: Dtype of the weights.

    Returns:
        The model with placeholders for the layers of the other side, and the parameter names of the whole model.

    Raises:
        BackboneError: If the cuts do not fit the model, or tensors are missing in the files.
    """
    model, cut = _empty_model(folder, head_layers, tail_layers, dtype)
    if side == "server":
        model = server_shell(model, cut)
    else:
        layers = decoder_layers(model, arch_of(model.config))
        for number in cut.layers("body"):
            layers[number] = RemoteLayer(number)
    _fill(model, folder, dtype)
    return model.eval()


def read_body(folder: Path, head_layers: int, tail_layers: int) -> dict[str, Tensor]:
    """Read the parameters of the body, by their names in the whole model."""
    shell = empty_body(folder, head_layers, tail_layers)
    return dict(_read_tensors(folder, [name for name, _ in shell.named_parameters()], arch_of(shell.config)))


def empty_body(folder: Path, head_layers: int, tail_layers: int, dtype: torch.dtype | None = None) -> Any:
    """The server's partial model on the ``meta`` device: names, shapes and dtypes without memory."""
    return server_shell(*_empty_model(folder, head_layers, tail_layers, dtype))


def fingerprint(folder: Path) -> str:
    """Hash of the configuration, the tensor names and the sizes of the files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update("\n".join(sorted(_files(folder))).encode())
    for path in sorted(set(_files(folder).values())):
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()[:16]


def names_in_files(name: str, arch: ArchSpec) -> tuple[str, ...]:
    """Names that a parameter can have in checkpoint files, the first that is there counts.

    Files of the base model alone have no prefix of it; files of an encoder with a head have another.
    """
    base = f"{arch.inner.partition('.')[0]}."
    older = dict(arch.names_in_files)
    return name, older.get(name, name), name.removeprefix(base), f"{arch.prefix_in_files}{name}"


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors file says about a tensor; ``dtype`` as the format calls it, such as ``F32``."""

    shape: list[int]
    dtype: str


def tensors_in_files(folder: Path) -> dict[str, StoredTensor]:
    """Shapes and types of all tensors in a folder's safetensors files, by name; the tensors are not read.

    Raises:
        BackboneError: If a file is missing or damaged.
    """
    files, found = _files(folder), dict[str, StoredTensor]()
    for path in sorted(set(files.values())):
        with _reading(folder, path), safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name, place in files.items() if place == path}
            found |= {name: StoredTensor(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    return found


@contextmanager
def _reading(folder: Path, path: Path) -> Iterator[None]:
    """Explain why one of the files of a backbone cannot be read."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        reason = str(error) if path.exists() else "the file is missing"
        if path.is_file() and path.read_bytes()[: len(_POINTER)] == _POINTER:
            reason = "it is a pointer of Git LFS, not the file itself; get it by git lfs pull"
        elif isinstance(error, SafetensorError):
            reason = f"{reason}; was it copied or downloaded completely?"
        raise BackboneError(f"backbone.path={folder} cannot be loaded: {path.name}: {reason}") from error


def _empty_model(folder: Path, head_layers: int, tail_layers: int, dtype: torch.dtype | None) -> tuple[Any, Cut]:
    """The whole model with its parameters on the ``meta`` device, and its cut."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = model_of(config, dtype)
    return model, Cut(head_layers, tail_layers, len(decoder_layers(model, arch_of(config))))


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, by what the files have: an index may be older than they are."""
    found: dict[str, Path] = {}
    for path in _weight_files(folder):
        with _reading(folder, path), safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read, so that one process and several have the same weights.

    Raises:
        BackboneError: If there are none, or the index is damaged or names a file that is not in the folder.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():  # before an index, which may be left from older files
        return [single]
    given = f"backbone.path={folder} cannot be loaded"
    if not index.is_file():
        raise BackboneError(f"{given}: it has neither {_SINGLE} nor {_INDEX}")
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{given}: {_INDEX}: {error}") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not isinstance(content.get("metadata"), dict):
        raise BackboneError(f"{given}: {_INDEX} needs the mappings weight_map and metadata")
    names = list(dict.fromkeys(map(str, shards.values())))
    if wrong := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise BackboneError(f"{given}: {_INDEX} names {shorten(wrong[0])!r}, which is not a file of the folder")
    return [folder / name for name in sorted(names)]


def _read_tensors(folder: Path, names: Iterable[str], arch: ArchSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the given parameters one by one; names that are missing in the files are skipped.

    Raises:
        BackboneError: If a file is damaged.
    """
    files = _files(folder)
    for name in names:
        key = next((candidate for candidate in names_in_files(name, arch) if candidate in files), None)
        if key is not None:
            try:
                # Reopened for every tensor: an open file keeps all pages that were read in memory.
                with safe_open(files[key], "pt") as file:
                    tensor = file.get_tensor(key).clone()
            except (OSError, SafetensorError) as error:
                raise BackboneError(f"{files[key].name} cannot be read: {error}") from error
            yield name, tensor


def _fill(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Load every parameter of an empty model from the files."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else {}
    places = {name: (module, key) for name, module, key in _places(model)}
    missing = {name: places[name] for name in places if name not in tied}
    for name, tensor in _read_tensors(folder, list(missing), arch_of(model.config)):
        module, key = places[name]
        if tensor.shape == module._parameters[key].shape:  # type: ignore[union-attr]
            module._parameters[key] = nn.Parameter(tensor.to(dtype), requires_grad=False)
            del missing[name]
    for name in missing.keys() - without_missing_head(model, missing):
        del missing[name]
    if missing:
        raise BackboneError(
            f"backbone.path={folder}: {len(missing)} tensors of the partial model are missing or have another shape "
            f"than in config.json ({', '.join(list(missing)[:3])})"
        )
    for name, source in tied.items():
        if name in places and source in places:
            module, key = places[name]
            owner, source_key = places[source]
            module._parameters[key] = owner._parameters[source_key]


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the name of each parameter, its module and its name in the module."""
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}" if prefix else key, module, key
