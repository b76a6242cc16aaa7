"""The pretrained LLM: loaded once per run from a local folder or a hub, never with remote code or pickles."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fellrec.errors import BackboneError, unknown
from fellrec.models.architectures import ArchSpec, arch_of

log = logging.getLogger(__name__)

transformers_logging.disable_progress_bar()  # a bar for each saved adapter would bury the run's own

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A causal LM with its tokenizer.

    Attributes:
        model: The whole Hugging Face causal LM.
        tokenizer: Its tokenizer; has a padding token.
        arch: Where the parts of the model are.
        name: Short name for tables and tags.
    """

    model: Any
    tokenizer: Any
    arch: ArchSpec
    name: str

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, shared ones counted once."""
        model: nn.Module = self.model
        return sum(parameter.numel() for parameter in model.parameters())


def load_hf(path: str, dtype: str = "float32") -> Backbone:
    """Load a causal LM and its tokenizer.

    Args:
        path: A local folder, or a name on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Returns:
        The backbone. A tokenizer without a padding token pads with its end (or unknown) token.

    Raises:
        BackboneError: If the folder is missing or incomplete, or the architecture is not known.
    """
    if dtype not in DTYPES:
        raise BackboneError(unknown("backbone.dtype", dtype, DTYPES))
    _check_folder(path)
    try:
        arch = arch_of(AutoConfig.from_pretrained(path, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"backbone.path={path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return Backbone(model, tokenizer, arch, Path(path).name)


def _check_folder(path: str) -> None:
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if not looks_local:
        return
    if not folder.is_dir():
        raise BackboneError(f"backbone.path={path} is no folder")
    if not (folder / "config.json").is_file():
        raise BackboneError(f"backbone.path={path} has no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(f"backbone.path={path} has no *.safetensors; other weight formats are not read")
