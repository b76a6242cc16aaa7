"""A federation of data sets: each member is trained and ranked as in a run on its data alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from federation_runs import FEDERATION, MEMBERS
from omegaconf import DictConfig

from fellrec.cli.evaluate import evaluate
from fellrec.cli.main import main
from fellrec.cli.plan import plan
from fellrec.config.compose import compose
from fellrec.config.members import member_configs
from fellrec.config.stored import read_config
from fellrec.data.prepared import PreparedData
from fellrec.errors import DataError, LeakError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.experiment.results import reference_results
from fellrec.experiment.run import Run
from fellrec.experiment.served import ServedModel, nearest_client
from fellrec.types import Evaluation

Make = Callable[..., tuple[DictConfig, Recommender]]


@pytest.fixture(scope="module")
def overrides(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """With a backbone that does not depend on the data: the federation's own, as a folder."""
    config = compose([*FEDERATION, f"cache_dir={cache}"])
    folder = build_recommender(config, build_data(config)).backbone.folder
    return [
        *(item for item in FEDERATION if not item.startswith("backbone.")),
        *("backbone=hf", f"backbone.path={folder}", "adapter.rank=2", f"cache_dir={cache}"),
    ]


@pytest.fixture(scope="module")
def data(overrides: list[str]) -> PreparedData:
    return build_data(compose(overrides))


def recommender_of(config: DictConfig, data: PreparedData) -> Recommender:
    """With an adapter that is not the identity: the same one for the same shapes."""
    found = build_recommender(config, data)
    generator = torch.Generator().manual_seed(5)
    initial = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in sorted(found.initial.items())}
    return dataclasses.replace(found, initial=initial)


def evaluations(config: DictConfig, recommender: Recommender) -> list[tuple[str, Evaluation]]:
    loop = build_loop(config, recommender)
    loop.evaluate_start("val")  # may choose a setting of the ranker
    references = reference_results(config, recommender, loop)
    return [(result.rule, result.evaluation) for result in references]


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.sampled_candidates=20", "objective.num_negatives=20"],
        ["objective.item_encoder=encoded", "objective.refresh_items=round", "data.max_history=5"],
        ["objective=generative", "ranker=constrained", "ranker.num_beams=4", "objective.softmax=catalogue"],
        ["objective=generative", "ranker=likelihood"],
        ["objective=generative", "ranker=grounding", "ranker.reweight=popularity", "ranker.gamma=3"],
    ],
    ids=["sampled", "two_towers", "constrained", "likelihood", "grounding"],
)
def test_metrics_of_a_member_are_those_of_a_run_on_its_data_alone(
    settings: list[str], overrides: list[str], data: PreparedData
) -> None:
    """With one adapter: all figures, every user's first items and scores, and those of the reference rankers."""
    config = compose([*overrides, *settings])
    data = data if "data.max_history=5" not in settings else build_data(config)
    together = evaluations(config, recommender_of(config, data))
    for place, (name, own) in enumerate(member_configs(config).items()):
        alone = evaluations(own, recommender_of(own, build_data(own)))
        assert own.objective.get("template") in (None, {"films": "movie-1", "clips": "video-1"}[name])
        for (rule, joint), (_, single) in zip(together, alone, strict=True):
            inside = (joint.client_of_user >= 2 * place) & (joint.client_of_user < 2 * place + 2)
            assert inside.sum() == len(single.users) > 10
            for metric, values in single.per_user.items():
                assert torch.equal(joint.per_user[metric][inside], values), (rule, metric)
                for figure in ("mean", "pooled"):
                    own_figure = joint.summary[f"member/{name}/{metric}/{figure}"]
                    assert own_figure == pytest.approx(single.summary[f"{metric}/{figure}"], rel=1e-12)
            assert torch.equal(joint.users[inside], single.users + data.places.users[place])
            if single.first_items is None:
                continue
            items = joint.first_items.items[inside]  # type: ignore[union-attr]
            assert torch.equal(torch.where(items >= 0, items - data.places.items[place], -1), single.first_items.items)
            assert torch.equal(joint.first_items.scores[inside], single.first_items.scores)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [
        ["objective.num_negatives=20"],
        ["objective.item_encoder=encoded", "objective.refresh_items=round"],
        ["objective=generative", "ranker=constrained", "objective.softmax=catalogue"],
    ],
    ids=["sampled", "two_towers", "generative"],
)
def test_a_client_trains_as_in_a_run_on_its_data_alone(
    settings: list[str], overrides: list[str], data: PreparedData
) -> None:
    """The adapters of the first member's clients, whose rows have the same numbers and so the same seeds."""
    config = compose([*overrides, *settings, "aggregation=local"])
    own = member_configs(config)["films"]
    adapters = []
    for each, its_data in ((config, data), (own, build_data(own))):
        loop = build_loop(each, recommender_of(each, its_data))
        loop.run_round(0)
        adapters.append([loop.population.bank.row(row) for row in range(2)])
    for joint, single in zip(*adapters, strict=True):
        assert all(torch.equal(joint[name], tensor) for name, tensor in single.items())
    starts = recommender_of(own, build_data(own)).initial
    assert any(not torch.equal(tensor, starts[name]) for name, tensor in adapters[0][0].items())


def test_pooled_batches_have_one_member_each_and_all_rows(overrides: list[str], data: PreparedData) -> None:
    """Those of centralised training, of the public users, and of an evaluation of all clients with one adapter."""
    for settings in ([], ["objective=generative", "ranker=likelihood"]):
        config = compose([*overrides, *settings])
        batches = build_recommender(config, data).datamodule
        for client in (None, -1):
            found = [batch["member"] for batch in batches.train_loader(client, seed=0)]
            assert len(found) == batches.num_batches(client)
            assert {member.shape[1] for member in found} == {0, 1}
            assert sum(len(member) for member in found) == len(batches._rows(client))
        assert sum(len(batch["users"]) for batch in batches.eval_loader("test")) == batches.num_users("test", range(4))  # type: ignore[arg-type]
        for batch in batches.eval_loader("test"):
            assert len(set(data.places.of_items(batch["target_items"]).tolist())) == 1


def test_a_user_is_never_ranked_on_another_clients_catalogue(overrides: list[str], data: PreparedData) -> None:
    """A target, a seen item, or a whole user of another catalogue in a batch is found before anything is ranked."""
    recommender = build_recommender(compose(overrides), data)
    module, places = recommender.module, data.places
    clips = next(iter(recommender.datamodule.eval_loader("test", (2,))))
    films = next(iter(recommender.datamodule.eval_loader("test", (0,))))
    module.ranker.refresh(module.model)
    with torch.no_grad():
        scores = module.ranker.scores(module.model, clips["histories"])
    assert scores.shape[1] == len(data.members["clips"].catalogue), "the cost is that of the own catalogue"
    for name in ("target_items", "masked_items", "histories"):
        for stranger in (0, places.items[1] - 1):
            wrong = {**clips, name: clips[name].clone()}
            wrong[name].view(-1)[-1 if name != "histories" else 1] = stranger
            if name == "histories" and stranger == places.items[1] - 1:
                continue  # the place just before a catalogue is that of padding: found in the data, see below
            with pytest.raises(LeakError, match="not in the catalogue"):
                module.add_scores(scores, wrong)
    with pytest.raises(LeakError, match="not in the catalogue"):
        module.add_scores(scores, {**films, "histories": clips["histories"][: len(films["users"])]})


def run(name: str, overrides: list[str], folder: Path, *more: str) -> tuple[dict[str, Any], Path]:
    run_dir = folder / name
    store = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
    config = compose([*overrides, *more, f"run_dir={run_dir}", store])
    Run(config, build_recommender(config, build_data(config))).execute()
    return json.loads((run_dir / "results.json").read_text()), run_dir


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("federation")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    return run("whole", overrides, folder, "aggregation=fellrec")


def test_the_files_of_a_run_follow_the_users_client(finished: tuple[Any, Path], data: PreparedData) -> None:
    """Ids of users and items say the member; a user's items are of the member of the user's client."""
    results, run_dir = finished
    rankings, targets = (pd.read_parquet(run_dir / f"{name}.parquet") for name in ("rankings", "targets"))
    for table in (rankings, targets):
        assert (table["user_id"].str.split("/").str[0] == table["item_id"].str.split("/").str[0]).all()
    member = rankings["user_id"].str.split("/").str[0]
    assert (member == np.array(MEMBERS)[rankings["client"] // 2]).all()
    assert set(member) == set(MEMBERS)
    summary = results["summary"]
    assert sum(summary[f"member/{name}/num_users"] for name in MEMBERS) == summary["num_users"]
    per_client = results["per_client"]["ndcg_at_10"]
    for place, name in enumerate(MEMBERS):
        mean = np.mean(per_client[2 * place : 2 * place + 2])
        assert summary[f"member/{name}/ndcg_at_10/mean"] == pytest.approx(mean, rel=1e-12)
    counts = json.loads((run_dir / "data.json").read_text())["statistics"]
    assert counts["members"]["clips"]["items"] + counts["members"]["films"]["items"] == counts["items"]
    costs = pd.read_csv(run_dir / "client_costs.csv")
    assert costs["ndcg_at_10"].tolist() == pytest.approx(per_client)
    assert (costs["seconds_per_round"] > 0).all()
    assert costs["adapter_bytes"].nunique() == 1
    matrices = np.load(run_dir / "matrices.npz")
    assert matrices["mixing"].shape == (1, 4, 4)


def test_recommendations_are_of_the_clients_own_catalogue(finished: tuple[Any, Path], data: PreparedData) -> None:
    """After a tested user's history, a client's model recommends what the test ranked first; the nearest client of a
    history is one of its data set, and titles of another catalogue are refused."""
    run_dir = finished[1]
    served = ServedModel.of_run(run_dir, read_config(run_dir))
    rankings = pd.read_parquet(run_dir / "rankings.parquet")
    best = rankings[rankings["rank"] == 0]
    for name, clients in (("films", (0, 1)), ("clips", (2, 3))):
        catalogue = data.members[name].catalogue
        titles = dict(zip((f"{name}/{item}" for item in catalogue.item_ids), catalogue.titles, strict=True))
        row = best[best["client"] == clients[1]].iloc[0]
        user = data.users["user_id"].tolist().index(row["user_id"])
        items = [*data.train.row(user), *data.valid.row(user)]
        history = [titles[data.catalogue.item_ids[item]] for item in items]
        found = served.recommend(clients[1], history, len(catalogue) - len(items))
        assert {item.item_id for item in found} <= set(catalogue.item_ids)
        assert found[0].score == pytest.approx(row["score"], abs=1e-5)
        assert nearest_client(data, items) in clients
        other = clients[0] - 2 if name == "clips" else 2
        with pytest.raises(DataError, match="no item is called"):
            served.recommend(other, history, 1)


def test_a_run_can_be_evaluated_and_resumed(
    finished: tuple[Any, Path], data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    results, run_dir = finished
    sizes = [len(own.catalogue) for own in data.members.values()]
    comparison = evaluate(run_dir, "test")
    assert dict(comparison.results[0].evaluation.summary) == pytest.approx(results["summary"], nan_ok=True)
    assert comparison.members == {
        "films": {"clients": [0, 1], "items": sizes[0]},
        "clips": {"clients": [2, 3], "items": sizes[1]},
    }
    main(["train", f"resume={run_dir}", f"tracking.uri=sqlite:///{run_dir.parent / 'mlflow.db'}"])
    assert f"{sizes[0]} items of films, {sizes[1]} items of clips ranked" in " ".join(capsys.readouterr().out.split())
    assert json.loads((run_dir / "results.json").read_text())["summary"] == results["summary"]


def test_through_the_cut_the_results_are_the_same(
    finished: tuple[Any, Path], overrides: list[str], tmp_path: Path
) -> None:
    cut, _ = run("cut", overrides, tmp_path, "aggregation=fellrec", "split.transport=inprocess", "split.head_layers=1")
    assert cut["summary"] == pytest.approx(finished[0]["summary"], rel=1e-5, nan_ok=True)


def test_pooled_training_of_all_members(overrides: list[str], tmp_path: Path) -> None:
    """Every client is ranked with one adapter, which both members' batches have trained."""
    results, _ = run("pooled", overrides, tmp_path, "aggregation=centralized", "trainer.learning_rate=1e-2")
    assert all(results["summary"][f"member/{name}/num_users"] > 10 for name in MEMBERS)


def test_the_plan_counts_the_clients_of_all_members(overrides: list[str]) -> None:
    """Tokens are those of the members planned alone, weighted by their clients."""
    (row,) = plan(overrides)
    assert row.plan.num_clients == 4
    steps = []
    for name in MEMBERS:
        own = member_configs(compose(overrides))[name]
        own_data = build_data(own)
        module = build_recommender(own, own_data).datamodule
        steps += [min(2, module.num_batches(client)) for client in range(own_data.num_clients)]
    assert row.plan.load.mean.num_steps == np.mean(steps)
