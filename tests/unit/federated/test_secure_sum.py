"""Secure sums: the protocol with and without drop-outs, plain sums bit for bit, what is refused, what it costs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop

from fellrec import aggregation
from fellrec.aggregation import FedAdam, FedAvg, FedProx, Uniform
from fellrec.aggregation.settings import RULES
from fellrec.config.compose import compose
from fellrec.errors import ConfigError, TrainingError
from fellrec.experiment.build import build_rule
from fellrec.experiment.classes import check_transforms
from fellrec.federated.masked_sum import Member, Server, threshold
from fellrec.federated.records import Trained, Updates
from fellrec.federated.secure_sum import secure_problems
from fellrec.federated.settings import ExchangeSettings
from fellrec.functional.fixed_point import Words, rounding_bound
from fellrec.state.tensor_store import StoredTensors

SECURE = ExchangeSettings(secure=True)


def vectors(num: int, word: int = 32) -> list[Words]:
    generator = np.random.default_rng(num)
    kind = np.uint32 if word == 32 else np.uint64
    return [generator.integers(0, 2**word, size=7, dtype=kind) for _ in range(num)]


def protocol(given: list[Words], silent: set[int], gone: set[int], late: set[int] = frozenset()) -> tuple[Words, Any]:  # type: ignore[assignment]
    """The sum, and everything that the server has received.

    Args:
        given: Each client's vector.
        silent: Clients that drop out after they have shared their secrets, before their vector arrives.
        gone: Clients that drop out after that.
        late: Clients that drop out before they have shared secrets.
    """
    members = [Member(number) for number in range(len(given))]
    keys = {member.number: member.publish() for member in members}
    sent = {member.number: member.share(keys) for member in members if member.number not in late}
    for member in members:
        if member.number in sent:
            member.receive({sender: shares[member.number] for sender, shares in sent.items()})
    server = Server(keys, list(sent))
    masked = {n: members[n].masked(given[n]) for n in sent if n not in silent}
    for number, vector in masked.items():
        server.add(number, vector)
    revealed = {n: members[n].reveal(server.arrived) for n in server.arrived if n not in gone}
    return server.unmask(revealed), (masked, revealed)


@pytest.mark.parametrize("word", [32, 64])
def test_whoever_drops_out_and_when_the_sum_is_that_of_the_vectors_that_arrived(word: int) -> None:
    given = vectors(10, word)
    kind = given[0].dtype
    for silent, gone in itertools.product([set(), {3}, {0, 6}], [set(), {1}]):
        total, _ = protocol(given, silent, gone)
        expected = np.sum([v for n, v in enumerate(given) if n not in silent], axis=0, dtype=kind)
        assert (total == expected).all(), (silent, gone)
    total, _ = protocol(given, {2}, set(), late={5})
    assert (total == np.sum([given[n] for n in (0, 1, 3, 4, 6, 7, 8, 9)], axis=0, dtype=kind)).all()


def test_more_drop_outs_than_a_third_cannot_be_recovered() -> None:
    with pytest.raises(TrainingError, match="client 0 does not reveal shares: 4 vectors have arrived"):
        protocol(vectors(7), {4, 5, 6}, set())
    with pytest.raises(TrainingError, match="secure sum: 4 of 7 clients revealed shares; needed are 5"):
        protocol(vectors(7), {6}, {4, 5})


def test_what_arrives_looks_random_and_no_client_reveals_both_of_anyones_secrets() -> None:
    """Masked zeros of two runs share no entry; each bit is set about as often as not (5 standard deviations)."""
    zeros = [np.zeros(4000, dtype=np.uint32)] * 4
    total, (masked, revealed) = protocol(zeros, {3}, set())
    assert not total.any()
    bits = np.unpackbits(masked[0].view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))
    assert (masked[0] == protocol(zeros, set(), set())[1][0][0]).mean() < 0.01
    for shares in revealed.values():
        assert not shares.seeds.keys() & shares.keys.keys()
        assert set(shares.keys) == {3}
    members = [Member(n) for n in range(3)]
    keys = {member.number: member.publish() for member in members}
    sent = {member.number: member.share(keys) for member in members}
    members[0].receive({n: own[0] for n, own in sent.items()})
    members[0].reveal([0, 1, 2])
    with pytest.raises(TrainingError, match="client 0 does not reveal shares"):
        members[0].reveal([0, 1])
    changed = {n: own[1] for n, own in sent.items()} | {2: sent[2][1][:-1] + bytes([sent[2][1][-1] ^ 1])}
    members[1].receive(changed)
    with pytest.raises(TrainingError, match="the share of client 2 for client 1 was changed"):
        members[1].reveal([0, 1, 2])


class Fractions(FakeExecutor):
    """Adds numbers that fixed point cannot represent."""

    def train(self, jobs: Any, events: Any) -> Any:
        for outcome in super().train(jobs, events):
            assert isinstance(outcome, Trained)
            generator = torch.Generator().manual_seed(outcome.row)
            own = {n: t + torch.randn(2, generator=generator) / 3 for n, t in outcome.adapter.tensors().items()}
            yield replace(outcome, adapter=StoredTensors(own))


@pytest.mark.parametrize("rule", [FedAvg, Uniform, FedProx, FedAdam])
@pytest.mark.parametrize("num_clients", [4, 7])
def test_a_run_is_the_plain_one_within_the_rounding_of_its_clients(rule: Any, num_clients: int) -> None:
    """One round: n 2^-(bits + 1), and the float32 of the result; FedAdam divides the mean by at least τ = 1e-3."""
    plain, secure = (fake_loop(rule(), Fractions(), num_clients, secure=how, num_rounds=1) for how in (None, SECURE))
    plain.run()
    secure.run()
    scale = 1e3 if rule is FedAdam else 1.0
    for left, right in zip(adapters(plain), adapters(secure), strict=True):
        for name in left:
            difference = np.abs(np.subtract(left[name], right[name])).max()
            assert difference <= scale * rounding_bound(num_clients, 24) + 2 * np.spacing(
                np.float32(np.abs(left[name]).max())
            )


def test_the_sum_is_the_fixed_point_sum_of_the_plain_vectors_bit_for_bit() -> None:
    """Weights 1/10 … 4/10 times the adapters 1 … 4, each rounded to 2^-24 by Python's fractions, and added."""
    loop = fake_loop(FedAvg(), secure=SECURE, num_rounds=1)
    loop.run()
    total = sum(round((n + 1) / 10 * (n + 1) * 2**24) for n in range(4)) / 2**24
    assert adapters(loop)[0]["a"] == [float(np.float32(total))] * 2


def test_drop_outs_of_a_run_are_recovered_and_counted() -> None:
    """Six clients, client 2 fails: the mean is that of the others, and what it and the others send is in the ledger."""
    executor = FakeExecutor(fails=lambda job: job.row == 2)
    how: dict[str, Any] = {"on_failure": "skip"}
    loop = fake_loop(Uniform(), executor, 6, participation=how, secure=SECURE, num_rounds=1)
    loop.run()
    assert adapters(loop)[0]["a"] == [pytest.approx((1 + 2 + 4 + 5 + 6) / 5, abs=rounding_bound(5, 24) + 1e-6)] * 2
    ledger = loop.exchange.ledger
    # Two parameters of two entries of 32 bits; no plain adapter goes up.
    assert ledger.total(direction="up", kind="masked") == 5 * 4 * 4
    assert ledger.total(direction="up", kind="adapter") == 0
    # Two keys of 32 bytes; five shares of both secrets (66 bytes) with number, nonce and tag; six shares when unmasking.
    published, shared, revealed = 64, 5 * (4 + 12 + 66 + 16), 6 * (4 + 33)
    assert ledger.total(client=0, direction="up", kind="key") == published + shared + revealed
    assert ledger.total(client=2, direction="up", kind="key") == published + shared
    assert ledger.total(client=2, direction="down", kind="key") == 5 * (4 + 64) + shared
    assert ledger.total(client=0, direction="down", kind="key") == 5 * (4 + 64) + shared + 5 * 4


def test_too_many_drop_outs_end_the_run() -> None:
    executor = FakeExecutor(fails=lambda job: job.row < 2)
    how: dict[str, Any] = {"on_failure": "skip", "quorum": 0.1}
    with pytest.raises(
        TrainingError, match="exchange.secure: 2 of 4 clients have sent their update; needed are at lea"
    ):
        fake_loop(Uniform(), executor, participation=how, secure=SECURE).run()
    with pytest.raises(TrainingError, match="exchange.secure: 2 of 2 clients have sent their update; .* at least 3"):
        fake_loop(Uniform(), num_clients=2, secure=SECURE).run()
    assert threshold(4) == 3


class Twice(FedAvg):
    """Asks for two sums."""

    sees = "sums"

    def aggregate(self, updates: Updates, round_index: int) -> Any:
        updates.weighted_sums(torch.tensor([1.0, 0, 0, 0]))
        return super().aggregate(updates, round_index)


def test_a_second_sum_of_a_round_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(TrainingError, match="aggregation twice asks for a second sum of one round"):
        fake_loop(Twice(), secure=SECURE).run()

    class Huge(FakeExecutor):
        def train(self, jobs: Any, events: Any) -> Any:
            for outcome in super().train(jobs, events):
                outcome.adapter.tensors()["a"].mul_(1e4)  # type: ignore[union-attr]
                yield outcome

    with pytest.raises(
        TrainingError, match="exchange.secure: client 0 has an entry of 2500 times its weight, and 4 cl"
    ):
        fake_loop(Uniform(), Huge(), secure=SECURE).run()
    wide = ExchangeSettings(secure=True, secure_word=64)
    fake_loop(Uniform(), Huge(), secure=wide, num_rounds=1).run()


SUMS = {
    *(
        "fedavg",
        "uniform",
        "fedprox",
        "fedavgm",
        "fedadagrad",
        "fedadam",
        "fedyogi",
        "fednova",
        "term",
        "ditto",
        "apfl",
    ),
    *("fedper", "fedrep", "ffa_lora", "rolora", "fedsa_lora", "fedsvd", "fed_sb"),
}
"""Rules that need one sum a round."""


@pytest.mark.parametrize("kind", RULES)
def test_rules_that_need_more_than_one_sum_are_refused_by_name(kind: str) -> None:
    rule = getattr(aggregation, kind.rpartition(".")[2])()
    found = list(secure_problems(rule, {"exchange": {"secure": True}}))
    if rule.name in SUMS or rule.sees == "nothing":
        assert not found
        return
    assert all(
        line.startswith(f"aggregation {rule.name} ") and "exchange.secure=true is not allowed" in line for line in found
    )
    assert any(why in found[0] for why in ("reads every client's adapter", "one by one, which are not", "asynchronous"))


def test_a_rule_is_refused_with_its_reason_when_it_is_built() -> None:
    message = (
        "aggregation krum reads every client's adapter, and with secure sums the server has none of them: exchange.s"
    )
    with pytest.raises(ConfigError, match=message):
        build_rule(compose(["aggregation=krum", "exchange.secure=true"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split.transport=inprocess", "split.transport=inprocess: the server trains the body for each client"),
        ("exchange.transforms=[quantise]", "not allowed with the transform quantise: what it sends cannot be added"),
        ("exchange.transforms=[clip,topk]", "not allowed with the transform topk"),
        (
            "exchange.secure_bits=30",
            "secure_bits=30 is not allowed with exchange.secure_word=32: a number of at most 28",
        ),
    ],
)
def test_settings_that_cannot_be_combined(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_rule(compose(["aggregation=fedavg", "exchange.secure=true", override]))


def test_rules_without_exchange_are_told() -> None:
    with pytest.raises(
        ConfigError, match="exchange.secure has no effect with aggregation=local, .*; use exchange.secure=f"
    ):
        check_transforms([compose(["aggregation=local", "exchange.secure=true"])])


def test_clipped_updates_are_summed() -> None:
    """Client n adds n + 1 to four entries, of norm 2 (n + 1): all clipped to 0.5 in each entry."""
    from fellrec.federated.transforms import Clip

    loop = fake_loop(Uniform(), transforms=[Clip(norm=1.0)], secure=SECURE, num_rounds=1)
    loop.run()
    assert adapters(loop)[0]["a"] == [pytest.approx(0.5, abs=1e-6)] * 2
