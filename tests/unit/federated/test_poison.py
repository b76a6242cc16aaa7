"""Clients that misbehave: what they send, what is refused, whose training and figures stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop

from fellrec.aggregation import Ditto, FedAvg, FELLRec, Local, Uniform
from fellrec.config.compose import compose
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError, TrainingError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.classes import check_classes, check_transforms
from fellrec.experiment.federation import build_loop
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.exchange import Exchange
from fellrec.federated.ledger import Ledger
from fellrec.federated.poison import Poison
from fellrec.federated.records import Trained, Updates
from fellrec.federated.settings import PoisonSettings
from fellrec.metrics import ClientRankingMetrics
from fellrec.state.tensor_store import StoredTensors


class Seen(FederatedCallback):
    """What the server receives, and what each client has trained, by round."""

    def __init__(self) -> None:
        self.received: list[list[float]] = []
        self.trained: list[dict[int, Trained]] = []

    def on_round_start(self, round_index: int) -> None:
        self.trained.append({})

    def on_client_end(self, trained: Trained) -> None:
        self.trained[-1][trained.row] = trained

    def on_aggregate_start(self, updates: Updates) -> None:
        end = getattr(updates.end, "hidden", updates.end)
        self.received.append([float(row[0]) for row in end["a"]] if "a" in end else [])


class OnlyA(Uniform):
    """The parameter b never leaves its client."""

    def exchanges(self, name: str, round_index: int) -> bool:
        return name == "a"


def poison(kind: Any, *clients: int, scale: float = 10.0) -> Poison:
    return Poison(PoisonSettings(clients=clients, kind=kind, scale=scale))


@pytest.mark.parametrize(
    ("kind", "sent", "mean"),
    [
        # Clients add 1, 2, 3, 4 to zeros; client 1 misbehaves with its 2, and client 0 is the first honest one.
        ("none", [1, 2, 3, 4], 2.5),
        ("label_flip", [1, 2, 3, 4], 2.5),
        ("scale", [1, 10, 3, 4], 4.5),
        ("sign_flip", [1, -10, 3, 4], -0.5),
        ("copy", [1, 1, 3, 4], 2.25),
    ],
)
def test_what_is_sent_instead_and_what_the_mean_becomes(kind: str, sent: list[float], mean: float) -> None:
    seen = Seen()
    loop = fake_loop(Uniform(), poison=poison(kind, 1, scale=5.0), callbacks=[seen], num_rounds=1)
    loop.run()
    assert seen.received == [sent]
    assert adapters(loop) == [{"a": [mean, mean], "b": [mean, mean]}] * 4


def test_the_second_round_starts_from_what_the_first_made() -> None:
    """A scaled update is from the received adapter, here (1 + 10 + 3 + 4) / 4 = 4.5, not from zero."""
    seen = Seen()
    fake_loop(Uniform(), poison=poison("scale", 1, scale=5.0), callbacks=[seen], num_rounds=2).run()
    assert seen.received[1] == [5.5, 14.5, 7.5, 8.5]


@pytest.mark.parametrize(("kind", "scale"), [("not_finite", 1.0), ("scale", 1e39)])
def test_an_adapter_that_is_not_finite_is_refused(kind: str, scale: float) -> None:
    """The run stops, or the mean is that of the others, (1 + 3 + 4) / 3."""
    with pytest.raises(TrainingError, match="the server refuses a of client 1 in round 0: it has values that are not"):
        fake_loop(Uniform(), poison=poison(kind, 1, scale=scale)).run()
    how = {"on_failure": "skip"}
    loop = fake_loop(Uniform(), poison=poison(kind, 1, scale=scale), participation=how, num_rounds=1)
    result = loop.run()
    assert result.failed_clients == {"0": [1]}
    assert adapters(loop) == [{"a": [pytest.approx(8 / 3)] * 2, "b": [pytest.approx(8 / 3)] * 2}] * 4
    loop = fake_loop(FELLRec(), poison=poison(kind, 1, scale=scale), participation=how, num_rounds=1)
    loop.run()
    assert adapters(loop)[1] == {"a": [2, 2], "b": [2, 2]}, "where clients have models of their own it keeps its own"


def test_without_an_honest_client_in_the_round_nothing_is_copied() -> None:
    seen = Seen()
    how = {"rate": 0.25}
    fake_loop(Uniform(), poison=poison("copy", 0, 1, 2), callbacks=[seen], participation=how, num_rounds=6).run()
    values = [value for (value,) in seen.received]
    assert 0.0 in values
    assert any(value > 0 for value in values)


def test_only_what_leaves_a_client_is_replaced() -> None:
    """No parameter that a server trains for it or that is personal, no personal model, and nothing of a local rule."""
    loop = fake_loop(OnlyA(), poison=poison("sign_flip", 1), num_rounds=1)
    loop.run()
    assert adapters(loop)[1]["b"] == [2, 2]
    loop = fake_loop(Local(), poison=poison("sign_flip", 1), num_rounds=1)
    loop.run()
    assert adapters(loop)[1] == {"a": [2, 2], "b": [2, 2]}
    plain, poisoned = fake_loop(Ditto(), num_rounds=1), fake_loop(Ditto(), poison=poison("scale", 1), num_rounds=1)
    plain.run()
    poisoned.run()
    assert adapters(plain)[4:] == adapters(poisoned)[4:]
    assert adapters(plain)[0] != adapters(poisoned)[0]
    at_server = Exchange(Uniform(), Ledger(), at_server=lambda row, name: name == "b", poison=poison("not_finite", 0))
    job = fake_loop(Uniform()).population.job(0, 0)
    ones = StoredTensors({"a": torch.ones(2), "b": torch.ones(2)})
    trained = Trained(job, ones, StoredTensors({}), loss=0.0, num_samples=1, num_steps=1, seconds=0.0)
    assert "refuses a of client 0" in at_server.sent([trained], lambda row: True)[0].reason  # type: ignore[union-attr]
    at_server.poison = poison("scale", 0)
    (sent,) = at_server.sent([trained], lambda row: True)
    assert isinstance(sent, Trained)
    assert torch.equal(sent.adapter.tensors()["b"], torch.ones(2))
    assert not torch.equal(sent.adapter.tensors()["a"], torch.ones(2))


def test_transforms_are_applied_to_what_is_sent() -> None:
    """Clipping bounds a scaled update: of norm 20 · √4 = 40 to norm 1, 0.5 in each of the four entries."""
    from fellrec.federated.transforms import Clip

    seen = Seen()
    clip = [Clip(norm=1.0)]
    fake_loop(Uniform(), poison=poison("scale", 1), transforms=clip, callbacks=[seen], num_rounds=1).run()
    assert seen.received[0][1] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def data(tiny_overrides: list[str]) -> PreparedData:
    return build_data(compose(tiny_overrides))


@pytest.fixture(scope="module")
def recommender_of(tiny_overrides: list[str], data: PreparedData) -> Callable[..., Recommender]:
    return lambda *overrides: build_recommender(compose([*tiny_overrides, *overrides]), data)


def end_of_rounds(tiny_overrides: list[str], recommender: Recommender, *overrides: str) -> tuple[Seen, Any]:
    """What all clients have trained in two rounds, and the result."""
    seen = Seen()
    config = compose([*tiny_overrides, "aggregation=fedavg", *overrides])
    return seen, build_loop(config, recommender, [seen]).run()


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_off_and_kind_none_are_the_same_bits_and_honest_clients_train_the_same_until_they_receive_something_else(
    tiny_overrides: list[str], recommender_of: Callable[..., Recommender]
) -> None:
    runs = {}
    for kind in ("off", "none", "label_flip", "scale"):
        how = () if kind == "off" else ("poison.clients=[1]", f"poison.kind={kind}")
        runs[kind] = end_of_rounds(tiny_overrides, recommender_of(*how), *how)
    trained = {
        kind: [{row: t.adapter.tensors() for row, t in of_round.items()} for of_round in seen.trained]
        for kind, (seen, _) in runs.items()
    }
    for round_index in range(2):
        for row in range(3):
            assert same(trained["off"][round_index][row], trained["none"][round_index][row])
    for kind in ("label_flip", "scale"):
        assert same(trained["off"][0][0], trained[kind][0][0])
        assert same(trained["off"][0][2], trained[kind][0][2])
        assert not same(trained["off"][1][0], trained[kind][1][0])
    assert same(trained["off"][0][1], trained["scale"][0][1])
    assert not same(trained["off"][0][1], trained["label_flip"][0][1])
    off, none = (runs[kind][1].evaluation for kind in ("off", "none"))
    honest = none.per_client["ndcg_at_10"][[0, 2]]
    assert none.summary["honest_clients/ndcg_at_10/mean"] == pytest.approx(float(honest.mean()), rel=1e-12)
    inside = none.client_of_user != 1
    pooled = float(none.per_user["ndcg_at_10"][inside].mean())
    assert none.summary["honest_clients/ndcg_at_10/pooled"] == pytest.approx(pooled, rel=1e-12)
    assert {name: v for name, v in none.summary.items() if not name.startswith("honest_clients/")} == off.summary
    assert (off.poisoned, none.poisoned) == ((), (1,))


@pytest.mark.parametrize("one_target", [False, True])
def test_label_flip_replaces_each_target_of_its_clients_and_nothing_else(
    one_target: bool, recommender_of: Callable[..., Recommender]
) -> None:
    order = ["objective.order=newest_first"] if one_target else []
    plain, flipped = recommender_of(*order), recommender_of(*order, "poison.clients=[1]", "poison.kind=label_flip")
    for client in (None, 0, 1, 2):
        before, after = (one.datamodule._rows(client) for one in (plain, flipped))
        assert torch.equal(before.is_target, after.is_target)
        changed = before.items != after.items
        assert torch.equal(changed, before.is_target if client == 1 else torch.zeros_like(changed))
    pairs = set(zip(before_and_after(plain, flipped)[0], before_and_after(plain, flipped)[1], strict=True))
    assert len({first for first, _ in pairs}) == len({second for _, second in pairs}) == len(pairs), "a permutation"


def before_and_after(plain: Recommender, flipped: Recommender) -> tuple[list[int], list[int]]:
    """The targets of client 1."""
    return tuple(one.datamodule._rows(1).items[one.datamodule._rows(1).is_target].tolist() for one in (plain, flipped))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["poison.clients=[7]", "partition.num_clients=3"],
            r"clients=\[7\]: client 7 does not exist; choose from 0 to 2",
        ),
        (["poison.clients=[0,1]", "partition.num_clients=2"], "all 2 clients misbehave; leave at least one out"),
    ],
)
def test_clients_that_cannot_be_are_refused_before_data_are_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_classes(compose(overrides))


def test_rules_without_exchange_are_refused_unless_a_client_trains_on_other_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def config(rule: str, kind: str) -> Any:
        return compose([f"aggregation={rule}", "poison.clients=[1]", f"poison.kind={kind}"])

    for rule, kind in (("local", "sign_flip"), ("centralized", "label_flip")):
        with pytest.raises(ConfigError, match=f"poison.clients has no effect with aggregation={rule}, where no update"):
            check_transforms([config(rule, kind)])
    check_transforms([config("local", "label_flip")])
    assert not caplog.messages
    check_transforms([config("local", "sign_flip"), config("fedavg", "sign_flip")])
    assert "poison.clients has no effect with aggregation=local" in caplog.messages[0]


def test_a_client_without_users_does_not_make_the_honest_mean_undefined() -> None:
    metric = ClientRankingMetrics(3, (10,), poisoned=(0,))
    users = torch.tensor([0, 1])
    metric.update(users, torch.tensor([0, 1]), ranks=torch.tensor([0, 30]), rows=torch.tensor([0, 1]))
    summary = metric.evaluation("val", 0).summary
    assert (summary["honest_clients/hr_at_10/mean"], summary["honest_clients/num_users"]) == (0.0, 1.0)
    assert summary["hr_at_10/mean"] == 0.5


def test_fedavg_hides_single_adapters_from_its_rule_with_a_poisoned_client_too() -> None:
    seen = Seen()
    fake_loop(FedAvg(), FakeExecutor(), poison=poison("copy", 3), callbacks=[seen], num_rounds=1).run()
    assert seen.received == [[1, 2, 3, 1]]
