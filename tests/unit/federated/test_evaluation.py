"""Evaluation: users batched by length and over clients, and metrics that are kept; all exact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fellrec.config.compose import compose
from fellrec.data.datamodule import FellrecDataModule
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_federation
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.kept import KeptUsers
from fellrec.federated.loop import FederatedLoop
from fellrec.models.module import FellrecModule
from fellrec.types import Evaluation

Build = Callable[..., Recommender]
GENERATIVE = ["objective=generative", "objective.max_tokens=256", "data.max_users=30"]


@pytest.fixture
def build(tiny_overrides: list[str]) -> Build:
    def built(*overrides: str) -> Recommender:
        shared = [one for one in tiny_overrides if not (one.startswith("backbone.") and "backbone=sasrec" in overrides)]
        config = compose([*shared, *overrides])
        return build_recommender(config, build_data(config))

    return built


def loop_of(recommender: Recommender, overrides: list[str]) -> FederatedLoop:
    return build_federation(compose(overrides), recommender).loop()


def ranked(module: FellrecModule, datamodule: FellrecDataModule, stage: str) -> Evaluation:
    """The start's users, in the batches of a data module."""
    module.eval()
    module.ranker.refresh(module.model)
    for batch in datamodule.eval_loader(stage):
        module.score_batch(batch, keep_rankings=True)
    return module.finish_reference(stage)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.order=oldest_first"],
        ["objective.order=newest_first", "objective.item_encoder=encoded", "objective.chunk_items=7"],
        ["backbone=sasrec", "backbone.hidden_size=16"],
        [*GENERATIVE, "ranker=likelihood", "ranker.max_batch_tokens=2000"],
        [*GENERATIVE, "ranker=constrained", "ranker.max_batch_tokens=2000"],
        [*GENERATIVE, "ranker=grounding", "ranker.batch_size=4", "ranker.max_new_tokens=6"],
    ],
    ids=["oldest_first", "newest_first", "sasrec", "likelihood", "constrained", "grounding"],
)
def test_users_of_similar_length_are_batched_and_have_the_same_ranks(build: Build, overrides: list[str]) -> None:
    """In any order of users the ranks are the same, and scores differ by rounding."""
    recommender = build(*overrides, "trainer.eval_batch_size=8")
    unsorted = FellrecDataModule(
        recommender.data,
        recommender.datamodule.collate,
        batch_size=8,
        eval_batch_size=8,
        history_lengths=lambda histories: torch.zeros(len(histories), dtype=torch.long),
    )
    for stage in ("val", "test"):
        tokens = [fed_tokens(recommender, module, stage) for module in (recommender.datamodule, unsorted)]
        assert tokens[0][1] == tokens[1][1] <= tokens[0][0] < tokens[1][0], "the same tokens, with less padding"
    found, expected = (ranked(recommender.module, module, "test") for module in (recommender.datamodule, unsorted))
    assert torch.equal(found.users, expected.users)
    assert found.per_user.keys() == expected.per_user.keys()
    for name, values in expected.per_user.items():
        assert torch.equal(found.per_user[name], values), name
    assert found.first_items is not None
    assert expected.first_items is not None
    torch.testing.assert_close(found.first_items.scores, expected.first_items.scores)


def fed_tokens(recommender: Recommender, datamodule: FellrecDataModule, stage: str) -> tuple[int, int]:
    """Entries of all batches of inputs, and tokens among them, counted on the texts themselves."""
    objective, entries, tokens = recommender.module.objective, 0, 0
    for batch in datamodule.eval_loader(stage):
        if hasattr(objective, "prompts"):
            ids, lengths = objective.prompts(batch["histories"])
        else:
            ids, ends = objective._history_tokens(batch["histories"])  # type: ignore[attr-defined]
            lengths = ends[:, -1] + 1
        entries, tokens = entries + ids.numel(), tokens + int(lengths.sum())
    return entries, tokens


class Watch:
    """Users whose scores are computed, batch by batch."""

    def __init__(self, module: FellrecModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[Tensor] = []
        score = module.score_batch

        def watched(batch: dict[str, Tensor], keep_rankings: bool = False) -> None:
            self.batches.append(batch["users"])
            score(batch, keep_rankings)

        monkeypatch.setattr(module, "score_batch", watched)

    def take(self) -> list[Tensor]:
        found, self.batches = self.batches, []
        return found


def again(loop: FederatedLoop, stage: str, round_index: int) -> Evaluation:
    """An evaluation of the present adapters by an evaluator that has kept nothing."""
    evaluator = loop.executor.evaluator  # type: ignore[attr-defined]
    kept, evaluator.kept = evaluator.kept, KeptUsers()
    evaluation = loop.executor.score(loop.population.score_jobs(), stage, round_index)
    evaluator.kept = kept
    return evaluation


def same(one: Evaluation, other: Evaluation) -> bool:
    return torch.equal(one.users, other.users) and one.summary == other.summary and all(
        torch.equal(one.per_user[name], values) for name, values in other.per_user.items()
    )  # fmt: skip


def test_clients_with_one_adapter_are_scored_together(
    build: Build, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = build("trainer.eval_batch_size=32")
    loop = loop_of(recommender, [*tiny_overrides, "aggregation=fedavg", "trainer.eval_batch_size=32"])
    watch = Watch(recommender.module, monkeypatch)
    evaluation = loop.validate(-1)
    users = recommender.data.client_of_user[evaluation.users.numpy()]
    sizes = [len(batch) for batch in watch.take()]
    assert sizes == [32] * (len(users) // 32) + [len(users) % 32]
    assert len(set(users.tolist())) == 3


def test_clients_outside_the_cohort_keep_their_metrics(
    build: Build, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recommender = build()
    how = [*tiny_overrides, "aggregation=fellrec", "participation.rate=0.3", "trainer.num_rounds=3"]
    config = compose(how)
    federation = build_federation(config, recommender)
    loop = federation.loop()
    watch = Watch(recommender.module, monkeypatch)
    loop.validate(-1)
    assert len(torch.cat(watch.take())) == sum(recommender.datamodule.num_users("val", (c,)) for c in range(3))
    for round_index in range(2):
        record = loop.run_round(round_index)
        assert record.evaluation is not None
        (row,) = record.cohort.rows
        scored = torch.cat(watch.take())
        assert set(recommender.data.client_of_user[scored.numpy()].tolist()) == {row}
        assert same(again(loop, "val", round_index), record.evaluation)
        watch.take()

    CheckpointFolder(tmp_path).save(federation.persisted, 2)
    other = build_federation(config, recommender)
    CheckpointFolder(tmp_path).load(other.persisted)
    resumed = other.loop().evaluate(other.population.score_jobs(), "val", 1)
    assert not watch.take(), "a resumed run has what the stopped one had"
    assert same(resumed, record.evaluation)
    assert not same(loop.evaluate(loop.population.score_jobs(), "test", 1), resumed), "by stage"
    assert watch.take()


def test_runs_of_a_comparison_share_the_evaluation_of_their_start(
    build: Build, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = build()
    watch = Watch(recommender.module, monkeypatch)
    first = loop_of(recommender, [*tiny_overrides, "aggregation=fedavg"])
    started = first.validate(-1)
    first.run_round(0)
    watch.take()
    second = loop_of(recommender, [*tiny_overrides, "aggregation=local"])
    assert same(second.validate(-1), started)
    assert not watch.take()
    assert same(again(second, "val", -1), started)
    watch.take()
    changed = loop_of(recommender, [*tiny_overrides, "aggregation=local"])
    name = next(iter(changed.population.bank.kinds))
    changed.population.bank.store(1, {n: t + (n == name) for n, t in changed.population.bank.row(1).items()})
    changed.validate(-1)
    assert set(recommender.data.client_of_user[torch.cat(watch.take()).numpy()].tolist()) == {1}


def test_files_of_an_earlier_runs_start_may_be_gone(build: Build, tiny_overrides: list[str], tmp_path: Path) -> None:
    """APFL serves mixtures, whose files are deleted once other ones serve."""
    recommender = build()
    first, second = (loop_of(recommender, [*tiny_overrides, "aggregation=apfl"]) for _ in range(2))
    first.population.persist(tmp_path / "first")
    started = first.validate(-1)
    shutil.rmtree(tmp_path / "first")
    assert same(second.validate(-1), started)


def test_a_long_evaluation_is_announced_once(
    build: Build, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick = loop_of(build(), [*tiny_overrides, "aggregation=fedavg"]).validate(-1)
    assert not caplog.messages
    monkeypatch.setattr("fellrec.federated.evaluator._LONG_SECONDS", 0.0)
    announced = loop_of(build(), [*tiny_overrides, "aggregation=fedavg"])
    assert same(announced.validate(-1), quick)
    announced.run_round(0)
    announced.validate(0)
    (message,) = caplog.messages
    assert message.startswith(f"ranking {len(quick.users)} users takes up to 0 minutes with SimilarityRanker")
