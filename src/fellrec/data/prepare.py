"""Data preparation: read, filter, hold out, partition into clients, cache."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fellrec.data.filters import k_core
from fellrec.data.guards import check_holdout
from fellrec.data.holdout import TEST, TRAIN, VALID, Holdout
from fellrec.data.partition import Partition, PartitionInput, by_size
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.schema import Catalogue, RawData, Reader, clean
from fellrec.data.settings import DataSettings
from fellrec.errors import DataError
from fellrec.functional.rng import derive_seed
from fellrec.state.files import new_folder

log = logging.getLogger(__name__)

_FORMAT = 1
"""Version of the preparation. Increment it when results change, to invalidate caches and older runs' data keys."""

_DESCRIBING = ("domain", "root", "expected")
"""Settings that do not change the data."""
_STAGES = ("train", "valid", "test")
_RAGGED = ("histories", *_STAGES)


def prepare(
    reader: Reader, settings: DataSettings, holdout: Holdout, partition: Partition, cache: Path | None
) -> PreparedData:
    """Prepare a data set, or load it from the cache.

    Args:
        reader: Source of the data.
        settings: Filters and samples.
        holdout: Assigns interactions to training, validation and test.
        partition: Assigns users to clients.
        cache: Folder of prepared data sets; ``None`` disables the cache.

    Raises:
        DataError: If the data are invalid.
        LeakError: If held-out interactions are in the training data.
        ConfigError: If a setting does not fit the data.
    """
    key = _key(reader, settings, holdout, partition)
    if cache is not None and (cache / key).is_dir():
        try:
            data = _load(cache / key)
            check_holdout(data)
            return data
        except (OSError, ValueError, KeyError) as error:
            log.warning("cached data in %s are damaged or incomplete (%s); preparing them again", cache / key, error)
            shutil.rmtree(cache / key)
    data = _prepare(reader, settings, holdout, partition, key)
    check_holdout(data)
    if cache is not None:
        _save(data, cache / key)
    return data


def _key(reader: Reader, settings: DataSettings, holdout: Holdout, partition: Partition) -> str:
    parts = [
        _FORMAT,
        type(reader).__name__,
        reader.fingerprint(),
        sorted(item for item in asdict(settings).items() if item[0] not in _DESCRIBING),
        repr(holdout),
        repr(partition),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _prepare(reader: Reader, settings: DataSettings, holdout: Holdout, partition: Partition, key: str) -> PreparedData:
    raw, num_duplicates = clean(reader.read(), settings.on_empty_title)
    counts = {f"{name}_as_read": count for name, count in _counts(raw.interactions).items()}
    kept = k_core(raw.interactions, settings.core)
    filtered = {f"{name}_after_core": count for name, count in _counts(kept).items()}
    catalogue, users, histories, times = _index(raw, kept, settings)
    stages = holdout.assign(histories, times)
    train, valid, test = (_take(histories, stages == stage) for stage in (TRAIN, VALID, TEST))
    is_public = _public(len(users), settings)
    valid, test = _without(valid, is_public), _without(test, is_public)
    client_of_user = _divide(partition, train, users, catalogue, is_public)
    data = PreparedData(
        name=settings.name,
        catalogue=catalogue,
        users=users,
        histories=histories,
        train=train,
        valid=valid,
        test=test,
        train_targets=_train_targets(train, client_of_user, settings),
        client_of_user=client_of_user,
        num_clients=int(client_of_user.max()) + 1,
        max_history=settings.max_history,
        key=key,
    )
    _check_clients(data)
    stage_counts = {name: int((stages == stage).sum()) for stage, name in enumerate(_STAGES)}
    statistics = {**counts, "duplicates_dropped": num_duplicates, **filtered, **stage_counts, **_statistics(data)}
    return replace(data, statistics=statistics)


def _counts(interactions: pd.DataFrame) -> dict[str, int]:
    return {
        "users": int(interactions["user_id"].nunique()),
        "items": int(interactions["item_id"].nunique()),
        "interactions": len(interactions),
    }


def _index(
    raw: RawData, kept: pd.DataFrame, settings: DataSettings
) -> tuple[Catalogue, pd.DataFrame, Ragged, NDArray[np.float64]]:
    """Map ids to indices in the order of the item and user files; sort each user's interactions by time."""
    item_codes, item_ids = pd.factorize(kept["item_id"])  # look up each distinct id once instead of each interaction
    user_codes, user_ids = pd.factorize(kept["user_id"])
    rated = raw.items[raw.items["item_id"].isin(item_ids)].reset_index(drop=True)
    users = raw.users[raw.users["user_id"].isin(user_ids)].reset_index(drop=True)
    if settings.max_users is not None and settings.max_users < len(users):
        generator = np.random.default_rng(derive_seed(settings.seed, "max_users"))
        chosen = np.sort(generator.choice(len(users), size=settings.max_users, replace=False))
        users = users.iloc[chosen].reset_index(drop=True)
    item = pd.Index(rated["item_id"]).get_indexer(pd.Index(item_ids))[item_codes]
    user = pd.Index(users["user_id"]).get_indexer(pd.Index(user_ids))[user_codes]
    time = kept["timestamp"].to_numpy(dtype=np.float64)
    inside = user >= 0
    user, item, time = user[inside], item[inside], time[inside]
    order = np.lexsort((time, user))
    catalogue = Catalogue(
        item_ids=tuple(rated["item_id"]),
        titles=tuple(rated["title"]),
        attributes=rated.drop(columns=["item_id", "title"]),
    )
    return catalogue, users, Ragged.from_pairs(user[order], item[order], len(users)), time[order]


def _take(histories: Ragged, chosen: NDArray[np.bool_]) -> Ragged:
    return Ragged.from_pairs(histories.row_index[chosen], histories.values[chosen], len(histories))


def _without(targets: Ragged, rows: NDArray[np.bool_]) -> Ragged:
    return _take(targets, ~rows[targets.row_index])


def _public(num_users: int, settings: DataSettings) -> NDArray[np.bool_]:
    generator = np.random.default_rng(derive_seed(settings.seed, "public"))
    is_public = np.zeros(num_users, dtype=bool)
    is_public[generator.permutation(num_users)[: round(settings.public_user_rate * num_users)]] = True
    return is_public


def _divide(
    partition: Partition, train: Ragged, users: pd.DataFrame, catalogue: Catalogue, is_public: NDArray[np.bool_]
) -> IntArray:
    private = np.flatnonzero(~is_public)
    if len(private) == 0:
        raise DataError("all users are public, none is left for the clients; lower data.public_user_rate")
    given = PartitionInput(train.take(private), users.iloc[private].reset_index(drop=True), catalogue)
    client_of_user = np.full(len(users), -1, dtype=np.int64)
    client_of_user[private] = by_size(partition.assign(given))
    return client_of_user


def _train_targets(train: Ragged, client_of_user: IntArray, settings: DataSettings) -> NDArray[np.bool_]:
    possible = train.positions > 0
    if settings.max_train_samples is None:
        return possible
    candidates = np.flatnonzero(possible & (client_of_user[train.row_index] >= 0))
    generator = np.random.default_rng(derive_seed(settings.seed, "max_train_samples"))
    targets = np.zeros(len(possible), dtype=bool)
    targets[generator.permutation(candidates)[: settings.max_train_samples]] = True
    return targets


def _check_clients(data: PreparedData) -> None:
    """Check that every client has training, validation and test targets.

    Raises:
        DataError: If one has not. Gives the first such client and their number.
    """
    owner = data.client_of_user
    targets = Ragged(data.train_targets.astype(np.int64), data.train.offsets)
    num_targets = np.bincount(targets.row_index, weights=targets.values, minlength=len(owner))
    for what, per_user in (("training", num_targets), ("validation", data.valid.lengths), ("test", data.test.lengths)):
        private = owner >= 0
        having = np.bincount(owner[private], weights=per_user[private] > 0, minlength=data.num_clients)
        if (having == 0).any():
            first = int((having == 0).argmax())
            raise DataError(
                f"client {first} has no {what} target ({int((having == 0).sum())} of {data.num_clients} clients have "
                "none); use fewer clients, another partition or more data"
            )


def _statistics(data: PreparedData) -> dict[str, Any]:
    owner, catalogue = data.client_of_user, data.catalogue
    private = owner >= 0
    seen = np.zeros(len(catalogue), dtype=bool)
    seen[data.train.values] = True
    num_targets = np.bincount(data.train.row_index, weights=data.train_targets, minlength=len(owner))
    num_interactions = int(sum(len(getattr(data, name).values) for name in _STAGES))
    return {
        "users": len(owner),
        "public_users": int((~private).sum()),
        "items": len(catalogue),
        "density": num_interactions / (len(owner) * len(catalogue)),
        "distinct_titles": int(catalogue.title_groups.max()) + 1,
        "words_per_title": float(np.mean([len(title.split()) for title in catalogue.titles])),
        "clients": data.num_clients,
        "users_per_client": np.bincount(owner[private], minlength=data.num_clients).tolist(),
        "train_targets_per_client": np.bincount(
            owner[private], weights=num_targets[private], minlength=data.num_clients
        )
        .astype(int)
        .tolist(),
        "evaluated_users": int(((data.test.lengths > 0) & private).sum()),
        "users_too_short_to_test": int(((data.test.lengths == 0) & private).sum()),
        "users_without_training": int((private & (data.train.lengths == 0)).sum()),
        "test_targets_never_trained_on": int((~seen[data.test.values]).sum()),
    }


def _save(data: PreparedData, folder: Path) -> None:
    arrays = {
        f"{name}_{part}": getattr(getattr(data, name), part) for name in _RAGGED for part in ("values", "offsets")
    }
    items = pd.DataFrame({"item_id": data.catalogue.item_ids, "title": data.catalogue.titles})
    scalars = {name: getattr(data, name) for name in ("name", "num_clients", "max_history", "key")}
    with new_folder(folder) as draft:
        np.savez(draft / "arrays.npz", train_targets=data.train_targets, client_of_user=data.client_of_user, **arrays)
        pd.concat([items, data.catalogue.attributes], axis=1).to_parquet(draft / "items.parquet", index=False)
        data.users.to_parquet(draft / "users.parquet", index=False)
        (draft / "data.json").write_text(json.dumps({**scalars, "statistics": dict(data.statistics)}))


def _load(folder: Path) -> PreparedData:
    scalars = json.loads((folder / "data.json").read_text())
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        histories, train, valid, test = (
            Ragged(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in _RAGGED
        )
        train_targets, client_of_user = arrays["train_targets"], arrays["client_of_user"]
    items = pd.read_parquet(folder / "items.parquet")
    return PreparedData(
        catalogue=Catalogue(tuple(items["item_id"]), tuple(items["title"]), items.drop(columns=["item_id", "title"])),
        users=pd.read_parquet(folder / "users.parquet"),
        train_targets=train_targets,
        client_of_user=client_of_user,
        histories=histories,
        train=train,
        valid=valid,
        test=test,
        **scalars,
    )
