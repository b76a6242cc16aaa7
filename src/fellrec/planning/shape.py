"""Builds a backbone without weights, on PyTorch's ``meta`` device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fellrec.config.instantiate import as_dict
from fellrec.config.instantiate import settings as settings_of
from fellrec.config.paths import conf_dir
from fellrec.data.schema import Catalogue
from fellrec.errors import BackboneError, ConfigError, unknown
from fellrec.experiment.backbones import check_reads_items
from fellrec.experiment.build import backbone_path
from fellrec.experiment.precision import weights_dtype
from fellrec.models.architectures import arch_of
from fellrec.models.backbone import Backbone, check_tokenizer, dtype_of, load_shape
from fellrec.models.hf_folder import config_of, empty_model, read_tokenizer
from fellrec.models.sasrec import item_tokenizer, sasrec_config
from fellrec.models.settings import SasrecSettings, TinySettings
from fellrec.models.tiny import build_tokenizer, tiny_config
from fellrec.state.nearest import similar

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def has_weights(config: DictConfig) -> bool:
    """Whether the configured backbone has weights, so that it can be trained.

    Raises:
        ConfigError: If the backbone has neither ``path`` nor ``config``, or both.
    """
    if config.backbone.name != "hf":
        return True
    has_path = not OmegaConf.is_missing(config.backbone, "path")
    if has_path and config.backbone.config is not None:
        raise ConfigError(
            f"backbone.path={config.backbone.path} and backbone.config={config.backbone.config} exclude each other; "
            "give one of them"
        )
    if not has_path and config.backbone.config is None:
        raise ConfigError(
            "backbone.path needs a value: give backbone.path=…, or backbone.config=… to plan for a model without its "
            f"weights: {', '.join(model_configs())}, a config.json, or a directory with one"
        )
    return has_path


def empty_backbone(config: DictConfig, catalogue: Catalogue) -> tuple[Backbone, bool]:
    """The configured backbone on the ``meta`` device.

    Args:
        config: The whole configuration.
        catalogue: Texts to train the tokenizer of the tiny backbone, or of a backbone without tokenizer files.

    Returns:
        The backbone, and whether its tokenizer is the original one.

    Raises:
        ConfigError: If the backbone's name or sizes are not allowed.
        BackboneError: If its configuration cannot be read or its architecture is not supported.
    """
    settings, dtype = as_dict(config.backbone), dtype_of(weights_dtype(config))
    sizes = {name: value for name, value in settings.items() if name != "name"}
    if settings["name"] == "tiny":
        tiny = settings_of(TinySettings, sizes, "backbone")
        tokenizer = _catalogue_tokenizer(catalogue, tiny.vocab_size)
        return _on_meta(tiny_config(tokenizer, tiny), dtype, tokenizer, "tiny"), True
    if settings["name"] == "sasrec":
        check_reads_items(as_dict(config.objective))
        tokenizer = item_tokenizer(catalogue.item_ids)
        sasrec = settings_of(SasrecSettings, sizes, "backbone")
        return _on_meta(sasrec_config(tokenizer, sasrec), dtype, tokenizer, "sasrec"), True
    if has_weights(config):
        path, short = backbone_path(config)
        shape, tokenizer = load_shape(path)
        backbone, is_own = _on_meta(shape, dtype, tokenizer, short or Path(path).name), True
    else:
        file = find_config(str(settings["config"]))
        shape = read_config(file)
        own = _tokenizer_beside(file)
        is_own, tokenizer = own is not None, own or _catalogue_tokenizer(catalogue)
        name = file.parent.name if file.name == "config.json" else file.stem
        backbone = _on_meta(shape, dtype, tokenizer, name)
    if is_own:
        check_tokenizer(f"backbone={backbone.name}", backbone.tokenizer, backbone.model)
    return backbone, is_own


def find_config(given: str) -> Path:
    """Resolve ``backbone.config``: a file, a directory with a ``config.json``, or a name in `model_configs`.

    Raises:
        ConfigError: If there is no such file; lists the included configurations, the nearest name first.
    """
    path = Path(given).expanduser()
    for candidate in (path, path / "config.json", _configs_dir() / f"{given}.json"):
        if candidate.is_file():
            return candidate
    names = unknown("backbone.config", given, model_configs())
    raise ConfigError(f"{names}, a config.json, or a directory with one{similar(path)}")


def model_configs() -> list[str]:
    """Names of the included model configurations."""
    return sorted(path.stem for path in _configs_dir().glob("*.json"))


def read_config(file: Path) -> Any:
    """Read a Hugging Face configuration from its ``config.json``.

    Raises:
        BackboneError: If the file is not a valid configuration, or its architecture is not supported.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"backbone.config={file} is not valid JSON: {error}") from error
    return config_of(f"backbone.config={file}", values)


def _configs_dir() -> Path:
    return conf_dir() / "model_configs"


def _on_meta(shape: Any, dtype: torch.dtype, tokenizer: Any, name: str) -> Backbone:
    return Backbone(empty_model(f"backbone={name}", shape, dtype), tokenizer, arch_of(shape), name)


def _catalogue_tokenizer(catalogue: Catalogue, vocab_size: int = 4000) -> Any:
    """Train the tokenizer of the tiny backbone on the catalogue."""
    return build_tokenizer([f"{text}\n" for text in catalogue.texts()], vocab_size)


def _tokenizer_beside(file: Path) -> Any | None:
    if not any((file.parent / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return read_tokenizer(f"backbone.config={file}", str(file.parent))
