"""Preparation of data: clients' users, public users, samples and cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fellrec.data.datamodule import FellrecDataModule, evaluated_users
from fellrec.data.holdout import LeaveOneOut
from fellrec.data.partition import KMeansPartition, PerUserPartition, RandomPartition
from fellrec.data.prepare import prepare
from fellrec.data.prepared import PreparedData
from fellrec.data.readers import SyntheticReader
from fellrec.data.schema import RawData
from fellrec.data.settings import DataSettings
from fellrec.errors import DataError
from fellrec.functional.ranking import ranking_metrics, target_ranks
from fellrec.rankers.reference import reference_rankers
from fellrec.rankers.settings import ReferenceSettings
from fellrec.types import PUBLIC

SHAPED = {"preset": "micro_lens_shaped", "mean_length": 7.19405, "habit_rate": 0.35, "random_rate": 0.15}
READER = SyntheticReader(num_users=200, num_items=80, mean_length=15)
SETTINGS = DataSettings("synthetic", root=None)


def make(settings: DataSettings = SETTINGS, reader: object = READER, cache: Path | None = None) -> PreparedData:
    return prepare(reader, settings, LeaveOneOut(), KMeansPartition(num_clients=4), cache)  # type: ignore[arg-type]


def same(left: PreparedData, right: PreparedData) -> bool:
    return (
        all(
            np.array_equal(getattr(getattr(left, name), part), getattr(getattr(right, name), part))
            for name in ("train", "valid", "test")
            for part in ("values", "offsets")
        )
        and np.array_equal(left.client_of_user, right.client_of_user)
        and np.array_equal(left.train_targets, right.train_targets)
        and left.catalogue.titles == right.catalogue.titles
    )


def test_every_interaction_is_in_exactly_one_stage() -> None:
    data, raw = make(), READER.read()
    joined = data.train.join(data.valid).join(data.test)
    private = data.client_of_user >= 0
    by_user = raw.interactions.sort_values("timestamp").groupby("user_id")["item_id"].apply(list)
    for user in np.flatnonzero(private)[:50]:
        got = [data.catalogue.item_ids[item] for item in joined.row(user)]
        assert got == by_user[data.users["user_id"][user]]


def test_public_users_are_in_no_client_and_no_evaluation() -> None:
    data = make()
    public = data.client_of_user < 0
    assert public.sum() == 40 == data.statistics["public_users"]
    assert data.valid.lengths[public].sum() == data.test.lengths[public].sum() == 0
    assert not set(evaluated_users(data, "test")) & set(np.flatnonzero(public))
    module = FellrecDataModule(data, lambda items, is_target: {"items": items}, batch_size=1000, eval_batch_size=1000)
    train_items = sum(int(data.train.lengths[user]) for user in np.flatnonzero(~public))
    assert module.num_samples(None) == train_items - (~public).sum()
    assert sum(module.num_samples(client) for client in range(4)) == module.num_samples(None)


@pytest.mark.parametrize("one_target_per_row", [False, True])
def test_public_users_are_trained_on_where_that_is_asked_for(one_target_per_row: bool) -> None:
    """All of their items but each user's first are targets, also where the clients have few."""
    for limit in (None, 50):
        data = make(dataclasses.replace(SETTINGS, max_train_samples=limit))
        collate = lambda items, is_target: {"targets": items[is_target]}  # noqa: E731
        module = FellrecDataModule(data, collate, one_target_per_row, batch_size=64, eval_batch_size=64)
        users = np.flatnonzero(data.client_of_user < 0)
        expected = sorted(item for user in users for item in data.train.row(user)[1:].tolist())
        batches = list(module.train_loader(PUBLIC, seed=0))
        assert sorted(item for batch in batches for item in batch["targets"].tolist()) == expected
        assert (module.num_samples(PUBLIC), module.num_batches(PUBLIC)) == (len(expected), len(batches))


def test_no_target_is_in_its_own_history() -> None:
    data = make()
    module = FellrecDataModule(data, lambda items, is_target: {}, batch_size=8, eval_batch_size=64)
    for stage, targets in (("val", data.valid), ("test", data.test)):
        for batch in module.eval_loader(stage):
            masked = set(zip(batch["masked_rows"].tolist(), batch["masked_items"].tolist()))
            wanted = list(zip(batch["target_rows"].tolist(), batch["target_items"].tolist()))
            assert not masked & set(wanted)
            assert [item for _, item in wanted] == targets.take(batch["users"].numpy()).values.tolist()
            assert (batch["histories"][:, 0] >= 0).all()


def test_test_histories_contain_the_validation_targets_and_validation_histories_do_not() -> None:
    data = make()
    module = FellrecDataModule(data, lambda items, is_target: {}, batch_size=8, eval_batch_size=1000)
    val, test = next(iter(module.eval_loader("val"))), next(iter(module.eval_loader("test")))
    newest = test["histories"].gather(1, ((test["histories"] >= 0).sum(1) - 1)[:, None])[:, 0]
    of_user = dict(zip(val["users"].tolist(), val["target_items"].tolist(), strict=True))
    assert dict(zip(test["users"].tolist(), newest.tolist(), strict=True)) == of_user


def test_max_train_samples_is_the_number_of_the_clients_training_targets() -> None:
    data = make(dataclasses.replace(SETTINGS, max_train_samples=100))
    assert data.train_targets.sum() == 100
    assert (data.client_of_user[data.train.row_index[data.train_targets]] >= 0).all()
    assert (data.train.positions[data.train_targets] > 0).all()


def test_max_users_does_not_change_the_catalogue() -> None:
    data = make(dataclasses.replace(SETTINGS, max_users=50))
    assert len(data.users) == 50
    assert len(data.catalogue) == len(make().catalogue)


@pytest.mark.parametrize(
    "change",
    [{"core": 2}, {"max_history": 5}, {"max_train_samples": 99}, {"max_users": 99}, {"seed": 1}, {"name": "x"}],
)
def test_the_key_depends_on_every_setting(change: dict[str, object]) -> None:
    assert make(dataclasses.replace(SETTINGS, **change)).key != make().key  # type: ignore[arg-type]


def test_cached_data_equal_fresh_data_and_a_damaged_cache_is_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh, cached = make(cache=tmp_path), make(cache=tmp_path)
    assert same(fresh, cached)
    assert cached.statistics == fresh.statistics
    (tmp_path / fresh.key / "arrays.npz").write_bytes(b"broken")
    with caplog.at_level("WARNING"):
        assert same(make(cache=tmp_path), fresh)
    assert "damaged" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [fresh.key]


def test_the_order_of_the_file_does_not_matter_if_timestamps_differ() -> None:
    class Shuffled:
        def read(self) -> RawData:
            raw = READER.read()
            order = np.random.default_rng(1).permutation(len(raw.interactions))
            return dataclasses.replace(raw, interactions=raw.interactions.iloc[order].reset_index(drop=True))

        def fingerprint(self) -> str:
            return "shuffled"

    assert same(make(reader=Shuffled()), make())


def test_a_client_without_validation_targets_is_refused() -> None:
    class Short:
        def read(self) -> RawData:
            raw = READER.read()
            kept = raw.interactions.groupby("user_id").head(2).reset_index(drop=True)
            return dataclasses.replace(raw, interactions=kept)

        def fingerprint(self) -> str:
            return "short"

    with pytest.raises(DataError, match=r"client 0 has no validation target \(4 of 4 clients have none\)"):
        prepare(Short(), SETTINGS, LeaveOneOut(), RandomPartition(num_clients=4), None)


def test_users_with_few_interactions_are_left_out() -> None:
    lengths = READER.read().interactions["user_id"].value_counts()
    data = make(dataclasses.replace(SETTINGS, min_user_interactions=14))
    assert sorted(data.users["user_id"]) == sorted(lengths.index[lengths >= 14])
    with pytest.raises(DataError, match="data.min_user_interactions=99 leaves no interactions"):
        make(dataclasses.replace(SETTINGS, min_user_interactions=99))


def test_counts_of_stages_are_those_of_the_clients_users() -> None:
    statistics = make().statistics
    assert (statistics["valid"], statistics["test"], statistics["public_users"]) == (160, 160, 40)
    assert (statistics["valid_of_all_users"], statistics["test_of_all_users"]) == (200, 200)
    assert statistics["train"] + statistics["public_train"] == statistics["train_of_all_users"]


def test_one_client_per_user() -> None:
    data = prepare(READER, SETTINGS, LeaveOneOut(), PerUserPartition(), None)
    assert data.num_clients == 160
    assert np.bincount(data.client_of_user[data.client_of_user >= 0]).tolist() == [1] * 160


def ndcg(data: PreparedData, name: str) -> float:
    settings = ReferenceSettings(show=[name])
    ranker = reference_rankers(data.train, data.client_of_user, len(data.catalogue), settings, seed=0)[name]
    module = FellrecDataModule(data, lambda items, is_target: {}, batch_size=8, eval_batch_size=10_000)
    batch = next(iter(module.eval_loader("test")))
    ranks = target_ranks(
        ranker.scores(batch["histories"]),
        batch["target_rows"],
        batch["target_items"],
        batch["masked_rows"],
        batch["masked_items"],
    )
    return float(ranking_metrics(ranks, batch["target_rows"], len(batch["users"]), [10])["ndcg_at_10"].mean())


def test_markov_beats_popularity_on_the_synthetic_data() -> None:
    data = prepare(SyntheticReader(), SETTINGS, LeaveOneOut(), KMeansPartition(), None)
    assert ndcg(data, "random") < ndcg(data, "popularity") < 0.5 * ndcg(data, "markov")
    assert pd.Series(data.catalogue.titles).is_unique
    sizes = data.statistics["users_per_client"]
    assert max(sizes) > 1.5 * min(sizes)


def test_markov_beats_popularity_on_the_micro_lens_shaped_data_but_is_far_from_perfect() -> None:
    """35 % of the steps follow a fixed transition; less than half of the others are predictable."""
    data = prepare(
        SyntheticReader(num_users=3000, num_items=None, **SHAPED), SETTINGS, LeaveOneOut(), KMeansPartition(), None
    )
    assert 2 * ndcg(data, "random") < ndcg(data, "popularity") < 0.5 * ndcg(data, "markov")
    assert 0.2 < ndcg(data, "markov") < 0.5


@pytest.mark.parametrize(
    "reader",
    [
        SyntheticReader(num_users=1500, num_items=60, mean_length=20, num_groups=2),
        SyntheticReader(num_users=6000, num_items=60, num_groups=2, **SHAPED),
    ],
    ids=["synthetic", "micro_lens_shaped"],
)
def test_planted_groups_have_different_transitions(reader: SyntheticReader) -> None:
    """The most frequent successor of an item differs between groups for about half of the items."""
    raw = reader.read()
    joined = raw.interactions.merge(raw.users, on="user_id").sort_values(["user_id", "timestamp"])
    joined["next"] = joined.groupby("user_id")["item_id"].shift(-1)
    common = joined.dropna().groupby(["group", "item_id"])["next"].agg(lambda films: films.value_counts().index[0])
    first, second = (common[name] for name in ("group0", "group1"))
    in_both = first.index.intersection(second.index)
    assert 0.3 < float((first[in_both] == second[in_both]).mean()) < 0.7
