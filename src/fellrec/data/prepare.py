"""Data preparation: read, filter, hold out, partition into clients, cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fellrec.data.clean import clean, sizes
from fellrec.data.filters import k_core, long_histories
from fellrec.data.guards import check_holdout
from fellrec.data.holdout import TEST, TRAIN, VALID, GivenSplit, GlobalTime, Holdout, check_times
from fellrec.data.partition import Partition, PartitionInput, by_size
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.schema import ITEMS, Catalogue, RawData, Reader
from fellrec.data.settings import DataSettings
from fellrec.data.statistics import STAGES, cut_ties, notes, statistics, tie_counts
from fellrec.errors import DataError
from fellrec.functional.rng import derive_seed, scramble
from fellrec.state.cache import is_intact, new_entry, writing_entry

_FORMAT = 2
"""Version of the preparation. Increment it when results change, to invalidate caches and older runs' data keys."""

_DESCRIBING = ("domain", "root", "expected")
"""Settings that do not change the data."""
_OF_KEYS: Mapping[tuple[str, Any], tuple[str, Any] | None] = {
    ("ties", "file"): ("tied_times", "file_order"),
    ("ties", "shuffle"): ("tied_times", "random"),
    ("on_missing_rating", "error"): None,
}
"""Settings as keys have them: data that were prepared before a setting was added or renamed keep their key."""
_RAGGED = ("histories", *STAGES)


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
        StorageError: If the cache cannot be written to.
    """
    key = _key(reader, settings, holdout, partition)
    if cache is None:
        data = _prepare(reader, settings, holdout, partition, key)
    elif is_intact(cache / key):
        data = _load(cache / key)
    else:
        with new_entry(cache / key) as draft:
            data = _prepare(reader, settings, holdout, partition, key)
            check_holdout(data)  # nothing that leaks is kept
            with writing_entry(cache / key):
                _save(data, draft)
    check_holdout(data)
    return data


def _key(reader: Reader, settings: DataSettings, holdout: Holdout, partition: Partition) -> str:
    parts = [
        _FORMAT,
        type(reader).__name__,
        reader.fingerprint(),
        _settings_of_key(settings),
        repr(holdout),
        repr(partition),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _settings_of_key(settings: DataSettings) -> list[tuple[str, Any]]:
    """The settings that change the data, by name."""
    names = [field.name for field in fields(DataSettings) if field.name not in _DESCRIBING]
    shaping = [(name, getattr(settings, name)) for name in names]
    return sorted(filter(None, (_OF_KEYS.get(item, item) for item in shaping)))


def _prepare(reader: Reader, settings: DataSettings, holdout: Holdout, partition: Partition, key: str) -> PreparedData:
    raw = reader.read()
    _check_holdout_fits(raw, holdout)
    cleaned = clean(raw, settings)
    kept = long_histories(k_core(cleaned.raw.interactions, settings.core), settings.min_user_interactions)
    found = _index(cleaned.raw, kept, settings)
    histories = found.histories
    stages = holdout.assign(histories, found.times) if found.stages is None else found.stages
    train, valid, test = (_take(histories, stages == stage) for stage in (TRAIN, VALID, TEST))
    is_public = _public(len(found.users), settings)
    valid, test = _without(valid, is_public), _without(test, is_public)
    client_of_user = _divide(partition, train, found.users, found.catalogue, is_public)
    data = PreparedData(
        name=settings.name or "data",
        catalogue=found.catalogue,
        users=found.users,
        histories=histories,
        train=train,
        valid=valid,
        test=test,
        train_targets=_train_targets(train, client_of_user, settings),
        client_of_user=client_of_user,
        num_clients=int(client_of_user.max()) + 1,
        max_history=settings.max_history,
        key=key,
        ranks_seen=settings.repeats == "keep",
    )
    _check_clients(data)
    counts = {
        **cleaned.counts,
        **{f"{name}_after_core": count for name, count in sizes(kept).items()},
        **{f"{name}_of_all_users": int((stages == stage).sum()) for stage, name in enumerate(STAGES)},
        **statistics(data),
        **tie_counts(histories, found.times, stages),
    }
    if isinstance(holdout, GlobalTime):
        counts["tied_at_cuts"] = cut_ties(found.times, stages)
    asked = getattr(partition, "num_clients", None)
    return replace(data, statistics=counts, notes=(*cleaned.notes, *notes(counts, settings, asked)))


def _check_holdout_fits(raw: RawData, holdout: Holdout) -> None:
    """Check that data that are split are not split again, and that a split over time has times, before any filter.

    Raises:
        DataError: If not.
    """
    times = raw.interactions["timestamp"]
    if "stage" in raw.interactions and not isinstance(holdout, GivenSplit):
        raise DataError(
            "the data set is split already (NAME.train.inter, NAME.valid.inter, NAME.test.inter): take this split "
            "with holdout=given, or join the files to NAME.inter for another"
        )
    if isinstance(holdout, GivenSplit) and raw.no_split:
        raise DataError(f"holdout=given needs a data set that is split, but {raw.no_split}")
    if isinstance(holdout, GlobalTime) and np.isfinite(times).all():
        check_times(pd.factorize(raw.interactions["user_id"])[0], times.to_numpy())


@dataclass(frozen=True)
class _Indexed:
    """Interactions by index, each user's oldest first; ``stages`` is ``None`` unless the data are split already."""

    catalogue: Catalogue
    users: pd.DataFrame
    histories: Ragged
    times: NDArray[np.float64]
    stages: IntArray | None


def _index(raw: RawData, kept: pd.DataFrame, settings: DataSettings) -> _Indexed:
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
    tie = np.zeros(len(kept), dtype=np.uint64)
    if settings.ties == "shuffle":
        tie = _random_keys(user_ids, user_codes, item_ids, item_codes, settings.seed)
    stage = kept["stage"].to_numpy(dtype=np.int64) if "stage" in kept else np.zeros(len(kept), dtype=np.int64)
    inside = user >= 0
    user, item, time, tie, stage = user[inside], item[inside], time[inside], tie[inside], stage[inside]
    order = np.lexsort((tie, time, stage, user))
    catalogue = Catalogue(
        item_ids=tuple(rated["item_id"]),
        titles=tuple(rated["title"]),
        attributes=rated.drop(columns=["item_id", "title"]),
    )
    histories = Ragged.from_pairs(user[order], item[order], len(users))
    return _Indexed(catalogue, users, histories, time[order], stage[order] if "stage" in kept else None)


def _random_keys(
    user_ids: pd.Index, user_codes: IntArray, item_ids: pd.Index, item_codes: IntArray, seed: int
) -> NDArray[np.uint64]:
    """``[n]``: keys to sort by, which depend on the ids and the seed only."""
    salt = np.array([derive_seed(seed, "tied_times")], dtype=np.uint64)
    users, items = (pd.util.hash_array(np.asarray(ids, dtype=object)) for ids in (user_ids, item_ids))
    return scramble(scramble(users + salt)[user_codes] ^ items[item_codes])


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
                "none); use fewer clients, another partition, data.min_user_interactions or more data"
            )


def _save(data: PreparedData, folder: Path) -> None:
    arrays = {
        f"{name}_{part}": getattr(getattr(data, name), part) for name in _RAGGED for part in ("values", "offsets")
    }
    items = pd.DataFrame({"item_id": data.catalogue.item_ids, "title": data.catalogue.titles})
    scalars = {name: getattr(data, name) for name in ("name", "num_clients", "max_history", "key", "ranks_seen")}
    np.savez(folder / "arrays.npz", train_targets=data.train_targets, client_of_user=data.client_of_user, **arrays)
    pd.concat([items, data.catalogue.attributes], axis=1).to_parquet(folder / ITEMS, index=False)
    data.users.to_parquet(folder / "users.parquet", index=False)
    (folder / "data.json").write_text(json.dumps({**scalars, "statistics": dict(data.statistics), "notes": data.notes}))


def _load(folder: Path) -> PreparedData:
    scalars = json.loads((folder / "data.json").read_text())
    scalars["notes"] = tuple(scalars["notes"])
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        histories, train, valid, test = (
            Ragged(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in _RAGGED
        )
        train_targets, client_of_user = arrays["train_targets"], arrays["client_of_user"]
    return PreparedData(
        catalogue=Catalogue.read(folder / ITEMS),
        users=pd.read_parquet(folder / "users.parquet"),
        train_targets=train_targets,
        client_of_user=client_of_user,
        histories=histories,
        train=train,
        valid=valid,
        test=test,
        **scalars,
    )
