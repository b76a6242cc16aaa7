"""LoRA ranks that differ between clients: the part that a client trains, is served with, sends and receives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fellrec.cli.plan import plan
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.build import Recommender, build_data, build_recommender, build_rule
from fellrec.experiment.federation import build_federation
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.ranks import Ranks

RANKS = (1, 4, 2)
HOW = ["adapter=lora", "adapter.rank=[1,4,2]", "adapter.alpha=8", "adapter.dropout=0", "trainer.max_local_steps=2",
       "trainer.learning_rate=0.05", "trainer.num_rounds=2"]  # fmt: skip

WITHOUT_RANK = [item for item in HOW if "rank" not in item]


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose([*tiny_overrides, *HOW])
    return build_recommender(config, build_data(config))


def federation(recommender: Recommender, tiny_overrides: list[str], *overrides: str) -> Any:
    return build_federation(compose([*tiny_overrides, *HOW, *overrides]), recommender)


def part(name: str, tensor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a client of a rank has of a factor, and the rest."""
    axis = 0 if "lora_A" in name else 1
    first, rest = tensor.split([rank, tensor.shape[axis] - rank], dim=axis)
    return first, rest


@pytest.mark.parametrize("rule", ["hetlora", "rbla", "flexlora", "flora", "local"])
def test_a_client_has_the_part_of_its_rank(recommender: Recommender, tiny_overrides: list[str], rule: str) -> None:
    """It starts with the first rows and columns of the server's model, the others are and stay exactly 0, with weight
    decay and moments; it sends and receives the bytes of its rank."""
    made = federation(recommender, tiny_overrides, f"aggregation={rule}")
    loop = made.loop()
    assert made.exchange.layers[0].scale == 8 / 4
    before = [made.population.bank.row(row) for row in range(3)]
    first = loop.run_round(0)
    records = [(before, first), ([made.population.bank.row(row) for row in range(3)], loop.run_round(1))]
    for stored, record in records:
        for trained in record.trained:
            rank, start, end = RANKS[trained.row], trained.job.adapter.tensors(), trained.adapter.tensors()
            for name in start:
                assert not part(name, start[name], rank)[1].any()
                assert not part(name, end[name], rank)[1].any()
                assert torch.equal(part(name, start[name], rank)[0], part(name, stored[trained.row][name], rank)[0])
            assert any(not torch.equal(start[name], end[name]) for name in start)
    served = loop.population.score_jobs()
    for job, rank in zip(served, RANKS):
        assert all(not part(name, t, rank)[1].any() for name, t in job.adapter.tensors().items())
    per_rank = sum(t.nbytes for t in before[1].values()) // 4
    ledger = made.exchange.ledger
    sizes = [ledger.total(client=client, round=0, direction="up", kind="adapter") for client in range(3)]
    assert sizes == ([0, 0, 0] if rule == "local" else [rank * per_rank for rank in RANKS])
    if rule in ("hetlora", "rbla", "flexlora"):
        down = [ledger.total(client=client, round=0, direction="down", kind="adapter") for client in range(3)]
        assert down == sizes


def test_a_client_of_a_rank_trains_as_one_with_an_adapter_of_that_rank(
    recommender: Recommender, tiny_overrides: list[str]
) -> None:
    """With the same scale, the first client's adapter is that of a run in which all have rank 1 and the same A."""
    made = federation(recommender, tiny_overrides, "aggregation=local")
    (padded,) = made.loop().train([made.population.job(0, 0)])
    config = compose([*tiny_overrides, *HOW, "aggregation=local", "adapter.rank=1", "adapter.alpha=2"])
    alone = build_federation(config, build_recommender(config, build_data(config)))
    start = alone.population.job(0, 0)
    narrow = {n: part(n, t, 1)[0].clone() for n, t in padded.job.adapter.tensors().items()}
    alone.population.bank.store(0, narrow)
    (own,) = alone.loop().train([alone.population.job(0, 0)])
    assert start.adapter.tensors().keys() == narrow.keys()
    for name, tensor in own.adapter.tensors().items():
        torch.testing.assert_close(tensor, part(name, padded.adapter.tensors()[name], 1)[0], rtol=0, atol=1e-6)
    assert own.loss == pytest.approx(padded.loss, rel=1e-6)


def test_rules_that_need_one_rank_are_refused_by_name(recommender: Recommender, tiny_overrides: list[str]) -> None:
    for rule in ("fedavg", "fedex_lora", "ffa_lora", "centralized"):
        with pytest.raises(
            ConfigError, match=rf"aggregation {rule} needs clients with one rank: adapter.rank=\[1, 4, 2\]"
        ):
            federation(recommender, tiny_overrides, f"aggregation={rule}")


@pytest.mark.parametrize("rank", ["0", "[]", "[1,0]", "1.5", "[1,a]", "{5: 1}", "{0: 0}"])
def test_a_rank_is_a_number_or_a_list(tiny_overrides: list[str], rank: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank=.*a whole number of at least 1, or a list of them"):
        compose([*tiny_overrides, "adapter=lora", f"adapter.rank={rank}"])


def test_there_is_a_rank_for_each_client() -> None:
    with pytest.raises(ConfigError, match=r"adapter.rank=\[1, 2\] has 2 values, and there are 3 clients"):
        Ranks([1, 2], num_clients=3)


def test_a_run_that_is_stopped_within_a_round_continues_with_the_same_parts(
    recommender: Recommender, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """What is selected is a part, and has a file of its own in checkpoints; what a client finished is found again."""
    whole = federation(recommender, tiny_overrides, "aggregation=rbla")
    expected = whole.loop().run()

    def fresh() -> Any:
        made = federation(recommender, tiny_overrides, "aggregation=rbla")
        made.population.persist(tmp_path / "checkpoints" / "tensors")
        return made

    first, second = fresh(), fresh()
    loop = first.loop()
    loop.validate(-1)
    loop.run_round(0)
    CheckpointFolder(tmp_path / "checkpoints").save(first.persisted, 1)
    loop.train([first.population.job(row, 1) for row in (0, 1)])
    CheckpointFolder(tmp_path / "checkpoints").load(second.persisted)
    assert second.population.recover(second.population.job(0, 1)) is not None
    assert second.population.recover(second.population.job(2, 1)) is None
    third = fresh()
    CheckpointFolder(tmp_path / "checkpoints").load(third.persisted)
    found = third.loop().run()
    assert found.evaluation.summary == expected.evaluation.summary
    for row in range(3):
        mine, theirs = (made.population.bank.row(row) for made in (third, whole))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_ranks_by_size_are_those_of_the_list(recommender: Recommender, tiny_overrides: list[str]) -> None:
    """The threshold is the second largest client's number of samples; where all ranks are equal, one number does the
    same, in rules that need one rank too."""
    sizes = [recommender.datamodule.num_samples(client) for client in range(3)]
    limit = sorted(sizes)[1]
    by_size = [*tiny_overrides, *WITHOUT_RANK, f"adapter.rank={{0: 1, {limit}: 4}}"]
    config = compose([*by_size, "aggregation=hetlora"])
    made = build_federation(config, build_recommender(config, build_data(config)))
    expected = [4 if size >= limit else 1 for size in sizes]
    assert sorted(expected) == [1, 4, 4]
    assert made.population.needs.ranks.of_client == expected  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="aggregation fedavg needs clients with one rank: adapter.rank="):
        build_rule(compose([*by_size, "aggregation=fedavg"]))


def test_equal_ranks_are_one_rank(tiny_overrides: list[str]) -> None:
    """A list, ranks by size and one number give the same bits."""
    found: dict[str, list[list[Any]]] = {"fedavg": [], "hetlora": []}
    for rank in ("2", "[2,2,2]", "{0: 2, 100: 2}"):
        overrides = [*tiny_overrides, *WITHOUT_RANK, f"adapter.rank={rank}"]
        same = build_recommender(compose(overrides), build_data(compose(overrides)))
        for rule, adapters in found.items():
            made = build_federation(compose([*overrides, f"aggregation={rule}"]), same)
            made.loop().run_round(0)
            adapters.append([made.population.bank.row(row) for row in range(3)])
    for first, *others in found.values():
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())


def test_the_plan_has_what_each_client_has_of_the_adapter(tiny_overrides: list[str]) -> None:
    """Bytes and mean traffic are those of the run's ledger."""
    overrides = [*tiny_overrides, *HOW, "aggregation=hetlora", "split.head_layers=1", "split.tail_layers=1"]
    (row,) = plan(overrides)
    config = compose(overrides)
    made = build_federation(config, build_recommender(config, build_data(config)))
    made.loop().run_round(0)
    sizes = [made.exchange.ledger.total(client=c, round=0, direction="up", kind="adapter") for c in range(3)]
    assert [client.rank for client in row.plan.clients] == list(RANKS)
    assert [c.head_bytes + c.body_bytes + c.tail_bytes for c in row.plan.clients] == sizes
    assert row.plan.traffic.adapter_up_bytes == pytest.approx(sum(sizes) / 3, abs=1)
    (uniform,) = plan([*(item for item in overrides if "rank" not in item), "adapter.rank=4"])
    assert not uniform.plan.clients
    assert uniform.plan.traffic.adapter_up_bytes == max(sizes)
