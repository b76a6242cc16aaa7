"""Each leak check detects a constructed leak, reports its place, and accepts valid data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fellrec.cli.evaluate import evaluate
from fellrec.config.compose import compose
from fellrec.data.datamodule import FellrecDataModule, _Users, evaluated_users
from fellrec.data.guards import check_batch, check_holdout, check_prompts, check_view
from fellrec.data.holdout import TRAIN, LeaveOneOut
from fellrec.data.partition import RandomPartition
from fellrec.data.prepare import prepare
from fellrec.data.prepared import PreparedData
from fellrec.data.prompts import prompt_template
from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.readers import SyntheticReader
from fellrec.data.settings import DataSettings
from fellrec.errors import ConfigError, DataError, LeakError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.experiment.run import Run
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.settings import GenerativeSettings
from fellrec.state.cache import new_entry

READER = SyntheticReader(num_users=60, num_items=40, mean_length=10)


def made(holdout: Any = None) -> PreparedData:
    return prepare(READER, DataSettings("synthetic", root=None), holdout or LeaveOneOut(), RandomPartition(3), None)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return made()


@pytest.fixture(scope="module")
def victim(data: PreparedData) -> int:
    return int(np.flatnonzero((data.client_of_user >= 0) & (data.valid.lengths > 0))[7])


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [ragged.row(row).tolist() for row in range(len(ragged))]


def changed(ragged: Ragged, row: int, values: list[int]) -> Ragged:
    return Ragged.from_rows([values if number == row else old for number, old in enumerate(rows_of(ragged))])


def names(data: PreparedData, user: int, item: int) -> str:
    return f"item {data.catalogue.item_ids[item]!r} of user {data.users['user_id'][user]!r}"


def test_valid_data_pass(data: PreparedData) -> None:
    check_holdout(data)
    module = FellrecDataModule(data, lambda items, is_target: {}, batch_size=8, eval_batch_size=256)
    for stage in ("val", "test"):
        for batch in module.eval_loader(stage):
            check_batch(batch, len(data.catalogue))
    assert issubclass(LeakError, DataError)


@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize("position", [0, 2, 99])
def test_a_held_out_interaction_in_training_is_refused(
    data: PreparedData, victim: int, stage: str, position: int
) -> None:
    item = int(getattr(data, stage).row(victim)[0])
    row = data.train.row(victim).tolist()
    row.insert(position, item)
    leaky = dataclasses.replace(data, train=changed(data.train, victim, row))
    with pytest.raises(LeakError) as caught:
        check_holdout(leaky)
    assert "of 1 users in training, validation and test are duplicated or not in the order of the history" in str(
        caught.value
    )
    assert names(data, victim, item) in str(caught.value)


def test_a_training_interaction_replaced_by_a_held_out_one_is_refused(data: PreparedData, victim: int) -> None:
    item = int(data.test.row(victim)[0])
    leaky = dataclasses.replace(data, train=changed(data.train, victim, [item, *data.train.row(victim)[1:].tolist()]))
    with pytest.raises(LeakError, match=names(data, victim, item)):
        check_holdout(leaky)


def test_repeated_interactions_with_an_item_are_no_leak(data: PreparedData, victim: int) -> None:
    """The same item in training, validation and test, as three interactions at different positions of the history."""
    train = data.train.row(victim).tolist()
    item = train[1]
    again = dataclasses.replace(
        data,
        histories=changed(data.histories, victim, [*train, item, item]),
        valid=changed(data.valid, victim, [item]),
        test=changed(data.test, victim, [item]),
    )
    check_holdout(again)
    with pytest.raises(LeakError, match=names(data, victim, item)):
        check_holdout(dataclasses.replace(again, train=changed(data.train, victim, [*train, item])))


class TrainsOnTheFuture(LeaveOneOut):
    """Puts each user's last interaction into training, and an earlier one into test."""

    def assign(self, histories: Ragged, times: np.ndarray) -> IntArray:
        stage = super().assign(histories, times)
        last = histories.offsets[1:][histories.lengths >= self.min_length] - 1
        stage[last - 2], stage[last] = stage[last], TRAIN
        return stage


def test_a_holdout_that_trains_on_the_future_is_refused_and_not_cached(tmp_path: Path) -> None:
    settings = DataSettings("synthetic", root=None)
    with pytest.raises(LeakError, match="training, validation and test are duplicated or not in the order"):
        prepare(READER, settings, TrainsOnTheFuture(), RandomPartition(3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_interaction_is_refused(data: PreparedData, victim: int) -> None:
    """It would not be masked, so it could be recommended again."""
    item = int(data.test.row(victim)[0])
    with pytest.raises(LeakError, match=f"1 interactions of 1 users are missing .*{names(data, victim, item)}"):
        check_holdout(dataclasses.replace(data, test=changed(data.test, victim, [])))


def test_a_leak_in_the_cache_is_refused(tmp_path: Path) -> None:
    settings = DataSettings("synthetic", root=None)
    fresh = prepare(READER, settings, LeaveOneOut(), RandomPartition(3), tmp_path / "first")
    leaking = tmp_path / "second" / fresh.key
    with new_entry(leaking) as draft:  # as a program with a fault would have written it, checksums and all
        for path in (tmp_path / "first" / fresh.key).iterdir():
            if path.name != "entry.json":
                shutil.copy(path, draft)
        arrays = dict(np.load(draft / "arrays.npz"))
        client = int(np.flatnonzero(fresh.client_of_user >= 0)[0])
        arrays["train_values"][fresh.train.offsets[client]] = fresh.valid.row(client)[0]
        np.savez(draft / "arrays.npz", **arrays)
    with pytest.raises(LeakError, match="are duplicated or not in the order"):
        prepare(READER, settings, LeaveOneOut(), RandomPartition(3), leaking.parent)


def test_validation_targets_in_the_validation_input_are_refused(data: PreparedData) -> None:
    users = len(evaluated_users(data, "val"))
    with pytest.raises(LeakError, match=f"{users} interactions of {users} users in input and targets of stage 'val'"):
        check_view(data, "val", [data.train, data.valid], data.valid)


def test_the_data_module_checks_its_data(data: PreparedData, victim: int) -> None:
    """Data that were changed after ``prepare`` are checked when the data module is built."""
    leaky = dataclasses.replace(
        data, train=changed(data.train, victim, [*data.train.row(victim).tolist(), int(data.valid.row(victim)[0])])
    )
    with pytest.raises(LeakError, match="1 interactions of 1 users in input and targets of stage 'val'"):
        FellrecDataModule(leaky, lambda items, is_target: {}, batch_size=8, eval_batch_size=256)


def one_batch(data: PreparedData) -> dict[str, torch.Tensor]:
    users = _Users(data, "test", evaluated_users(data, "test"))
    return users.__getitems__([0, 1, 2])


def test_a_masked_target_is_refused(data: PreparedData) -> None:
    batch = one_batch(data)
    target, user = int(batch["target_items"][1]), int(batch["users"][1])
    batch["masked_rows"] = torch.cat([batch["masked_rows"], torch.tensor([1])])
    batch["masked_items"] = torch.cat([batch["masked_items"], torch.tensor([target])])
    with pytest.raises(LeakError, match=f"1 targets are masked as seen items; first: item {target} of user {user}"):
        check_batch(batch, len(data.catalogue))


def test_a_seen_item_that_is_not_masked_is_refused(data: PreparedData) -> None:
    batch = one_batch(data)
    item, user = int(batch["histories"][2, 0]), int(batch["users"][2])
    kept = ~((batch["masked_rows"] == 2) & (batch["masked_items"] == item))
    batch["masked_rows"], batch["masked_items"] = batch["masked_rows"][kept], batch["masked_items"][kept]
    with pytest.raises(LeakError, match=f"1 items .* not masked .*first: item {item} of user {user}"):
        check_batch(batch, len(data.catalogue))


@pytest.fixture(scope="module")
def retrieval(tiny_overrides: list[str]) -> tuple[Any, Recommender]:
    config = compose([*tiny_overrides, "trainer.num_rounds=1"])
    return config, build_recommender(config, build_data(config))


def test_add_scores_checks_every_batch(retrieval: tuple[Any, Recommender]) -> None:
    """The scores of learned and reference rankers both pass through ``add_scores``."""
    module, data = retrieval[1].module, retrieval[1].data
    batch = one_batch(data)
    batch["masked_rows"], batch["masked_items"] = batch["target_rows"], batch["target_items"]
    with pytest.raises(LeakError, match="3 targets"):
        module.add_scores(torch.zeros(3, len(data.catalogue)), batch)


def test_the_test_stage_is_not_used_for_selection(retrieval: tuple[Any, Recommender]) -> None:
    config, recommender = retrieval
    loop = build_loop(config, recommender, ())
    evaluation = loop.evaluate(loop.population.score_jobs(), "test", 0)
    before = loop.selection.state_dict()
    with pytest.raises(LeakError, match="stage 'test' must not be used for adapter selection or early stopping"):
        loop.selection.update(evaluation)
    assert loop.selection.state_dict() == before
    assert not loop.selection.is_started


class OtherPromptAtInference(GenerativeObjective):
    """Its prompts at inference differ from those in training."""

    def prompts(self, histories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trained, self.after = self.after, self.after[:-1]
        try:
            return super().prompts(histories)
        finally:
            self.after = trained


def test_prompts_that_differ_between_training_and_inference_are_refused(data: PreparedData) -> None:
    from fellrec.models.tiny import build_tokenizer

    tokenizer = build_tokenizer(data.catalogue.texts(), 400)
    check_prompts(GenerativeObjective(tokenizer, data.catalogue, data.max_history, GenerativeSettings()), data)
    with pytest.raises(ConfigError, match=r"differ for (\d+) of \1 checked users; first: user 'user0000'"):
        check_prompts(OtherPromptAtInference(tokenizer, data.catalogue, data.max_history, GenerativeSettings()), data)


@pytest.fixture(scope="module")
def generative_run(
    tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Recommender]:
    folder = tmp_path_factory.mktemp("prompts")
    overrides = [
        *(*tiny_overrides, "objective=generative", "trainer.num_rounds=1", "trainer.max_local_steps=1"),
        *("data.max_users=30", "data.max_history=2", "ranker=grounding", "ranker.max_new_tokens=1"),
        *(f"run_dir={folder / 'run'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"),
    ]
    config = compose(overrides)
    recommender = build_recommender(config, build_data(config))
    Run(config, recommender).execute()
    return folder / "run", config, recommender


def test_a_run_records_its_prompt_template_and_refuses_another(
    generative_run: tuple[Path, Any, Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, config, recommender = generative_run
    template = prompt_template("movie-1")
    recorded = json.loads((run_dir / "versions.json").read_text())
    assert (recorded["prompt_template"], recorded["prompt_sha256"]) == ("movie-1", template.sha256)
    objective: Any = recommender.module.objective
    changed_template = dataclasses.replace(template, after="The next title is: ")
    monkeypatch.setattr(objective, "template", changed_template)
    resumed = config.copy()
    resumed.resume = str(run_dir)
    with pytest.raises(ConfigError, match=r"movie-1 .*current template is movie-1 .*; a changed text needs a"):
        Run(resumed, recommender).execute()
    monkeypatch.setattr("fellrec.models.objectives.generative.prompt_template", lambda _: changed_template)
    with pytest.raises(ConfigError, match=f"{run_dir} was trained with prompt template movie-1"):
        evaluate(run_dir, "test")
