"""Generative runs: what is recorded with them, how γ is chosen, and figures of what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.data.prompts import TEMPLATES
from fellrec.experiment import backbones as pretrained
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.settings import TrainerSettings
from fellrec.planning.load import count_load
from fellrec.types import Evaluation

GENERATIVE = ["objective=generative", "trainer.num_rounds=1", "trainer.max_local_steps=2", "trainer.cutoffs=[5,10]"]
GROUNDING = ["ranker=grounding", "ranker.max_new_tokens=6"]


class Evaluations(FederatedCallback):
    def __init__(self) -> None:
        self.seen: list[Evaluation] = []

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        self.seen.append(evaluation)


@pytest.fixture(scope="module")
def make(tiny_overrides: list[str]) -> Callable[..., tuple[FederatedLoop, Evaluations]]:
    def build(*overrides: str) -> tuple[FederatedLoop, Evaluations]:
        config = compose([*tiny_overrides, *GENERATIVE, *overrides])
        seen = Evaluations()
        return build_loop(config, build_recommender(config, build_data(config)), [seen]), seen

    return build


def test_every_evaluation_says_what_was_written(make: Callable[..., tuple[FederatedLoop, Evaluations]]) -> None:
    """The figures are those of all clients' texts, of this evaluation alone."""
    loop, evaluations = make(*GROUNDING)
    loop.run()
    assert [evaluation.stage for evaluation in evaluations.seen] == ["val", "val", "test"]
    for evaluation in evaluations.seen:
        summary, reported = evaluation.summary, evaluation.reported
        assert len(reported["text"]) == summary["num_users"] == len(evaluation.client_of_user)
        assert len(set(evaluation.client_of_user.tolist())) == 3
        assert summary["generation/in_catalogue_rate"] == float(reported["is_title"].mean())
        distinct = len(set(reported["text"].tolist()))
        assert summary["generation/duplicate_rate"] == pytest.approx(1 - distinct / summary["num_users"])
        assert "generation/gamma" not in summary, "there are no weights"
    retrieval, _ = make("ranker=likelihood")
    assert not [name for name in retrieval.evaluate_start("val").summary if name.startswith("generation/")]


@pytest.mark.parametrize("signal", ["popularity", "collaborative"])
def test_the_test_uses_the_gamma_of_its_own_adapters_validation(
    make: Callable[..., tuple[FederatedLoop, Evaluations]], signal: str
) -> None:
    """With each γ alone, the validation of the same adapters says which is best; the test's figures are those of it."""
    given = [*GROUNDING, f"ranker.reweight={signal}", "aggregation=fedavg"]
    grid = [0.0, 1.0, 30.0]
    loop, evaluations = make(*given, f"ranker.gamma={grid}")
    result = loop.run()
    test = result.evaluation
    alone = {}
    for gamma in grid:
        single, _ = make(*given, f"ranker.gamma={gamma}")
        jobs = single.population.score_jobs_of(result.served, ())
        figures = [single.evaluate(jobs, stage, 0).summary for stage in ("val", "test")]
        assert not single.executor.evaluator.module.chooses_on_validation
        alone[gamma] = figures
    best = max(grid, key=lambda gamma: alone[gamma][0]["ndcg_at_10/mean"])
    assert alone[best][0]["ndcg_at_10/mean"] > min(valid["ndcg_at_10/mean"] for valid, _ in alone.values())
    assert test.summary["generation/gamma"] == best
    assert test.summary == alone[best][1]
    for evaluation in evaluations.seen:
        assert evaluation.summary["generation/gamma"] == grid[evaluation.choice]
    start = loop.evaluate_start("val")
    assert loop.evaluate_start("test").summary["generation/gamma"] == start.summary["generation/gamma"]


def test_constrained_decoding_with_all_titles_is_the_likelihood_ranking(
    make: Callable[..., tuple[FederatedLoop, Evaluations]],
) -> None:
    constrained, _ = make("ranker=constrained", "ranker.num_beams=60")
    likelihood, _ = make("ranker=likelihood", "ranker.normalise=sum")
    found, expected = (loop.evaluate_start("test") for loop in (constrained, likelihood))
    for name, values in expected.per_user.items():
        same = (values - found.per_user[name]).abs() < 1e-9  # scores that differ by rounding may change places
        assert same.float().mean() > 0.95, name
    assert found.summary["generation/exhaustive_rate"] == 1
    few, _ = make("ranker=constrained", "ranker.num_beams=30")
    summary = few.evaluate_start("test").summary
    assert summary["generation/exhaustive_rate"] < 1
    assert summary["generation/certain_titles"] < 60
    assert summary["generation/in_catalogue_rate"] == 1


def test_the_prompt_is_recorded_with_the_run(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ranker = ["ranker=constrained", "ranker.num_beams=3"]
    main(["train", *tiny_overrides, *GENERATIVE, *ranker, "aggregation=local", "run_dir=run"])
    metadata = {"prompt_template": "movie-1", "prompt_sha256": TEMPLATES["movie-1"].sha256}
    assert json.loads((tmp_path / "run" / "versions.json").read_text()).items() >= metadata.items()
    summary = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]
    assert summary["generation/in_catalogue_rate"] == 1
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fellrec").experiment_id])  # type: ignore[union-attr]
    assert run.data.tags.items() >= metadata.items()
    assert run.data.params["objective.template"] == "movie-1"
    for stage in ("val", "test"):
        assert run.data.metrics[f"{stage}/generation/in_catalogue_rate"] == 1
        assert f"{stage}/generation/certain_titles" in run.data.metrics


def test_another_prompt_is_another_pretrained_backbone(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, and another text of the same version."""
    data = build_data(compose(tiny_overrides))
    settings = {"backbone": {}, "objective": {"template": "movie-1"}}
    keys = {pretrained._key(settings, data), pretrained._key({**settings, "objective": {"template": "game-1"}}, data)}
    changed = {**TEMPLATES, "movie-1": TEMPLATES["game-1"]}
    monkeypatch.setattr(pretrained, "TEMPLATES", changed)
    assert len(keys | {pretrained._key(settings, data)}) == 3


def test_clients_train_in_batches_of_similar_length(make: Callable[..., tuple[FederatedLoop, Evaluations]]) -> None:
    grouped, alone = (make("trainer.batch_size=8", f"objective.group_by_length={how}")[0] for how in ("true", "false"))

    def epoch(loop: FederatedLoop) -> tuple[list[list[int]], int]:
        batches = list(loop.executor.evaluator.datamodule.train_loader(0, 7))
        rows = [ids[:length].tolist() for b in batches for ids, length in zip(b["input_ids"], b["lengths"])]
        return sorted(rows), sum(batch["input_ids"].numel() for batch in batches)

    (rows, tokens), (expected_rows, more_tokens) = epoch(grouped), epoch(alone)
    assert rows == expected_rows
    assert tokens < more_tokens


def test_a_plan_sees_the_longest_batch(make: Callable[..., tuple[FederatedLoop, Evaluations]]) -> None:
    """Also if it looks at one batch of each client; no batch of any epoch has more tokens."""
    loop, _ = make("trainer.batch_size=8")
    evaluator = loop.executor.evaluator
    local = TrainerSettings(max_local_steps=1)
    load = count_load(evaluator.datamodule, evaluator.module.objective, local, seed=0, max_batches=3)
    sizes = [
        batch["input_ids"].numel()
        for client in range(3)
        for seed in range(3)
        for batch in loop.executor.evaluator.datamodule.train_loader(client, seed)
    ]
    assert load.num_tokens_largest == load.largest_batch["input_ids"].numel() >= max(sizes)
    assert load.num_tokens_largest > sorted(sizes)[len(sizes) // 2]
