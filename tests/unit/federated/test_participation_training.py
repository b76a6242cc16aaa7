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

SLOW = ["participation.slowdown=9", "trainer.max_local_steps=2"]


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose(tiny_overrides)
    return build_recommender(config, build_data(config))


@pytest.fixture
def make(recommender: Recommender, tiny_overrides: list[str]) -> Any:
    def build(*overrides: str) -> Federation:
        return build_federation(compose([*tiny_overrides, *SLOW, *overrides]), recommender)

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


@pytest.mark.parametrize("rule", ["fedasync", "fedbuff aggregation.buffer_size=2"])
def test_an_asynchronous_run_resumed_in_the_middle_has_the_same_bits(make: Any, tmp_path: Path, rule: str) -> None:
    how = [f"aggregation={rule}".split()[0], *rule.split()[1:], "trainer.evaluate_every=9"]
    whole, first, second = (make(*how, f"trainer.num_rounds={number}") for number in (5, 2, 5))
    whole.loop().run()
    first.loop().run()
    CheckpointFolder(tmp_path).save(first.persisted, 2)
    CheckpointFolder(tmp_path).load(second.persisted)
    second.loop().run()
    expected, found = whole.population.bank.tensors, second.population.bank.tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert whole.participation.seconds == second.participation.seconds > 0


def test_pooled_data_know_no_participation(make: Any) -> None:
    federation = make("aggregation=centralized", "participation.dropout=0.9", "participation.rate=0.1")
    assert federation.loop().run_round(0).cohort.rows == (0,)
