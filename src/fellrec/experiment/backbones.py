"""Backbones that are built for a catalogue and cached: the pre-trained tiny language model, and SASRec."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress

from fellrec.config.instantiate import settings as settings_of
from fellrec.data.datamodule import FellrecDataModule
from fellrec.data.prepared import PreparedData
from fellrec.data.prompts import TEMPLATES
from fellrec.errors import BackboneError, ConfigError, SplitError
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.conversion import save_folder
from fellrec.models.module import Objective
from fellrec.models.pretrain import catalogue_tokens, pretrain
from fellrec.models.sasrec import build_sasrec
from fellrec.models.settings import HfSettings, SasrecSettings, TinySettings
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny
from fellrec.state.cache import is_intact, new_entry, writing_entry
from fellrec.terminal import console, tell
from fellrec.types import PUBLIC

T = TypeVar("T")

_FORMAT = 1
"""To be increased when pre-training changes, so that cached backbones of the old kind are not used."""


def tiny_backbone(
    cache: Path,
    settings: Mapping[str, Any],
    make_objective: Callable[[Backbone], Objective],
    data: PreparedData,
    dtype: str = HfSettings.dtype,
    client_cut: tuple[int, int] | None = None,
) -> Backbone:
    """Load the pre-trained tiny backbone from the cache, or pre-train it.

    Args:
        cache: Directory of backbones; each is an ordinary Hugging Face model directory.
        settings: All settings that affect it, as plain values: the ``backbone`` group under this name, and the groups
            that the objective is built from.
        make_objective: Builds the run's objective for a backbone.
        data: Catalogue and public users.
        dtype: Type of the loaded weights; they are trained and cached in float32.
        client_cut: Layers of head and tail, to load the client's part only; ``None`` for the whole model.
    """
    folder = cache / _key(settings, data)
    if not is_intact(folder):
        with new_entry(folder) as draft:
            _make(draft, settings["backbone"], make_objective, data)
    return replace(load_hf(str(folder), dtype, client_cut), name="tiny")  # not the folder's name, which is a hash


def sasrec_backbone(
    cache: Path,
    settings: Mapping[str, Any],
    data: PreparedData,
    dtype: str = HfSettings.dtype,
    client_cut: tuple[int, int] | None = None,
) -> Backbone:
    """Load the untrained SASRec backbone from the cache, or build it; other processes read it from there.

    Args:
        cache: As in `tiny_backbone`.
        settings: As in `tiny_backbone`.
        data: The catalogue.
        dtype: As in `tiny_backbone`.
        client_cut: As in `tiny_backbone`.

    Raises:
        ConfigError: If the objective's input is text: the model has a token for each item only.
        DataError: If an item id cannot be a token.
    """
    check_reads_items(settings["objective"])
    text = json.dumps([settings["backbone"], data.catalogue.item_ids, _FORMAT])
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not is_intact(folder):
        with new_entry(folder) as draft:
            _save(build_sasrec(data.catalogue.item_ids, _shape(SasrecSettings, settings["backbone"])), draft)
    return replace(load_hf(str(folder), dtype, client_cut), name="sasrec", is_pretrained=False)


def cached_backbone(cache: Path, key: str) -> Path:
    """The folder of a cached backbone that another process has made or loaded.

    Args:
        cache: As in `tiny_backbone`.
        key: Its name there: 16 hexadecimal digits.

    Raises:
        SplitError: If the key is not such a name.
        BackboneError: If this process's cache does not have it.
    """
    if not re.fullmatch("[0-9a-f]{16}", key):
        raise SplitError(f"Begin: {key[:100]!r} is not the name of a cached backbone")
    folder = cache / key
    if not is_intact(folder):
        raise BackboneError(f"{folder} is missing or damaged: the server needs the cache_dir of the client processes")
    return folder


def check_reads_items(objective: Mapping[str, Any]) -> None:
    """Check that an objective's inputs are item ids only, as a backbone without text requires.

    Args:
        objective: The ``objective`` group, plain values.

    Raises:
        ConfigError: If another field is used, or none.
    """
    fields = [objective.get(name) for name in ("history_fields", "item_fields")]
    if any(field != ["item_id"] for field in fields):
        raise ConfigError(
            f"backbone=sasrec has item tokens only, but objective.history_fields={fields[0]} and "
            f"objective.item_fields={fields[1]}; both must be [item_id], as with objective=items"
        )


def _shape(kind: type[T], group: Mapping[str, Any]) -> T:
    return settings_of(kind, {name: value for name, value in group.items() if name != "name"}, "backbone")


def _key(settings: Mapping[str, Any], data: PreparedData) -> str:
    """Hash of everything that affects the result: settings, texts of prompt and catalogue, public users' histories."""
    public = data.train.take((data.client_of_user < 0).nonzero()[0])
    digest = hashlib.sha256(json.dumps({**settings, "format": _FORMAT}, sort_keys=True).encode())
    digest.update("\n".join(data.catalogue.texts()).encode())
    digest.update(public.values.tobytes() + public.offsets.tobytes())
    digest.update(str(data.max_history).encode())
    template = TEMPLATES.get(settings["objective"].get("template"))
    if template is not None:
        digest.update(template.sha256.encode())
    return digest.hexdigest()[:16]


def _make(
    folder: Path, settings: Mapping[str, Any], make_objective: Callable[[Backbone], Objective], data: PreparedData
) -> None:
    texts = data.catalogue.texts()
    tiny = _shape(TinySettings, settings)
    how = tiny.pretrain
    backbone = build_tiny([f"{text}\n" for text in texts], tiny)
    model = SplitModel(backbone.model, 0, 0)
    objective = make_objective(backbone)
    objective.check(model)
    batches = FellrecDataModule(
        data,
        objective.collate,
        objective.one_target_per_row,
        batch_size=how.batch_size,
        eval_batch_size=how.batch_size,
        lengths=objective.lengths,
    )
    has_public_users = bool((data.client_of_user < 0).any())
    shown = console()
    if not shown.is_terminal:
        tell(f"pre-training the tiny backbone: {how.steps} steps, once for this data set")
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("pre-training the tiny backbone", total=how.steps)
        pretrain(
            model,
            objective,
            partial(batches.train_loader, PUBLIC) if has_public_users else None,
            catalogue_tokens(backbone.tokenizer, texts),
            how,
            tiny.seed,
            on_step=lambda loss: progress.advance(task),
        )
    _save(backbone, folder)


def _save(backbone: Backbone, folder: Path) -> None:
    with writing_entry(folder):
        save_folder(backbone.model, backbone.tokenizer, folder)
