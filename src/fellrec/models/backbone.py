"""The pretrained LLM: loaded once per run from a local folder or a hub, never with remote code or pickles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fellrec.errors import BackboneError, unknown
from fellrec.models.architectures import ArchSpec, arch_of, auto_class
from fellrec.models.partial import load_share
from fellrec.models.settings import HfSettings

transformers_logging.disable_progress_bar()  # a bar for each saved adapter would bury the run's own

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A causal LM or an encoder with its tokenizer.

    Attributes:
        model: The whole Hugging Face model.
        tokenizer: Its tokenizer; has a padding token.
        arch: Where the parts of the model are.
        name: Short name for tables and tags.
        folder: Where it was loaded from; ``None`` if it was made here.
        is_pretrained: Whether it has learned something before the first round.
    """

    model: Any
    tokenizer: Any
    arch: ArchSpec
    name: str
    folder: Path | None = None
    is_pretrained: bool = True

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, shared ones counted once."""
        model: nn.Module = self.model
        return sum(parameter.numel() for parameter in model.parameters())


def load_hf(path: str, dtype: str = HfSettings.dtype, client_cut: tuple[int, int] | None = None) -> Backbone:
    """Load a causal LM or an encoder, as its configuration says, and its tokenizer.

    Args:
        path: A local folder (``~`` is the home folder), or a name on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        client_cut: Layers of head and tail, to load the client's share only; ``None`` for the whole model.

    Returns:
        The backbone. A tokenizer without a padding token pads with its end (or unknown) token.

    Raises:
        BackboneError: If the folder is missing or incomplete, the architecture is not known, the weights are damaged or
            do not fill the model, or the tokenizer does not fit it.
    """
    torch_dtype = dtype_of(dtype)
    folder, is_local = _find(path)
    if client_cut is not None and not is_local:
        folder, is_local = Path(snapshot_download(path, allow_patterns=["*.json", "*.model", "*.safetensors"])), True
    source = str(folder) if is_local else path
    try:
        arch = arch_of(AutoConfig.from_pretrained(source, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if client_cut is not None:
            share = load_share(folder, "client", *client_cut, torch_dtype)
            check_tokenizer(f"backbone.path={path}", tokenizer, share)
            return Backbone(share, tokenizer, arch, os.path.basename(os.path.abspath(folder)), folder)
        kind, arguments = auto_class(arch)
        loaded: Any = kind.from_pretrained(
            source,
            dtype=torch_dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BackboneError(f"backbone.path={path} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    model, report = loaded
    _check_weights(path, report)
    check_tokenizer(f"backbone.path={path}", tokenizer, model)
    return Backbone(model, tokenizer, arch, os.path.basename(os.path.abspath(folder)), folder if is_local else None)


def load_shape(path: str) -> tuple[Any, Any]:
    """What ``load_hf`` would load, without the weights.

    Args:
        path: As in ``load_hf``.

    Returns:
        The Hugging Face configuration and the tokenizer, which is not checked yet.

    Raises:
        BackboneError: If the folder is missing or incomplete, or the architecture is not known.
    """
    folder, is_local = _find(path)
    source = str(folder) if is_local else path
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        arch_of(config)
        return config, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"backbone.path={path} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error


def dtype_of(name: str) -> torch.dtype:
    """The type of the backbone's weights.

    Raises:
        BackboneError: If the name is unknown.
    """
    if name not in DTYPES:
        raise BackboneError(unknown("backbone.dtype", name, DTYPES))
    return DTYPES[name]


def check_tokenizer(given: str, tokenizer: Any, model: Any) -> None:
    """Give a tokenizer a padding token if it has none, and refuse one that does not fit the model.

    Args:
        given: The setting that named it, for messages: ``backbone.path=…``.
        tokenizer: Changed in place.
        model: Knows how many tokens have an embedding.

    Raises:
        BackboneError: If there is nothing to pad with, or a special token has no embedding.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise BackboneError(f"{given}: the tokenizer has no padding, end or unknown token to pad with")
    # Not the tokenizer's length: some have tokens for images that a text model never meets.
    num_embeddings = model.get_input_embeddings().num_embeddings
    for token in ("pad_token", "bos_token", "eos_token", "cls_token"):
        token_id = getattr(tokenizer, f"{token}_id")
        if token_id is not None and token_id >= num_embeddings:
            raise BackboneError(
                f"{given}: the tokenizer's {token} is number {token_id}, "
                f"but the model has embeddings for 0 to {num_embeddings - 1}"
            )


def _check_weights(path: str, report: Mapping[str, Any]) -> None:
    # Transformers fills such tensors with random numbers and goes on.
    missing, mismatched = sorted(report["missing_keys"]), sorted(name for name, *_ in report["mismatched_keys"])
    if missing or mismatched:
        raise BackboneError(
            f"backbone.path={path}: the weights do not fill the model of config.json; "
            f"missing {len(missing)} ({', '.join(missing[:3])}), of another shape {len(mismatched)} "
            f"({', '.join(mismatched[:3])})"
        )


def _find(path: str) -> tuple[Path, bool]:
    """The path as a folder, and whether it is one, checked, or a name on the hub."""
    folder = Path(path).expanduser()
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if is_local:
        _check_folder(path, folder)
    return folder, is_local


def _check_folder(path: str, folder: Path) -> None:
    if not folder.is_dir():
        raise BackboneError(f"backbone.path={path} is no folder")
    if not (folder / "config.json").is_file():
        raise BackboneError(f"backbone.path={path} has no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(f"backbone.path={path} has no *.safetensors; other weight formats are not read")
