"""The pretrained backbone, loaded from a local folder or the Hugging Face hub, without remote code or pickles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from fellrec.errors import BackboneError, unknown
from fellrec.models.architectures import ArchSpec, arch_of, auto_class
from fellrec.models.hf_folder import (
    check_finite,
    check_no_adapter,
    check_not_quantised,
    check_shapes,
    do_not_match,
    note_pipeline,
    read_config,
    read_tokenizer,
)
from fellrec.models.partial import load_partial
from fellrec.models.remote import without_missing_head
from fellrec.models.settings import HfSettings
from fellrec.state.nearest import not_a_directory, similar

transformers_logging.disable_progress_bar()  # one progress bar per saved adapter would hide that of the run

_OTHER_FORMATS = {
    ".gguf": "a GGUF file",
    ".ggml": "a GGML file",
    ".bin": "a file of weights as pickles",
    ".pt": "a file of weights as pickles",
    ".pth": "a file of weights as pickles",
    ".ckpt": "a file of weights as pickles",
    ".onnx": "an ONNX file",
    ".safetensors": "a file of weights",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A causal LM or an encoder with its tokenizer.

    Attributes:
        model: The Hugging Face model.
        tokenizer: Its tokenizer, with a padding token.
        arch: Specification of its architecture.
        name: Short name for tables and tags.
        folder: Local folder of its files; ``None`` if it has none.
        is_pretrained: Whether it is trained before the first round.
    """

    model: Any
    tokenizer: Any
    arch: ArchSpec
    name: str
    folder: Path | None = None
    is_pretrained: bool = True

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model; tied parameters count once."""
        model: nn.Module = self.model
        return sum(parameter.numel() for parameter in model.parameters())


def load_hf(
    path: str,
    dtype: str = HfSettings.dtype,
    client_cut: tuple[int, int] | None = None,
    quantize: str | None = HfSettings.quantize,
) -> Backbone:
    """Load a causal LM or an encoder, depending on its configuration, and its tokenizer.

    Args:
        path: A local folder (``~`` is expanded), or a name on the Hugging Face hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        client_cut: Layers of head and tail, to load the client's partial model; ``None`` for the whole model.
        quantize: ``8bit`` or ``4bit`` to quantise a whole model by bitsandbytes as it is loaded.

    Returns:
        The backbone. A tokenizer without a padding token pads with its end (or unknown) token.

    Raises:
        BackboneError: If the folder is missing or incomplete, the architecture is unknown, the weights are damaged or
            incomplete, or the tokenizer does not fit the model.
    """
    torch_dtype, given = dtype_of(dtype), f"backbone.path={path}"
    config, tokenizer = load_shape(path)
    arch, (folder, is_local) = arch_of(config), _find(path)
    if is_local:
        check_shapes(given, config, folder)
        note_pipeline(given, folder)
    try:
        if client_cut is not None:
            folder, is_local = local_folder(path), True
            model = load_partial(folder, "client", *client_cut, torch_dtype)
        else:
            kind, arguments = auto_class(arch)
            if quantize is not None:
                arguments = {**arguments, "quantization_config": _quantisation(quantize, torch_dtype)}
            with _quiet():
                model, report = kind.from_pretrained(
                    str(folder) if is_local else path,
                    dtype=torch_dtype,
                    trust_remote_code=False,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # reported below
                    output_loading_info=True,
                    **arguments,
                )
            missing = without_missing_head(model, report["missing_keys"])
            mismatched = [name for name, *_ in report["mismatched_keys"]]
            if missing or mismatched:  # transformers has initialised them at random, without an error
                raise do_not_match(given, list(missing), mismatched)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _not_loadable(path, error) from error
    if arch.is_causal:
        model.generation_config = GenerationConfig()  # sampling or penalties of the folder would change the metrics
    check_tokenizer(given, tokenizer, model)
    check_finite(given, model)
    return Backbone(model, tokenizer, arch, os.path.basename(os.path.abspath(folder)), folder if is_local else None)


def local_folder(path: str) -> Path:
    """The folder of a backbone's files; those of a name on the hub are downloaded.

    Raises:
        BackboneError: If there is none.
    """
    folder, is_local = _find(path)
    if is_local:
        return folder
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.model", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise _not_loadable(path, error) from error


def load_shape(path: str) -> tuple[Any, Any]:
    """Load the configuration and the tokenizer of a backbone, without the weights.

    Args:
        path: As for ``load_hf``.

    Returns:
        The Hugging Face configuration, and the tokenizer, not yet checked.

    Raises:
        BackboneError: If the folder is missing or incomplete, or the architecture is unknown.
    """
    folder, is_local = _find(path)
    given, source = f"backbone.path={path}", str(folder) if is_local else path
    try:
        config = read_config(given, source)
    except BackboneError as error:
        if is_local:
            raise
        text = str(error).removeprefix(f"{given} ")
        raise BackboneError(
            f"{given} is not a directory here{similar(folder)}, and as a name on the hub it {text}"
        ) from error
    check_not_quantised(given, config)
    return config, read_tokenizer(given, source)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in `DTYPES`.

    Raises:
        BackboneError: If the name is unknown.
    """
    if name not in DTYPES:
        raise BackboneError(unknown("backbone.dtype", name, DTYPES))
    return DTYPES[name]


def check_tokenizer(given: str, tokenizer: Any, model: Any) -> None:
    """Set a padding token if a tokenizer has none, and check that its special tokens have embeddings.

    Args:
        given: The setting ``backbone.path=…``, for error messages.
        tokenizer: The tokenizer; changed in place.
        model: The model with the embeddings.

    Raises:
        BackboneError: If no token can be used for padding, or a special token has no embedding.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise BackboneError(f"{given}: the tokenizer has no padding, end or unknown token to use for padding")
    # The tokenizer may be larger than the embedding: some have image tokens that text models do not use.
    num_embeddings = model.get_input_embeddings().num_embeddings
    for token in ("pad_token", "bos_token", "eos_token", "cls_token"):
        token_id = getattr(tokenizer, f"{token}_id")
        if token_id is not None and token_id >= num_embeddings:
            raise BackboneError(
                f"{given}: the tokenizer's {token} has id {token_id}, "
                f"but the model has embeddings for ids 0 to {num_embeddings - 1} only"
            )


def _not_loadable(path: str, error: Exception) -> BackboneError:
    return BackboneError(f"backbone.path={path} cannot be loaded: {(str(error).splitlines() or [''])[0]}")


def _quantisation(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """While this lasts, transformers does not print a table of what is absent or surplus in the files."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _not_a_model(path: str, folder: Path) -> str:
    """Why a path is not a model's folder; a file may be the weights in a format that is not read."""
    found = _OTHER_FORMATS.get(folder.suffix.lower())
    if found and folder.is_file():
        expected = "expected a Hugging Face model folder, with config.json, a tokenizer and *.safetensors"
        return f"backbone.path={path} is {found}; {expected}"
    return not_a_directory(f"backbone.path={path}", folder)


def _find(path: str) -> tuple[Path, bool]:
    """The path, and whether it is a local folder (which is checked) instead of a name on the hub."""
    folder = Path(path).expanduser()
    is_in_folder = path.count("/") == 1 and folder.parent.is_dir()
    if not (path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists() or is_in_folder):
        return folder, False
    if not folder.is_dir():
        raise BackboneError(_not_a_model(path, folder))
    check_no_adapter(f"backbone.path={path}", folder)
    if not (folder / "config.json").is_file():
        raise BackboneError(
            f"backbone.path={path} has no config.json; expected a Hugging Face model folder{_what_is_in(folder)}"
        )
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(
            f"backbone.path={path} has no *.safetensors files; other weight formats are not supported"
            f"{_what_is_in(folder)}"
        )
    return folder, True


def _what_is_in(folder: Path) -> str:
    """Where the model is that a folder does not have at its top, or the files of other formats that it has."""
    patterns = ("*/config.json", "snapshots/*/config.json")  # a pipeline of modules, and the cache of the hub
    inside = [found.parent for pattern in patterns for found in sorted(folder.glob(pattern))]
    if inside:
        return f"; there is one in {', '.join(map(str, inside[:3]))}"
    others = [file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in _OTHER_FORMATS]
    return f"; there is {', '.join(others[:3])}" if others else ""
