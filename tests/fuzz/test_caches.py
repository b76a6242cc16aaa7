"""Damaged entries of the cache: the data and the backbone are those of an intact one, made again where that is needed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.mutations import damaged, inputs
from fuzz.outcomes import OK, Outcomes

from fellrec.config.compose import compose
from fellrec.data.prepared import PreparedData
from fellrec.experiment.build import build_backbone, build_data

SMALL = (
    "data.reader.num_users=40", "data.reader.num_items=20", "data.reader.mean_length=8", "partition=random",
    "partition.num_clients=2", "trainer.cutoffs=[5]", "trainer.metric=ndcg_at_5",
)  # fmt: skip
SASREC = (
    "backbone=sasrec",
    "objective=items",
    "backbone.hidden_size=8",
    "backbone.num_layers=2",
    "split.head_layers=0",
)


def damage(entry: Path, other: Path, source: random.Random) -> None:
    """Change a file of an entry, or which files it has."""
    file = source.choice(sorted(entry.iterdir()))
    action = source.random()
    if action < 0.7:
        file.write_bytes(damaged(file.read_bytes(), source))
    elif action < 0.75:
        file.unlink()
    elif action < 0.8:
        file.unlink()
        file.symlink_to(other / file.name)
    elif action < 0.85:
        file.unlink()
        os.mkfifo(file)
    elif action < 0.9:
        shutil.copy(other / file.name, file)  # whole, of other data
    elif action < 0.95:
        shutil.rmtree(entry)
        shutil.copytree(other, entry)
    else:
        (entry / "added.json").write_text("{}")


def same(left: PreparedData, right: PreparedData) -> bool:
    ragged = ("histories", "train", "valid", "test")
    arrays = [(getattr(left, n).values, getattr(right, n).values) for n in ragged]
    arrays += [(getattr(left, n).offsets, getattr(right, n).offsets) for n in ragged]
    arrays += [(left.train_targets, right.train_targets), (left.client_of_user, right.client_of_user)]
    scalars = ("name", "num_clients", "max_history", "key")
    return (
        all(np.array_equal(a, b) for a, b in arrays)
        and all(getattr(left, name) == getattr(right, name) for name in scalars)
        and (left.catalogue.item_ids, left.catalogue.titles) == (right.catalogue.item_ids, right.catalogue.titles)
        and left.catalogue.attributes.equals(right.catalogue.attributes)
        and left.users.equals(right.users)
        and dict(left.statistics) == dict(right.statistics)
    )


def run(tmp_path: Path, kind: str, count: int, is_right: Callable[[], bool], make_other: Callable[[], object]) -> None:
    """Damage the only entry of a cache again and again; what is loaded must always be right."""
    folder = tmp_path / "cache" / kind
    assert is_right()
    (entry,) = folder.iterdir()
    make_other()
    (other,) = {*folder.iterdir()} - {entry}
    whole = tmp_path / "whole"
    shutil.copytree(entry, whole)
    with Outcomes(f"cache, {kind}", seconds=60) as outcomes:
        for source in inputs(count):
            damage(entry, other, source)
            outcomes.of(is_right, source, lambda right: OK if right else "other content")
            assert not list(folder.glob(".*")), "no draft is left"
            shutil.rmtree(entry)
            shutil.copytree(whole, entry)
    assert outcomes.found.keys() == {OK}


def test_prepared_data_are_right_whatever_happened_to_the_cache(tmp_path: Path) -> None:
    config = compose([*SMALL, f"cache_dir={tmp_path / 'cache'}"])
    expected = build_data(compose([*SMALL, f"cache_dir={tmp_path / 'elsewhere'}"]))
    other = compose([*SMALL, "data.reader.seed=1", f"cache_dir={tmp_path / 'cache'}"])
    run(tmp_path, "data", 60, lambda: same(build_data(config), expected), lambda: build_data(other))


def test_backbones_are_right_whatever_happened_to_the_cache(tmp_path: Path) -> None:
    config = compose([*SMALL, *SASREC, f"cache_dir={tmp_path / 'cache'}"])
    other = compose([*SMALL, *SASREC, "backbone.seed=1", f"cache_dir={tmp_path / 'cache'}"])
    data = build_data(config)
    expected = build_backbone(compose([*SMALL, *SASREC, f"cache_dir={tmp_path / 'elsewhere'}"]), data)
    weights = expected.model.state_dict()

    def is_right() -> bool:
        found = build_backbone(config, data)
        own = found.model.state_dict()
        has_weights = own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in weights)
        return has_weights and found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()

    run(tmp_path, "backbones", 25, is_right, lambda: build_backbone(other, data))


@pytest.mark.parametrize("change", ["other owner", "writable"])
def test_an_entry_that_others_could_change_is_made_again(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*SMALL, f"cache_dir={tmp_path}"])
    expected = build_data(config)
    (entry,) = (tmp_path / "data").iterdir()
    if change == "writable":
        (entry / "arrays.npz").chmod(0o666)
    elif os.getuid() == 0:
        os.chown(entry / "arrays.npz", 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    caplog.clear()
    assert same(build_data(config), expected)
    assert "belongs to another user, or others can write to it" in caplog.text
