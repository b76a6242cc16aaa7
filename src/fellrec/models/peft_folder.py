"""PEFT adapter folders: names of tensors in files, and an adapter to start from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save
from torch import Tensor

from fellrec.errors import BackboneError
from fellrec.models.modules import Targets
from fellrec.state.files import write_atomically
from fellrec.state.nearest import not_a_directory

ADAPTER_NAME = "default"
"""PEFT's name of the only adapter in a model."""

_PREFIX = "base_model.model."


def name_in_file(name: str) -> str:
    """PEFT saves the names of the wrapped model, without the adapter's name.

    Example:
        >>> name_in_file("model.layers.0.self_attn.q_proj.lora_A.default.weight")
        'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return f"{_PREFIX}{name.replace(f'.{ADAPTER_NAME}.', '.')}"


def name_in_model(name: str) -> str:
    """The inverse of `name_in_file`.

    Example:
        >>> name_in_model("base_model.model.lm_head.weight")
        'lm_head.weight'
    """
    return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{ADAPTER_NAME}.weight", name.removeprefix(_PREFIX))


def save_lora(adapter: Mapping[str, Tensor], config: LoraConfig, targets: Targets, folder: Path) -> None:
    """Write a LoRA adapter in PEFT's format, for ``PeftModel.from_pretrained``.

    Args:
        adapter: Adapter of the whole model, by the names of the model.
        config: PEFT's configuration of it.
        targets: What it trains.
        folder: Output folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not targets.are_suffixes:
        config = replace(
            config, target_modules=sorted({name.rpartition(".lora_")[0] for name in adapter if "lora_" in name})
        )
    tensors = {  # PEFT keeps a copy for each place of a tied parameter
        place: tensor if place == name else tensor.clone()
        for name, tensor in adapter.items()
        for place in targets.saved.get(name, [name])
    }
    saved = sorted({name.rpartition(".")[0] for name in tensors if "lora_" not in name})
    replace(config, modules_to_save=saved or None).save_pretrained(str(folder))
    write_tensors({name_in_file(name): tensor for name, tensor in tensors.items()}, folder / SAFETENSORS_WEIGHTS_NAME)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"format": "pt"}))


def read_adapter(path: str, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of a LoRA adapter in PEFT's format.

    Args:
        path: Its folder (``~`` is expanded).
        expected: Values that fields of its configuration must have, by the field's name.

    Returns:
        Tensors by their names in the model.

    Raises:
        BackboneError: If it is not such a folder, a field has another value, or a tensor has values that are not
            finite; names it.
    """
    given, folder = f"adapter.path={path}", Path(path).expanduser()
    if not folder.is_dir():
        raise BackboneError(not_a_directory(given, folder))
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise BackboneError(f"{given} has no {name}; expected the folder of a PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except Exception as error:  # whatever PEFT raises for such a file
        raise BackboneError(f"{given} cannot be loaded: {' '.join(str(error).split())}") from error
    for field, value in expected.items():
        found = getattr(config, field, None)
        if (found or None) != (value or None):
            raise BackboneError(
                f"{given}: its {field} is {getattr(found, 'value', found)}, and this run's is "
                f"{getattr(value, 'value', value)}"
            )
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise BackboneError(f"{given}: {name} has values that are not finite")
    return {name_in_model(name): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def copy_into(path: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], surplus: list[str]) -> None:
    """Copy an adapter's tensors into the parameters of the same names.

    Args:
        path: Its folder, for messages.
        tensors: By name.
        parameters: By name; on the ``meta`` device only names and shapes are checked.
        surplus: Names of tensors that no part of the model has.

    Raises:
        BackboneError: If names or shapes differ; names modules that only one side adapts.
    """
    given, missing = f"adapter.path={path}", sorted(parameters.keys() - tensors.keys())
    if missing or surplus:
        raise BackboneError(
            f"{given} adapts other modules than adapter.target_modules, adapter.layers and adapter.modules_to_save of "
            f"this run: {len(missing)} of this run's tensors are missing ({', '.join(missing[:3])}), {len(surplus)} "
            f"are in the adapter only ({', '.join(surplus[:3])})"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise BackboneError(
                f"{given}: {name} has shape {list(tensors[name].shape)}, and in this backbone {list(parameter.shape)}"
            )
        if parameter.device.type != "meta":
            parameter.copy_(tensors[name])
