"""The laws themselves: rules that are broken on purpose are found by the laws that are meant to find them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fellrec.aggregation import AggregationCallback, FELLRec
from fellrec.aggregation.conformance import check_rule
from fellrec.aggregation.laws import EXCLUDED, LAWS
from fellrec.aggregation.settings.about import Limits
from fellrec.cli.main import main
from fellrec.errors import ConfigError
from fellrec.federated.population import Population
from fellrec.federated.populations import ModelVersions, SharedModel
from fellrec.federated.records import Aggregated


def mean_of(updates):
    """Everybody gets the mean of what everybody sent."""
    return {name: v.mean(dim=0, keepdim=True).expand_as(v).clone() for name, v in updates.end.items()}


def uniform(updates):
    n = len(updates.clients)
    return torch.full((n, n), 1 / n, dtype=torch.float64)


class Good(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return uniform(updates)


class EditsInputs(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        for value in updates.end.values():
            value.clamp_(-0.1, 0.1)
        return uniform(updates)


class ReturnsInputs(AggregationCallback):
    def aggregate(self, updates, round_index):
        return Aggregated(updates.end)


class FirstOfTheList(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return torch.eye(len(updates.clients))[torch.zeros(len(updates.clients), dtype=torch.long)]


class FirstNumber(AggregationCallback):
    """Looks at the clients' numbers, not at their places."""

    def mixing_matrix(self, updates, round_index):
        first = updates.clients.index(min(updates.clients))
        return torch.eye(len(updates.clients))[torch.full((len(updates.clients),), first)]


class LosesState(AggregationCallback):
    """A momentum that no checkpoint has."""

    population = SharedModel

    def __init__(self):
        self.momentum = {}

    def aggregate(self, updates, round_index):
        start, mean = updates.mean_update(self.name, self.client_weights(updates, "equal"))
        self.momentum = {name: 0.5 * self.momentum.get(name, 0) + change for name, change in mean.items()}
        return self.shared(updates, {name: start[name] + self.momentum[name] for name in mean})


class ForgetsHooks(AggregationCallback):
    """Counts rounds in a hook, and no checkpoint has the count."""

    def __init__(self):
        self.rounds = 0

    def on_round_end(self, record):
        self.rounds += 1

    def mixing_matrix(self, updates, round_index):
        own = min(1.0, 0.2 * self.rounds)
        return own * torch.eye(len(updates.clients)).double() + (1 - own) * uniform(updates)


class DividesByZero(AggregationCallback):
    def update_weights(self, updates, round_index):
        return updates.losses / updates.losses.sum()


class ReadsThoughSums(AggregationCallback):
    sees = "sums"

    def aggregate(self, updates, round_index):
        return Aggregated(mean_of(updates))


class ReturnsThoughNothing(AggregationCallback):
    sees = "nothing"

    def aggregate(self, updates, round_index):
        return Aggregated({name: value * 1 for name, value in updates.end.items()})


class RowsOfTwo(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return 2 * uniform(updates)


class Negative(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return 2 * torch.eye(len(updates.clients)) - uniform(updates)


class Unseeded(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return torch.softmax(torch.randn(len(updates.clients), len(updates.clients)).double(), dim=1)


class Widens(AggregationCallback):
    def aggregate(self, updates, round_index):
        return Aggregated({name: value.double() for name, value in mean_of(updates).items()})


class OnlyFloat32(AggregationCallback):
    def aggregate(self, updates, round_index):
        return Aggregated({name: value.float() for name, value in mean_of(updates).items()})


class Drifts(AggregationCallback):
    """Moves by a constant, whatever clients do."""

    def aggregate(self, updates, round_index):
        return Aggregated({name: value + 0.25 for name, value in mean_of(updates).items()})


class HalfTheWay(AggregationCallback):
    def aggregate(self, updates, round_index):
        return Aggregated({name: (updates.start[name] + value) / 2 for name, value in updates.end.items()})


class NeedsTwo(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        n = len(updates.clients)
        return (1 - torch.eye(n)) / (n - 1)


class AtMostFifty(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return uniform(updates)[:50, :50]


class ExchangesNothing(AggregationCallback):
    def exchanges(self, name, round_index):
        return False

    def mixing_matrix(self, updates, round_index):
        return uniform(updates)


class HidesUndefinedLosses(AggregationCallback):
    def aggregate(self, updates, round_index):
        scale = updates.losses.mean() / updates.losses.mean()
        scale = scale if updates.losses.sum() else 1.0
        return Aggregated({name: (value * scale).to(value.dtype) for name, value in updates.end.items()})


class NeedsLora(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        assert updates.layers[0].scale
        return uniform(updates)


class NeedsEverybody(AggregationCallback):
    def mixing_matrix(self, updates, round_index):
        return torch.eye(updates.num_clients) * 0.5 + 0.5 / updates.num_clients


class OverwritesAbsent(Population):
    def receive_adapters(self, rows, stack):
        super().receive_adapters(range(self.num_clients), {n: v[:1].repeat_interleave(self.num_clients, 0)
                                                           for n, v in stack.items()})  # fmt: skip


class TellsEverybody(AggregationCallback):
    population = OverwritesAbsent

    def mixing_matrix(self, updates, round_index):
        return uniform(updates)


class ForgetsAbsent(AggregationCallback):
    """Remembers the losses of the last cohort only."""

    def __init__(self):
        self.losses = {}

    def mixing_matrix(self, updates, round_index):
        self.losses = dict(zip(map(str, updates.clients), updates.losses.tolist(), strict=True))
        return uniform(updates)

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = state["losses"]


@dataclass(frozen=True)
class Lenient(Limits):
    def problems(self, name, config):
        return []


class LimitsNothing(AggregationCallback):
    limits = Lenient(all_clients=True)

    def mixing_matrix(self, updates, round_index):
        return uniform(updates)


class MixesUpdates(AggregationCallback):
    def aggregate(self, updates, round_index):
        moved = {name: value - updates.start[name] for name, value in updates.end.items()}
        return Aggregated({name: updates.start[name] + v.mean(0) for name, v in moved.items()})


class FirstHasARank(AggregationCallback):
    """With ranks, all clients get the adapter of the first in the list."""

    limits = Limits(one_rank=False)

    def update_weights(self, updates, round_index):
        weights = self.client_weights(updates, "equal")
        return weights if updates.ranks is None else torch.arange(len(weights)).eq(0).double()


class LikesOldUpdates(AggregationCallback):
    population = ModelVersions

    def buffer_of(self, num_training):
        return 1

    def aggregate(self, updates, round_index):
        weights = self.client_weights(updates, "equal") * (1 + updates.staleness(round_index))
        return self.move(updates, 0.1 * weights, model=updates.model or None)


BROKEN: list[tuple[Any, set[str]]] = [
    (EditsInputs, {"inputs"}),
    (ReturnsInputs, {"inputs"}),
    (FirstOfTheList, {"order", "permutation"}),
    (FirstNumber, {"permutation"}),
    (LosesState, {"state", "run"}),
    (ForgetsHooks, {"run"}),
    (DividesByZero, {"equal_losses"}),
    (ReadsThoughSums, {"sees", "rounds"}),
    (ReturnsThoughNothing, {"sees"}),
    (RowsOfTwo, {"rows_sum_to_1", "rounds"}),
    (Negative, {"weights_not_negative"}),
    (Unseeded, {"order", "permutation", "repeatable", "state", "run"}),
    (Widens, {"rounds"}),
    (OnlyFloat32, {"mixed_types"}),
    (Drifts, {"no_movement", "fixed_point", "equal_ends"}),
    (HalfTheWay, {"fixed_point", "equal_ends"}),
    (NeedsTwo, {"one_client"}),
    (AtMostFifty, {"many_clients"}),
    (ExchangesNothing, {"undefined_adapter"}),
    (HidesUndefinedLosses, {"undefined_loss"}),
    (NeedsLora, {"without_lora"}),
    (NeedsEverybody, {"cohorts", "state", "absent", "run"}),
    (TellsEverybody, {"absent"}),
    (ForgetsAbsent, {"absent"}),
    (LimitsNothing, {"limits"}),
    (MixesUpdates, {"equal_ends"}),
    (FirstHasARank, {"ranks"}),
    (LikesOldUpdates, {"staleness"}),
]


@pytest.mark.parametrize(("rule", "laws"), BROKEN, ids=[rule.__name__ for rule, _ in BROKEN])
def test_a_broken_rule_is_found_by_the_laws_that_are_meant_to_find_it(rule, laws) -> None:
    failed = {result.law: result.reason for result in check_rule(rule) if result.outcome == "failed"}
    assert failed.keys() == laws
    assert all(failed.values())


def test_every_law_is_broken_by_some_rule() -> None:
    assert set().union(*(laws for _, laws in BROKEN)) == LAWS.keys()


def test_a_good_rule_keeps_all_laws_and_the_others_have_a_reason() -> None:
    results = check_rule(Good)
    assert [result.law for result in results] == list(LAWS)
    assert {result.law: result.reason for result in results if result.outcome != "passed"} == {
        "sees": "it declares sees='adapters'",
        "ranks": "it needs the same rank for all clients (limits.one_rank)",
        "staleness": "it is not asynchronous",
    }


def test_the_smallest_example_has_clients_round_and_numbers() -> None:
    (broken,) = [result for result in check_rule(DividesByZero) if result.outcome == "failed"]
    assert broken.reason == (
        "2 clients, round 0, seed 0, all losses are 0: TrainingError: aggregation dividesbyzero: the weights of updates "
        "are not finite: [nan, nan] for clients [0, 1]"
    )
    found = {result.law: result.reason for result in check_rule(HalfTheWay)}["fixed_point"]
    assert found.startswith("2 clients, round 0, seed 0: client 0, ")
    assert "expected" in found
    assert found.endswith("; losses [1, 2], samples [1, 2]")


def test_an_error_in_the_rule_names_its_line() -> None:
    found = {result.law: result.reason for result in check_rule(NeedsLora)}["without_lora"]
    line = NeedsLora.mixing_matrix.__code__.co_firstlineno + 1
    assert found.endswith(f"IndexError: tuple index out of range (test_conformance.py:{line})")


def test_if_a_plain_round_is_impossible_the_other_laws_are_not_checked() -> None:
    outcomes = {result.law: result.outcome for result in check_rule(Widens)}
    assert outcomes["rounds"] == "failed"
    assert {outcome for law, outcome in outcomes.items() if law not in ("sees", "rows_sum_to_1", "rounds")} == {
        "not checked"
    }


def test_the_released_code_of_fellrec_depends_on_the_order_of_clients() -> None:
    results = check_rule(lambda: FELLRec(fidelity="released_code"))
    assert {result.law for result in results if result.outcome == "failed"} == {"order", "permutation"}


def test_a_waived_law_is_not_applicable_with_the_reason_of_the_rule() -> None:
    class Waives(MixesUpdates):
        waived_laws = {"equal_ends": "updates are mixed"}

    results = {result.law: result for result in check_rule(Waives)}
    assert (results["equal_ends"].outcome, results["equal_ends"].reason) == (
        "not applicable",
        "waived by the rule: updates are mixed",
    )
    assert "failed" not in {result.outcome for result in results.values()}


def test_an_unknown_law_cannot_be_waived() -> None:
    class Misspelt(Good):
        waived_laws = {"ordr": "no reason"}

    with pytest.raises(ConfigError, match="unknown law in waived_laws 'ordr'; choose from: order"):
        check_rule(Misspelt)


def test_limits_switch_laws_off_with_their_names() -> None:
    class Limited(NeedsEverybody):
        limits = Limits(needs_lora=True, all_clients=True, least_clients=3)

    reasons = {result.law: result.reason for result in check_rule(Limited) if result.outcome != "passed"}
    assert reasons == {
        "sees": "it declares sees='adapters'",
        "absent": "limits.all_clients",
        "cohorts": "limits.all_clients",
        "one_client": "limits.least_clients=3",
        "without_lora": "it needs LoRA's factors (limits.needs_lora)",
        "ranks": "it needs the same rank for all clients (limits.one_rank)",
        "staleness": "it is not asynchronous",
    }


def test_every_limit_has_an_example_of_what_it_excludes() -> None:
    assert {field.name for field in fields(Limits)} == EXCLUDED.keys() | {"least_because"}


MODULE = """
import torch
from fellrec.aggregation import AggregationCallback

class Keeps(AggregationCallback):
    def __init__(self, share: float):
        self.share = share

    def mixing_matrix(self, updates, round_index):
        return torch.eye(len(updates.clients)) * self.share
"""


@pytest.fixture
def my_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checked_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_checked_rules", raising=False)


def test_the_command_prints_every_law(my_rules: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check-rule", "my_checked_rules.Keeps", "+aggregation.share=1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("passed") for line in lines) == len(LAWS) - 3
    assert lines[0].startswith("not applicable  sees")
    assert lines[1].strip() == "it declares sees='adapters'"
    assert lines[-1] == f"{len(LAWS)} laws: {len(LAWS) - 3} passed, 3 not applicable"


@pytest.mark.slow
def test_the_command_finds_modules_of_the_current_directory(tmp_path: Path) -> None:
    """As every verb; a module of that name that is installed comes first."""
    (tmp_path / "my_checked_rules.py").write_text(MODULE.replace("torch.eye", "2 * torch.eye"))
    (tmp_path / "torch.py").write_text("raise SystemError")
    fellrec = "import sys; sys.path[:1] = []; from fellrec.__main__ import run; run()"  # as the script does
    command = [sys.executable, "-c", fellrec, "check-rule", "my_checked_rules.Keeps", "+aggregation.share=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "my_checked_rules.Keeps breaks" in done.stderr, done.stderr


def test_the_command_fails_where_a_law_is_broken(my_rules: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check-rule", "my_checked_rules.Keeps", "+aggregation.share=0.5", "--format", "json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert stop.value.code == 1
    assert found["rule"] == "my_checked_rules.Keeps"
    reasons = {law["law"]: law["reason"] for law in found["laws"] if law["outcome"] == "failed"}
    assert "row 0 is [0.5, 0] and sums to 0.5" in reasons["rows_sum_to_1"]
    assert f"my_checked_rules.Keeps breaks 2 of {len(LAWS)} laws: rows_sum_to_1, rounds" in err


def test_the_command_takes_choices_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check-rule", "updatemixing", "aggregation.server_learning_rate=0.5"])
    assert "waived by the rule: server_learning_rate=0.5 scales all updates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fedavgg"], "unknown aggregation 'fedavgg'; choose from: fedavg, "),
        (["fedavgg"], "; a class of your own is named as MODULE.CLASS"),
        (["no_such_module.Rule"], "No module named 'no_such_module'"),
        (
            ["my_checked_rules.Kepes"],
            "aggregation._target_=my_checked_rules.Kepes cannot be imported: module my_checked_rules has no class "
            "'Kepes'; choose from: Keeps",
        ),
        (["my_checked_rules.Keeps"], "aggregation.share needs a value: give +aggregation.share=…"),
        (["my_checked_rules.Keeps", "+aggregation.chare=1"], "unknown setting 'aggregation.chare'"),
        (["my_checked_rules.torch"], "is not a subclass of AggregationCallback"),
    ],
)
def test_a_rule_that_cannot_be_made_is_one_message(
    my_rules: None, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check-rule", *given])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_the_documentation_has_every_law() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    assert [
        line for line in text.splitlines() if line in {f"| `{law.name}` | {law.text} |" for law in LAWS.values()}
    ] == [f"| `{law.name}` | {law.text} |" for law in LAWS.values()]


def test_the_rules_of_the_documentation_keep_all_laws() -> None:
    """One is a matrix, one is ``aggregate``; a law that they broke would be a mistake in what users copy."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(# my_(?:rules|medians)\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block, found)
    for name in ("HalfWay", "Median"):
        results = check_rule(found[name])
        assert [result.law for result in results if result.outcome == "failed"] == [], name
