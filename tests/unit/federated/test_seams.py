"""Each seam of the round, used as its first user will, without a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop, parts, resumed, trained
from torch import Tensor

from fellrec.aggregation import AggregationCallback, FedAvg, Local
from fellrec.callbacks.mlflow_logging import ClientMetrics, round_metrics
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.exchange import Transform
from fellrec.federated.population import Population
from fellrec.federated.populations import SharedAndPersonal
from fellrec.federated.records import Aggregated, Cohort, Job, RoundRecord, Updates
from fellrec.federated.samplers import PowerOfChoiceSampler
from fellrec.federated.settings import PowerOfChoiceSamplerSettings
from fellrec.state.tensor_store import StoredTensors


class Rounds(FederatedCallback):
    """Keeps what the callbacks of a run receive."""

    def __init__(self) -> None:
        self.updates: list[Updates] = []
        self.jobs: list[Job] = []
        self.records: list[RoundRecord] = []

    def on_client_start(self, job: Job) -> None:
        self.jobs.append(job)

    def on_aggregate_start(self, updates: Updates) -> None:
        self.updates.append(updates)

    def on_round_end(self, record: RoundRecord) -> None:
        self.records.append(record)


class ServerMomentum(AggregationCallback):
    """FedAvgM: u ← 0.5 u + mean update, every client moves by u; u is a tensor of the rule."""

    def __init__(self) -> None:
        self.momentum: dict[str, Tensor] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        start, end = dict(updates.start), dict(updates.end)
        for name, tensor in end.items():
            mean = (tensor - start[name]).mean(dim=0)
            self.momentum[name] = 0.5 * self.momentum.get(name, torch.zeros_like(mean)) + mean
        return Aggregated({name: start[name] + self.momentum[name] for name in end})

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "rounds": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.momentum = state["momentum"]


def test_tensors_of_a_rule_are_in_checkpoints(tmp_path: Path) -> None:
    """The mean update is 2.5: u = 2.5, 3.75, 4.375, and every adapter is their sum."""
    whole = fake_loop(ServerMomentum())
    whole.run()
    first = fake_loop(ServerMomentum(), num_rounds=1)
    first.run()
    second = resumed(first, tmp_path, rule=ServerMomentum())
    second.run()
    assert adapters(second) == adapters(whole) == [{"a": [10.625] * 2, "b": [10.625] * 2}] * 4


class Forgetful(FedAvg):
    """Lets all clients forget their moments, as a new initialisation needs."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        return replace(super().aggregate(updates, round_index), resets=tuple(updates.end))


def test_checkpoints_without_moments_share_no_file(tmp_path: Path) -> None:
    """As in a comparison: two runs of one process, each of which must be whole in its own folder."""
    for name in ("first", "second"):
        loop = fake_loop(Forgetful())
        loop.run()
        CheckpointFolder(tmp_path / name).save(parts(loop), 3)
        assert CheckpointFolder(tmp_path / name).rounds() == [3]


class Controls(FedAvg):
    """Sends every client a tensor, and reads what the clients return."""

    client_tensors = ("seen",)

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        mixed = super().aggregate(updates, round_index)
        number = torch.full((len(updates.clients), 1), float(round_index))
        return Aggregated(mixed.adapters, tensors={"control": {"a": number}})


def test_tensors_of_a_client_come_with_its_jobs_and_survive_a_resume(tmp_path: Path) -> None:
    """The executor returns ``seen``; the rule sends ``control``. A client that is absent keeps both."""
    how = {"num_clients": 6, "participation": {"rate": 0.5}}
    rounds = Rounds()
    loop = fake_loop(Controls(), FakeExecutor(has_tensors=True), callbacks=[rounds], num_rounds=2, **how)
    loop.run()
    assert rounds.updates[1].tensors["seen"]["a"].tolist() == [[1.0]] * 3
    last = {row: r.round_index for r in rounds.records for row in (t.row for t in r.trained)}
    other = resumed(loop, tmp_path, rule=Controls(), **how)
    for row in range(6):
        found = {key: tensor.tolist() for key, tensor in other.population.job(row, 2).tensors.tensors().items()}
        expected = {"seen|a": [float(last[row])], "control|a": [float(last[row])]} if row in last else {}
        assert found == expected, row
    traffic = loop.exchange.ledger.total(round=1, kind="adapter")
    assert traffic == 3 * (2 * 2 * 2 * 4 + 2 * 4), "two parameters of two float32 up and down, and a tensor each way"


class Alternating(FedAvg):
    """RoLoRA's pattern: one half of the adapter trains in a round."""

    def trains(self, name: str, round_index: int) -> bool:
        return name == ("b" if round_index % 2 == 0 else "a")


def test_only_the_trained_parameters_train_travel_and_are_counted() -> None:
    rounds = Rounds()
    loop = fake_loop(Alternating(), num_rounds=2, callbacks=[rounds])
    loop.run()
    assert [job.trains for job in rounds.jobs] == [("b",)] * 4 + [("a",)] * 4
    assert [sorted(updates.end) for updates in rounds.updates] == [["b"], ["a"]]
    assert adapters(loop) == [{"a": [3.0, 3.0], "b": [3.0, 3.0]}] * 4
    for direction in ("up", "down"):
        assert loop.exchange.ledger.total(round=0, direction=direction, kind="adapter") == 4 * 2 * 4


class MovesTheFrozenHalf(Alternating):
    """FedSVD's pattern: the server changes what the clients did not train."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        mixed = super().aggregate(updates, round_index)
        (name,) = updates.model.keys() - updates.end.keys()
        moved = (updates.model[name] + 10).expand(len(updates.clients), -1)
        return Aggregated({**mixed.adapters, name: moved}, metrics={"moved": 10.0, "no": math.inf})


def test_a_rule_knows_what_was_not_trained_and_may_change_it() -> None:
    """It travels down only: 2 float32 up, 4 down. Finite figures of the rule are among the metrics of the round."""
    rounds = Rounds()
    loop = fake_loop(MovesTheFrozenHalf(), num_rounds=2, callbacks=[rounds])
    loop.run()
    assert {n: t.tolist() for n, t in rounds.updates[1].model.items()} == {"a": [10.0, 10.0], "b": [3.0, 3.0]}
    assert adapters(loop) == [{"a": [13.0, 13.0], "b": [13.0, 13.0]}] * 4
    sizes = {way: loop.exchange.ledger.total(round=1, direction=way, kind="adapter") for way in ("up", "down")}
    assert sizes == {"up": 4 * 2 * 4, "down": 4 * 4 * 4}
    figures = {name: v for name, v in round_metrics(rounds.records[0]).items() if name.startswith("aggregation/")}
    assert figures == {"aggregation/moved": 10.0}


class SharedA(AggregationCallback):
    """FedSA's pattern: parameter ``a`` is averaged, ``b`` stays at its client."""

    def exchanges(self, name: str, round_index: int) -> bool:
        return name == "a"

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        n = len(updates.clients)
        return torch.full((n, n), 1 / n, dtype=torch.float64)


class TwoGroups(AggregationCallback):
    """A matrix for each group of parameters: ``a`` is averaged, ``b`` goes to the next client."""

    def group_of(self, name: str) -> str:
        return name

    def mixing_matrix(self, updates: Updates, round_index: int) -> Mapping[str, Tensor]:
        n = len(updates.clients)
        return {"a": torch.full((n, n), 1 / n, dtype=torch.float64), "b": torch.eye(n).roll(1, dims=0)}


def test_parameters_can_stay_personal() -> None:
    loop = fake_loop(SharedA())
    loop.run_round(0)
    assert adapters(loop) == [{"a": [2.5, 2.5], "b": [row + 1.0] * 2} for row in range(4)]
    assert loop.exchange.ledger.total(direction="up", kind="adapter") == 4 * 2 * 4


def test_groups_of_parameters_have_matrices_of_their_own() -> None:
    rounds = Rounds()
    loop = fake_loop(TwoGroups(), num_rounds=1, callbacks=[rounds])
    loop.run()
    assert adapters(loop) == [{"a": [2.5, 2.5], "b": [float((row - 1) % 4 + 1)] * 2} for row in range(4)]
    assert set(rounds.records[0].aggregated.matrices) == {"mixing_a", "mixing_b"}


class SumsOnly(AggregationCallback):
    """As under secure aggregation: only a weighted sum is read."""

    sees = "sums"

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        n = len(updates.clients)
        mean = updates.weighted_sums(torch.full((n,), 1 / n))
        return Aggregated({name: tensor.expand(n, *tensor.shape) for name, tensor in mean.items()})


class Curious(SumsOnly):
    """Declares sums and reads adapters."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        return Aggregated(dict(updates.end))


def test_a_rule_that_sees_sums_cannot_read_adapters() -> None:
    loop = fake_loop(SumsOnly())
    loop.run_round(0)
    assert adapters(loop) == [{"a": [2.5, 2.5], "b": [2.5, 2.5]}] * 4
    with pytest.raises(TrainingError, match="aggregation curious declares sees='sums' and reads single adapters"):
        fake_loop(Curious()).run_round(0)
    with pytest.raises(TypeError, match="unknown value of sees 'all'; choose from: adapters, nothing, sums"):
        type("All", (FedAvg,), {"sees": "all"})


def test_what_a_rule_sees_decides_what_is_sent() -> None:
    local, mixed = fake_loop(Local(), num_rounds=1), fake_loop(num_rounds=1)
    local.run()
    mixed.run()
    assert not local.exchange.ledger.rows()
    assert adapters(local) == [{"a": [row + 1.0] * 2, "b": [row + 1.0] * 2} for row in range(4)]
    assert mixed.exchange.ledger.total(direction="up", kind="scalar") == 4 * 16, "loss and number of samples"


class Shrinking(Local):
    """A rule of a user that exchanges nothing and changes every client's adapter on its own."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        return Aggregated({name: 0.5 * tensor for name, tensor in updates.end.items()})


def test_a_rule_that_exchanges_nothing_can_change_adapters() -> None:
    loop = fake_loop(Shrinking())
    loop.run_round(0)
    assert adapters(loop) == [{"a": [(row + 1) / 2] * 2, "b": [(row + 1) / 2] * 2} for row in range(4)]
    assert not loop.exchange.ledger.rows()


class NeedsLoss(FedAvg):
    """q-FFL's pattern."""

    needs_start_loss = True


def test_the_loss_at_the_received_adapter_is_measured_on_request() -> None:
    asked, not_asked = Rounds(), Rounds()
    fake_loop(NeedsLoss(), callbacks=[asked]).run_round(0)
    fake_loop(callbacks=[not_asked]).run_round(0)
    assert asked.updates[0].start_losses is not None
    assert asked.updates[0].start_losses.tolist() == [2.0] * 4
    assert not_asked.updates[0].start_losses is None


class BestOfAll(FedAvg):
    """Clients train the best of all clients' current adapters, by their own losses."""

    population = Population

    def candidates(self, row: int, adapters: Any, round_index: int) -> Any:
        return () if round_index == 0 or row == 1 else adapters

    def start(self, row: int, candidates: Any, losses: Tensor) -> Mapping[str, Tensor]:
        assert losses.tolist() == [-float(adapter.tensors()["a"].mean()) for adapter in candidates]
        return candidates[int(losses.argmin())].tensors()

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        return Aggregated({})


@pytest.mark.parametrize("on_disk", [False, True])
def test_clients_measure_losses_of_adapters_and_start_from_what_the_rule_makes_of_them(
    on_disk: bool, tmp_path: Path
) -> None:
    """After the first round client 3 has the largest adapter, 4: the others but client 1 start from it."""
    rounds = Rounds()
    loop = fake_loop(BestOfAll(), callbacks=[rounds], num_rounds=2)
    if on_disk:
        loop.population.persist(tmp_path)
    loop.run()
    assert [row["a"][0] for row in adapters(loop)] == [5.0, 4.0, 7.0, 8.0]
    assert rounds.updates[1].start["a"][:, 0].tolist() == [4.0, 2.0, 4.0, 4.0]
    ledger = loop.exchange.ledger
    for client, num_candidates in ((0, 3), (1, 0), (3, 3)):  # its own is not sent
        where = {"client": client, "round": 1}
        assert ledger.total(**where, direction="down", kind="adapter") == num_candidates * 16
        assert ledger.total(**where, direction="up", kind="scalar") == 16 + (32 if num_candidates else 0)


@pytest.mark.parametrize("is_same", [True, False])
def test_what_was_trained_from_another_start_is_not_taken_after_a_stop(is_same: bool, tmp_path: Path) -> None:
    """Client 0 starts round 1 from client 3's adapter; it trains again if that is another one."""
    first = fake_loop(BestOfAll())
    first.population.persist(tmp_path / "checkpoints" / "tensors")
    first.run_round(0)
    CheckpointFolder(tmp_path / "checkpoints").save(parts(first), 1)
    cohort = Cohort(round_index=1, rows=(0,), start_rounds=(1,), num_needed=1)
    first.population.keep(trained(first.jobs(cohort)[0]))
    second = fake_loop(BestOfAll())
    second.population.persist(tmp_path / "checkpoints" / "tensors")
    CheckpointFolder(tmp_path / "checkpoints").load(parts(second))
    if not is_same:
        second.population.bank.store(3, {name: torch.full((2,), 9.0) for name in "ab"})
    assert (second.population.recover(second.jobs(cohort)[0]) is not None) == is_same


def test_a_client_that_fails_keeps_its_own_adapter_and_not_what_it_started_from() -> None:
    fails = FakeExecutor(fails=lambda job: (job.row, job.round_index) == (0, 1))
    loop = fake_loop(BestOfAll(), fails, num_rounds=2, participation={"on_failure": "skip"})
    loop.run()
    assert [row["a"][0] for row in adapters(loop)] == [1.0, 4.0, 7.0, 8.0]


def test_power_of_choice_trains_the_clients_with_the_largest_losses() -> None:
    """All four clients measure; the loss is minus the adapter, which is smallest for those that have trained least."""
    rounds = Rounds()
    sampler = PowerOfChoiceSampler(PowerOfChoiceSamplerSettings(num_candidates=4))
    loop = fake_loop(Local(), callbacks=[rounds], participation={"rate": 0.5}, sampler=sampler, num_rounds=3)
    loop.run()
    cohorts = [updates.clients for updates in rounds.updates]
    assert cohorts == [(0, 1), (2, 3), (0, 1)], "ties by number, then the untrained ones, then the adapters 1 and 2"


class ChangesTheBase(Local):
    """Adds a change in every round."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        factors = {"w|left": torch.ones(2, 1), "w|right": torch.full((1, 2), float(round_index))}
        return replace(super().aggregate(updates, round_index), base=factors)


def test_each_selected_adapter_belongs_to_the_base_that_it_was_evaluated_with(tmp_path: Path) -> None:
    """The clients' best rounds are 1, 0 and the start, see the test of selection: after 2, 1 and 0 changes."""
    how = {"num_clients": 3, "select": "client", "num_rounds": 4}
    loop = fake_loop(ChangesTheBase(), FakeExecutor(best=8.0), **how)
    result = loop.run()
    assert [len(base) for base in result.bases] == [2, 1, 0]
    assert [len(job.base) for job in loop.selection.score_jobs()] == [2, 1, 0]
    assert result.bases[0][1].tensors()["w|right"].tolist() == [[1.0, 1.0]]
    other = resumed(loop, tmp_path, rule=ChangesTheBase(), **how)
    assert [len(base) for base in other.selection.bases] == [2, 1, 0]
    assert len(other.population.base) == 4


@pytest.mark.parametrize("factors", [{"absent|left": 1}, {"weight|left": 1}, {"weight": 1}])
def test_a_change_of_something_that_is_not_in_the_base_is_refused(factors: dict[str, int]) -> None:
    """In the whole model; one side of a cut has some of the weights only."""
    model, change = torch.nn.Linear(2, 2), StoredTensors({name: torch.ones(2, 1) for name in factors})
    with pytest.raises(TrainingError, match=r"the factors NAME\|left and NAME\|right"):
        BaseWeights(model, is_whole=True).use([change])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"B": (4, 2)}, r"returned B \[2\], but the adapter has no such"),
        ({"a": (4, 3)}, r"a \[3\], but .* shape \[2\]"),
    ],
)
def test_a_part_of_an_adapter_that_does_not_fit_is_refused(returned: dict[str, Any], message: str) -> None:
    class Wrong(FedAvg):
        def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
            return Aggregated({name: torch.zeros(shape) for name, shape in returned.items()})

    with pytest.raises(TrainingError, match=message):
        fake_loop(Wrong()).run_round(0)


@pytest.mark.parametrize("shape", [(1,), (2, 1)])
def test_a_transform_that_decodes_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Adding it to the received adapter would broadcast."""

    class Flat(Transform):
        def decode(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {name: torch.ones(shape) for name in payload}

    with pytest.raises(TrainingError, match=r"Flat decoded shape .* for a, expected shape \[2\]"):
        fake_loop(transforms=[Flat()]).run_round(0)


def test_a_transform_that_loses_a_parameter_is_refused() -> None:
    class Loses(Transform):
        def decode(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {"a": payload["a"]}

    with pytest.raises(TrainingError, match="Loses decoded nothing for b"):
        fake_loop(transforms=[Loses()]).run_round(0)


def test_keys_of_a_state_that_json_would_change_are_refused(tmp_path: Path) -> None:
    class Counts(FedAvg):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {3: 1}}

    loop = fake_loop(Counts())
    with pytest.raises(TypeError, match=r"the state rule/seen has keys that are not text: \[3\]"):
        resumed(loop, tmp_path, rule=Counts())


def test_a_state_may_have_any_names(tmp_path: Path) -> None:
    class Named(FedAvg):
        loaded: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"tensor": {"tensor": torch.ones(1)}, "stored": {"stored": "text"}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    other = resumed(fake_loop(Named()), tmp_path, rule=Named())
    assert other.rule.loaded == {"tensor": {"tensor": torch.ones(1)}, "stored": {"stored": "text"}}  # type: ignore[attr-defined]


def test_a_rule_that_sees_nothing_mixes_nothing_whatever_its_matrix() -> None:
    class Blind(AggregationCallback):
        sees = "nothing"

        def mixing_matrix(self, updates: Updates, round_index: int) -> dict[str, Tensor]:
            return {"": torch.full((4, 4), 0.25)}

    loop = fake_loop(Blind())
    loop.run_round(0)
    assert [row["a"][0] for row in adapters(loop)] == [1.0, 2.0, 3.0, 4.0]


def test_the_model_that_is_served_must_exist() -> None:
    with pytest.raises(ConfigError, match="'share'"):
        fake_loop(type("Rule", (TwoModels,), {"serves": "share"})())


class TwoModels(FedAvg):
    """Ditto's pattern: a shared and a personal model a client."""

    population = SharedAndPersonal


@pytest.mark.parametrize("serves", ["personal", "shared"])
def test_a_client_can_have_a_shared_and_a_personal_model(serves: str, tmp_path: Path) -> None:
    """Rows 0 and 1 are shared: (1·1 + 2·2) / 3 a round; rows 2 and 3 are personal: 3 and 4 a round."""
    rule = type("Rule", (TwoModels,), {"serves": serves})
    rounds = Rounds()
    loop = fake_loop(rule(), num_clients=2, num_rounds=1, callbacks=[rounds])
    loop.run()
    assert [job.data_of for job in rounds.jobs] == [0, 1, 0, 1]
    assert [sorted(job.anchors) for job in rounds.jobs] == [[], [], ["shared"], ["shared"]]
    assert rounds.updates[0].clients == (0, 1), "personal rows never leave their client"
    other = resumed(loop, tmp_path, rule=rule(), num_clients=2, num_rounds=2)
    result = other.run()
    shared, personal = 10 / 3, [6.0, 8.0]
    assert other.population.bank.row(0)["a"].tolist() == pytest.approx([shared] * 2)
    assert [other.population.bank.row(row)["a"][0].item() for row in (2, 3)] == personal
    served = [stored.tensors()["a"][0].item() for stored in result.served]
    assert served == (personal if serves == "personal" else pytest.approx([shared] * 2))


class Log:
    """Keeps metrics as MLflow's log does."""

    run_dir = Path()

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], *_: Any, **__: Any) -> None:
        self.metrics |= metrics


def test_metrics_of_clients_with_two_models_name_clients() -> None:
    """Row 2 is client 0's personal model; the values of a rule are those of the shared ones."""

    class Speeds(TwoModels):
        def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
            return replace(super().aggregate(updates, round_index), per_client={"speed": torch.tensor([0.25, 0.75])})

    log = Log()
    metrics = ClientMetrics(log)  # type: ignore[arg-type]
    metrics.on_round_end(fake_loop(Speeds(), num_clients=2).run_round(0))
    assert {name: value for name, value in log.metrics.items() if "seconds" not in name} == {
        "train/loss/client/00": 1.0,
        "train/loss/client/01": 0.5,
        "train/personal_loss/client/00": 1 / 3,
        "train/personal_loss/client/01": 0.25,
        "aggregation/speed/client/00": 0.25,
        "aggregation/speed/client/01": 0.75,
    }


class Clip(Transform):
    """Clips every client's update to norm 1."""

    def encode(self, payload: Mapping[str, Tensor], row: int, round_index: int) -> Mapping[str, Tensor]:
        norm = torch.cat([tensor.flatten() for tensor in payload.values()]).norm()
        return {name: tensor / norm.clamp(min=1.0) for name, tensor in payload.items()}


class Int8(Transform):
    """Quantises with one scale a parameter, and keeps each client's error for its next update."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, Tensor]] = {}

    def encode(self, payload: Mapping[str, Tensor], row: int, round_index: int) -> Mapping[str, Tensor]:
        kept, encoded = self.errors.setdefault(str(row), {}), {}
        for name, tensor in payload.items():
            value = tensor + kept.get(name, torch.zeros_like(tensor))
            scale = value.abs().max() / 127
            codes = (value / scale).round().to(torch.int8)
            encoded |= {f"{name}|codes": codes, f"{name}|scale": scale}
            kept[name] = value - codes * scale
        return encoded

    def decode(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        names = {key.partition("|")[0] for key in payload}
        return {name: payload[f"{name}|codes"] * payload[f"{name}|scale"] for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors = state["errors"]


def test_updates_go_through_the_chain_and_sizes_are_those_of_the_payload(tmp_path: Path) -> None:
    """An update of norm 1 has four equal entries of 1/2; int8 holds 127 steps of it exactly."""
    how = {"transforms": [Clip(), Int8()], "rule": FedAvg()}
    loop = fake_loop(num_rounds=1, **how)
    loop.run()
    for adapter in adapters(loop):
        assert adapter["a"] == pytest.approx([0.5, 0.5])
    per_client = 2 * (2 * 1 + 4)  # two parameters of two int8 codes and a float32 scale
    assert loop.exchange.ledger.total(direction="up", kind="adapter") == 4 * per_client
    assert loop.exchange.ledger.total(direction="down", kind="adapter") == 4 * 2 * 2 * 4
    whole = fake_loop(num_rounds=3, transforms=[Clip(), Int8()])
    whole.run()
    second = resumed(loop, tmp_path, transforms=[Clip(), Int8()])
    second.run()
    assert adapters(second) == adapters(whole), "the errors that clients keep are in checkpoints"


def test_a_start_round_comes_with_every_update() -> None:
    rounds = Rounds()
    fake_loop(callbacks=[rounds], num_rounds=2).run()
    assert [updates.start_rounds for updates in rounds.updates] == [(0,) * 4, (1,) * 4]


def test_callbacks_have_states_too(tmp_path: Path) -> None:
    """JSON, tensors and stored versions come back as they were, wherever they are in a state."""
    from fellrec.state.tensor_store import StoredTensors

    class Part:
        state: dict[str, Any] = {
            "numbers": [1, 2.5, None, -float("inf")],
            "nested": {
                "tensor": torch.tensor([1.5]),
                "stored": [StoredTensors({"x": torch.ones(2, dtype=torch.int64)})],
            },
        }

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.found = state

    CheckpointFolder(tmp_path).save({"part": Part()}, 4)
    part = Part()
    assert CheckpointFolder(tmp_path).load({"part": part}) == 4
    assert part.found["numbers"] == [1, 2.5, None, -float("inf")]
    assert part.found["nested"]["tensor"].tolist() == [1.5]
    assert part.found["nested"]["stored"][0].tensors()["x"].tolist() == [1, 1]


def test_an_executor_needs_four_methods() -> None:
    assert {name for name in vars(FakeExecutor) if not name.startswith("_")} == {"train", "measure", "score", "close"}


def test_a_rule_that_forgets_to_return_is_refused_by_name() -> None:
    class Forgets(AggregationCallback):
        def aggregate(self, updates, round_index):  # type: ignore[no-untyped-def]
            self.combine(updates, torch.eye(len(updates.clients)))

    with pytest.raises(TrainingError, match="aggregation forgets: aggregate returned NoneType; needed is Aggregated"):
        fake_loop(rule=Forgets()).run()
