"""Checks of a Hugging Face model folder before weights are loaded: configuration, tokenizer, shapes in the files."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer

from fellrec.distributed.memory import total_bytes
from fellrec.errors import BackboneError, shorten, unknown
from fellrec.models.architectures import ARCHITECTURES, ArchSpec, arch_of, check_config, model_of
from fellrec.models.partial import names_in_files, tensors_in_files

_log = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "vocab.bpe", "tekken.json")
"""Files of which a tokenizer has at least one, unless it is one of sentencepiece."""
_COPIES = 4
"""Of the weights, in training: themselves, their gradients and two moments."""
_PROBE = "Heat of the Day, The (1995)"
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_config(given: str, source: str) -> Any:
    """Read the configuration of a model from its folder, or from the Hugging Face hub.

    Args:
        given: The setting, such as ``backbone.path=…``, for messages.
        source: A folder with a ``config.json``, or a name on the hub.

    Raises:
        BackboneError: If it is not a valid configuration, or the model is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever the checks of transformers raise
        raise _invalid(given, error) from error
    if named := getattr(config, "transformers_weights", None):
        raise BackboneError(
            f"{given}: transformers_weights={shorten(str(named))} in config.json is not supported; the weights must be "
            "in model.safetensors, or in the files of model.safetensors.index.json"
        )
    check_config(given, config)
    return config


def config_of(given: str, values: Any) -> Any:
    """The configuration of the values of a ``config.json``.

    Args:
        given: The setting, such as ``backbone.config=…``, for messages.
        values: The contents of the file.

    Raises:
        BackboneError: As for `read_config`.
    """
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise BackboneError(f"{given}: {unknown('model_type', model_type, ARCHITECTURES)}")
    try:
        config = AutoConfig.for_model(model_type, **{key: v for key, v in values.items() if key != "model_type"})
    except Exception as error:  # whatever the checks of transformers raise
        raise _invalid(given, error) from error
    check_config(given, config)
    return config


def empty_model(given: str, config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of a configuration on the ``meta`` device: names, shapes and types without memory.

    Raises:
        BackboneError: If there is no model with these sizes.
    """
    try:
        with torch.device("meta"):
            return model_of(config, dtype)
    except Exception as error:  # a size of 0, a negative one, an unknown activation
        raise BackboneError(
            f"{given} cannot be loaded: no model has the sizes in config.json ({type(error).__name__}: "
            f"{_one_line(error)})"
        ) from error


def check_fits(config: Any) -> None:
    """Check that this machine has the memory to train a model that is built here: weights, gradients, AdamW's moments.

    Raises:
        BackboneError: If not; names the sizes.
    """
    sizes = f"backbone.hidden_size={config.hidden_size}, backbone.num_layers={config.num_hidden_layers}"
    weights = sum(parameter.nbytes for parameter in empty_model(sizes, config).parameters())
    needed, present = _COPIES * weights, total_bytes()
    if needed > present:
        raise BackboneError(
            f"{sizes}: training the model needs {needed / 1e9:,.0f} GB, and this machine has {present / 1e9:,.0f} GB"
        )


def read_tokenizer(given: str, source: str) -> Any:
    """Read a tokenizer from its folder, or from the hub.

    Args:
        given: The setting, for messages.
        source: As for `read_config`.

    Raises:
        BackboneError: If it cannot be read, such as without a package that it needs.
    """
    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file() for name in _TOKENIZERS + _SENTENCEPIECE_FILES
    ):
        raise BackboneError(f"{given} has no tokenizer, such as tokenizer.json; copy it from the model's page")
    pieces = [name for name in _SENTENCEPIECE_FILES if (Path(source) / name).is_file()]
    needs_pieces = bool(pieces) and not (Path(source) / "tokenizer.json").is_file()
    if needs_pieces and importlib.util.find_spec("sentencepiece") is None:
        raise BackboneError(
            f"{given}: the tokenizer in {pieces[0]} needs the package sentencepiece, which is not installed: "
            "pip install sentencepiece"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if needs_pieces and not _names_class(Path(source)) and not _agrees(tokenizer, Path(source) / pieces[0]):
            tokenizer = LlamaTokenizer.from_pretrained(source)
        tokenizer("")  # a wrong model_max_length, for example, is found in use only
    except Exception as error:  # whatever transformers and tokenizers raise for such a file
        kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
        raise BackboneError(f"{given}: the tokenizer cannot be loaded: {kind}{_one_line(error)}") from error
    if needs_pieces and not _names_class(Path(source)) and not _agrees(tokenizer, Path(source) / pieces[0]):
        raise BackboneError(
            f"{given}: transformers gives other tokens than {pieces[0]} itself; name the tokenizer_class in "
            "tokenizer_config.json"
        )
    return tokenizer


def check_shapes(given: str, config: Any, folder: Path) -> None:
    """Compare names and shapes of the configuration with the files, before any memory is allocated.

    Whole layers are compared by name; transformers knows more names of other parameters in old files.

    Raises:
        BackboneError: If a tensor has another shape or is not stored as floats, or a layer is missing.
    """
    arch, in_files = arch_of(config), tensors_in_files(folder)
    layers = {None, *(_layer(key, arch) for key in in_files)}
    missing, other, unusual = [], [], {}
    for name, parameter in empty_model(given, config).named_parameters():
        key = next((key for key in names_in_files(name, arch) if key in in_files), None)
        if key is not None and in_files[key].shape != list(parameter.shape):
            other.append(name)
        elif key is not None and in_files[key].dtype not in _FLOATS:
            unusual[key] = in_files[key].dtype
        elif key is None and _layer(name, arch) not in layers:
            missing.append(name)
    if missing or other:
        raise do_not_match(given, missing, other)
    if unusual:
        name, dtype = next(iter(unusual.items()))
        raise BackboneError(
            f"{given}: {len(unusual)} tensors are stored as other numbers than {', '.join(_FLOATS)}, such as {name} as "
            f"{dtype}: a quantised checkpoint is not supported"
        )


def check_finite(given: str, model: Any) -> None:
    """Check that all weights are finite numbers.

    Raises:
        BackboneError: Naming the first parameter that has others.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise BackboneError(f"{given}: {name} has values that are not finite")


def do_not_match(given: str, missing: Sequence[str], mismatched: Sequence[str]) -> BackboneError:
    """The error for tensors that the files do not have, or have in another shape."""
    return BackboneError(
        f"{given}: the weights do not match config.json; missing {len(missing)} ({', '.join(sorted(missing)[:3])}), "
        f"of another shape {len(mismatched)} ({', '.join(sorted(mismatched)[:3])})"
    )


def _layer(name: str, arch: ArchSpec) -> int | None:
    """The number of the layer that a parameter belongs to, by its name in the model or in a file."""
    list_of_layers = re.escape(arch.layers.rpartition(".")[2])
    found = re.search(rf"(?:^|\.){list_of_layers}\.(\d+)\.", name)
    return int(found[1]) if found else None


def check_not_quantised(given: str, config: Any) -> None:
    """Refuse a checkpoint with quantised weights.

    Raises:
        BackboneError: Naming the method.
    """
    named = ("quantization_config", "compression_config")
    found = next((value for name in named if (value := getattr(config, name, None)) is not None), None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    raise BackboneError(
        f"{given}: a quantised checkpoint (quantization_config in config.json, {method or 'unknown method'}) is not "
        "supported; give the checkpoint in float32, bfloat16 or float16, which backbone.quantize can quantise as it is "
        "loaded"
    )


def check_no_adapter(given: str, folder: Path) -> None:
    """Refuse a PEFT adapter in a model's folder, which transformers would load with its own base model.

    Raises:
        BackboneError: If there is one; names its base model.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        base = found.get("base_model_name_or_path") if isinstance(found, Mapping) else None
    except (OSError, ValueError, RecursionError):
        base = None
    if (folder / "config.json").is_file():
        raise BackboneError(
            f"{given} has an adapter beside the model (adapter_config.json); move the adapter to a folder of its own, "
            "which adapter.path can name"
        )
    raise BackboneError(
        f"{given} is a PEFT adapter (adapter_config.json), not a model; give its base model"
        f"{f' ({base})' if base else ''} as backbone.path, and the adapter as adapter.path"
    )


def note_pipeline(given: str, folder: Path) -> None:
    """Warn of the modules of a sentence-transformers pipeline, in whose place the objective's settings are."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        names = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (OSError, ValueError, TypeError, KeyError):
        return
    others = [name for name in names if name != "Transformer"]
    if others:
        _log.warning(
            f"{given} is a sentence-transformers pipeline: objective.pooling and objective.similarity decide how "
            f"hidden states become a vector, not its {', '.join(others)}"
        )


def _agrees(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer splits a text as sentencepiece does; without its class, the first space can be lost."""
    processor: Any = importlib.import_module("sentencepiece").SentencePieceProcessor(str(file))
    unknown_piece = processor.id_to_piece(processor.unk_id())
    expected = [processor.id_to_piece(number) for number in processor.encode(_PROBE)]
    known = [[piece for piece in found if piece != unknown_piece] for found in (tokenizer.tokenize(_PROBE), expected)]
    return known[0] == known[1]


def _names_class(folder: Path) -> bool:
    """Whether the files name a tokenizer class; ``TokenizersBackend`` is any."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return found not in (None, "TokenizersBackend", "PreTrainedTokenizerFast")


def _invalid(given: str, error: Exception) -> BackboneError:
    return BackboneError(f"{given} cannot be loaded: config.json is not valid: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """The message of an error as one line, not longer than a screen is wide a few times."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"
