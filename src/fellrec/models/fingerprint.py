"""A fingerprint of a backbone: hashes of its configuration, its tokenizer and every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from fellrec.models.backbone import Backbone

_OF_FILES = ("architectures", "transformers_version", "dtype", "torch_dtype")
"""Fields of a configuration that say how it was saved, not what the model computes."""


def fingerprint(backbone: Backbone) -> dict[str, Any]:
    """Hashes that are the same wherever and under whatever name the backbone is stored.

    Args:
        backbone: As it was loaded, before an adapter is attached.

    Returns:
        ``config`` and ``tokenizer``, and ``tensors`` by name; with an executed cut, the tensors of the client's part.
    """
    config = {
        name: value
        for name, value in backbone.model.config.to_diff_dict().items()
        if name not in _OF_FILES and not name.startswith("_")
    }
    return {
        "config": _hash(json.dumps(config, sort_keys=True, default=str).encode()),
        "tokenizer": _hash(_text_of(backbone.tokenizer).encode()),
        "tensors": {name: _hash_of(parameter) for name, parameter in backbone.model.named_parameters()},
    }


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two fingerprints do not have in common, in words; empty if they agree.

    Tensors that only one of them has do not count: one may be of a client's part.

    Example:
        >>> first = {"config": "a", "tokenizer": "b", "tensors": {"x": "1", "y": "2", "z": "3"}}
        >>> differences(first, {"config": "a", "tokenizer": "c", "tensors": {"x": "1", "y": "9"}})
        'the tokenizer; 1 of 2 weights (y)'
    """
    common = [name for name in recorded["tensors"] if name in now["tensors"]]
    other = [name for name in common if recorded["tensors"][name] != now["tensors"][name]]
    found = [
        *(["config.json"] if recorded["config"] != now["config"] else []),
        *(["the tokenizer"] if recorded["tokenizer"] != now["tokenizer"] else []),
        *([f"{len(other)} of {len(common)} weights ({', '.join(other[:3])})"] if other else []),
    ]
    return "; ".join(found)


def _text_of(tokenizer: Any) -> str:
    """Vocabulary and rules; without padding and truncation, which are settings of a call."""
    rules = {}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return json.dumps([rules, tokenizer.get_vocab(), str(tokenizer.special_tokens_map)], sort_keys=True)


def _hash_of(parameter: torch.Tensor) -> str:
    values = parameter.detach().cpu().contiguous()
    about = f"{values.dtype} {list(values.shape)}".encode()
    return _hash(about, values.reshape(-1).view(torch.uint8).numpy())


def _hash(*pieces: Any) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]
