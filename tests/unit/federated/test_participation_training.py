"""Participation and asynchronous rules with a model: measured losses, resumes, and the executed cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fellrec.config.compose import compose
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import Federation, build_federation
from fellrec.federated.checkpoint import CheckpointFolder

SLOW = ["participation.slowdown=9", "trainer.max_local_steps=2", "backbone.num_layers=3"]
CUT = "split.transport=inprocess"
RULES = pytest.mark.parametrize("rule", [["fedasync"], ["fedbuff", "aggregation.buffer_size=2"]], ids=lambda r: r[0])


def recommender_of(*overrides: str) -> Recommender:
    config = compose([*overrides])
    return build_recommender(config, build_data(config))


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    return recommender_of(*tiny_overrides, *SLOW)


@pytest.fixture
def make(recommender: Recommender, tiny_overrides: list[str]) -> Any:
    def build(*overrides: str) -> Federation:
        given = [*tiny_overrides, *SLOW, *overrides]
        return build_federation(compose(given), recommender_of(*given) if CUT in overrides else recommender)

    return build


def test_power_of_choice_trains_the_clients_with_the_largest_loss(make: Any) -> None:
    federation = make("aggregation=uniform", "participation=power_of_choice", "participation.rate=0.5")
    loop = federation.loop()
    num_clients = federation.population.num_clients
    losses = loop.start_losses(range(num_clients), 0)
    needed = federation.participation.num_needed
    record = loop.run_round(0)
    assert len(record.trained) == needed < num_clients
    assert {t.row for t in record.trained} == set(sorted(range(num_clients), key=lambda c: -losses[c])[:needed])


@RULES
def test_an_asynchronous_run_resumed_in_the_middle_has_the_same_bits(
    make: Any, tmp_path: Path, rule: list[str]
) -> None:
    how = [f"aggregation={rule[0]}", *rule[1:], "trainer.evaluate_every=9"]
    whole, first, second = (make(*how, f"trainer.num_rounds={number}") for number in (5, 2, 5))
    whole.loop().run()
    first.loop().run()
    CheckpointFolder(tmp_path).save(first.persisted, 2)
    CheckpointFolder(tmp_path).load(second.persisted)
    second.loop().run()
    check_same(whole, second)


@RULES
def test_an_asynchronous_run_through_the_cut_has_the_same_bits(make: Any, rule: list[str]) -> None:
    """The server trains the body from the version that a client received, also if its own model is newer."""
    how = [f"aggregation={rule[0]}", *rule[1:], "trainer.evaluate_every=9", "trainer.num_rounds=4"]
    whole, cut = make(*how), make(*how, CUT)
    whole.loop().run()
    loop = cut.loop()
    staleness = [loop.run_round(number).cohort.metrics["participation/staleness_max"] for number in range(4)]
    assert max(staleness) > 0
    check_same(whole, cut)


def check_same(expected: Federation, found: Federation) -> None:
    """Adapters, moments and the simulated time, to the bit."""
    ones, others = expected.population, found.population
    for row in range(ones.num_rows):
        pairs = (ones.bank.row(row), others.bank.row(row)), (ones.optimizer_of(row), others.optimizer_of(row))
        for one, other in pairs:
            assert one.keys() == other.keys()
            assert all(torch.equal(other[name], one[name]) for name in one)
    assert expected.participation.seconds == found.participation.seconds > 0


def test_pooled_data_know_no_participation(make: Any) -> None:
    federation = make("aggregation=centralized", "participation.dropout=0.9", "participation.rate=0.1")
    assert federation.loop().run_round(0).cohort.rows == (0,)
