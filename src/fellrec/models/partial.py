"""One side's share of a backbone, read from safetensors files without ever holding the rest of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from fellrec.errors import BackboneError
from fellrec.models.architectures import ArchSpec, arch_of, decoder_layers, model_of
from fellrec.models.remote import Cut, RemoteLayer, server_shell

SIDES = ("client", "server")
_INDEX = "model.safetensors.index.json"


def load_share(folder: Path, side: str, head_layers: int, tail_layers: int, dtype: torch.dtype) -> Any:
    """Load the client's or the server's share of a model; the other's tensors are not read.

    Args:
        folder: A Hugging Face folder with ``config.json`` and safetensors files, one or several.
        side: ``"client"`` (embedding, head, tail, final norm, LM head) or ``"server"`` (body).
        head_layers: Decoder layers of the head.
        tail_layers: Decoder layers of the tail.
        dtype: Of the weights.

    Returns:
        The model with stand-ins for the layers of the other side, under the whole model's names.

    Raises:
        BackboneError: If the cuts do not fit, or the files do not fill the share.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    arch = arch_of(config)
    with init_empty_weights(include_buffers=False):
        model = model_of(config, dtype)
    layers = decoder_layers(model, arch)
    cut = Cut(head_layers, tail_layers, len(layers))
    if side == "server":
        model = server_shell(model, cut)
    else:
        for number in cut.layers("body"):
            layers[number] = RemoteLayer(number)
    _fill(model, folder, dtype)
    return model.eval()


def read_tensors(folder: Path, names: Iterable[str], arch: ArchSpec) -> dict[str, Tensor]:
    """Tensors of a model by its own names; those that the files do not have are left out.

    Args:
        folder: With safetensors files.
        names: Parameter names of the model.
        arch: Knows the names that files use.

    Raises:
        BackboneError: If a file is damaged.
    """
    files, found, older = _files(folder), {}, dict(arch.names_in_files)
    for name in names:
        # Some files are those of the inner model alone, and leave its name out; others have an encoder and a head.
        candidates = (
            name, older.get(name, name), name.removeprefix(arch.names_prefix), f"{arch.prefix_in_files}{name}"
        )  # fmt: skip
        key = next((candidate for candidate in candidates if candidate in files), None)
        if key is not None:
            try:
                # Opened anew for every tensor: an open file keeps all that was read of it in memory.
                with safe_open(files[key], "pt") as file:
                    found[name] = file.get_tensor(key).clone()
            except (OSError, SafetensorError) as error:
                raise BackboneError(f"{files[key].name} cannot be read: {error}") from error
    return found


def read_body(folder: Path, head_layers: int, tail_layers: int) -> dict[str, Tensor]:
    """The body's tensors of a model, by its own names."""
    shell = empty_body(folder, head_layers, tail_layers)
    return read_tensors(folder, [name for name, _ in shell.named_parameters()], arch_of(shell.config))


def empty_body(folder: Path, head_layers: int, tail_layers: int, dtype: torch.dtype | None = None) -> Any:
    """The server's share of a model on PyTorch's ``meta`` device: names, shapes and types, without memory."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights():
        model = model_of(config, dtype)
    return server_shell(model, Cut(head_layers, tail_layers, len(decoder_layers(model, arch_of(config)))))


def fingerprint(folder: Path) -> str:
    """A hash of the configuration and of the names of all tensors: enough to tell two backbones apart."""
    import hashlib

    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update("\n".join(sorted(_files(folder))).encode())
    for path in sorted(set(_files(folder).values())):
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    try:
        if (folder / _INDEX).is_file():
            weight_map: Mapping[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        found: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise BackboneError(f"backbone.path={folder} cannot be read: {error}") from error
    return found


def _fill(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Give every parameter of a model without weights its tensor from the files."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else {}
    places = {name: (module, key) for name, module, key in _places(model)}
    wanted = [name for name in places if name not in tied]
    arch, missing = arch_of(model.config), []
    for name in wanted:
        module, key = places[name]
        tensor = read_tensors(folder, [name], arch).get(name)
        if tensor is None or tensor.shape != module._parameters[key].shape:  # type: ignore[union-attr]
            missing.append(name)
            continue
        module._parameters[key] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    if missing:
        raise BackboneError(
            f"backbone.path={folder}: the files do not fill this share of the model of config.json; "
            f"missing or of another shape are {len(missing)} tensors ({', '.join(missing[:3])})"
        )
    for name, source in tied.items():
        if name in places and source in places:
            module, key = places[name]
            owner, source_key = places[source]
            module._parameters[key] = owner._parameters[source_key]


def _places(model: nn.Module) -> Iterable[tuple[str, nn.Module, str]]:
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}" if prefix else key, module, key
