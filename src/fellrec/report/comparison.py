"""Results of runs and of comparisons: what tables, JSON output and MLflow are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fellrec.errors import ConfigError, unknown
from fellrec.functional.balance import mean_gain
from fellrec.report.costs import RunCost
from fellrec.report.provenance import Provenance
from fellrec.types import Evaluation


@dataclass(frozen=True)
class RuleResult:
    """One run of one rule, or one reference ranker.

    Attributes:
        rule: Name.
        seed: Of the run.
        kind: ``"learned"`` or ``"reference"``.
        evaluation: Of the test split, or of the one that was requested.
        seconds_per_round: Training and aggregation; ``None`` for reference rankers.
        total_seconds: The whole run, evaluation included.
        peak_memory_bytes: Largest resident memory of the process by the end of this run.
        best_round: The round whose adapters were tested; -1 is the start.
        validation: Value of the selection metric in that round: mean over clients on the validation split; ``None`` for
            reference rankers.
        run_id: Of the MLflow run.
        variant: Settings of the cut that vary over a comparison, such as ``"head_layers=2"``; empty if none do, and for
            reference rankers, which do not depend on them.
        cost: Storage and traffic; ``None`` for reference rankers.
        cpu_seconds_per_round: Processor time of training and aggregation; ``None`` if other processes or a GPU took
            part.
    """

    rule: str
    seed: int
    kind: str
    evaluation: Evaluation
    seconds_per_round: float | None = None
    total_seconds: float | None = None
    peak_memory_bytes: int | None = None
    best_round: int | None = None
    validation: float | None = None
    run_id: str | None = None
    variant: str = ""
    cost: RunCost | None = None
    cpu_seconds_per_round: float | None = None

    @property
    def name(self) -> str:
        """Rule and variant, which identify a line of a table."""
        return f"{self.rule} {self.variant}" if self.variant else self.rule

    def is_paired_with(self, base: RuleResult) -> bool:
        """Whether this result and ``base`` differ only in the rule: same seed, and same variant if this has one."""
        return self.seed == base.seed and self.variant in ("", base.variant)


@dataclass(frozen=True)
class Difference:
    """A learned rule against the baseline, for one metric; see ``fellrec.report.significance``.

    Attributes:
        rule: Line of the comparison.
        baseline: The line it is compared with.
        metric: Such as ``ndcg_at_10``.
        num_seeds: Seeds that both have; values of users and clients are averaged over them first.
        num_users: Users whom all these runs evaluated.
        num_clients: Clients that have some of them.
        user_difference: Mean over users.
        user_interval: Its 95 % interval by a paired bootstrap over users; ``None`` if there are too few.
        user_change_percent: Change of the mean over users; ``None`` if the baseline's is 0.
        client_difference: Mean over clients of their users' means.
        client_interval: Its 95 % interval by a paired bootstrap over clients; ``None`` if there are too few.
        client_change_percent: Change of the mean over clients; ``None`` if the baseline's is 0.
        cv_difference: Coefficient of variation over clients of their users' means, minus the baseline's.
        cv_interval: Its 95 % interval by a paired bootstrap over the users of each client; ``None`` if one has too few.
        wilcoxon_p: Of the signed-rank test over users.
        holm_p: The same, adjusted for all comparisons.
    """

    rule: str
    baseline: str
    metric: str
    num_seeds: int
    num_users: int
    num_clients: int
    user_difference: float
    user_interval: tuple[float, float] | None
    user_change_percent: float | None
    client_difference: float
    client_interval: tuple[float, float] | None
    client_change_percent: float | None
    cv_difference: float
    cv_interval: tuple[float, float] | None
    wilcoxon_p: float
    holm_p: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; an interval becomes ``*_low`` and ``*_high``."""
        plain: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name.endswith("_interval"):
                low, high = value or (None, None)
                plain |= {name.replace("_interval", "_low"): low, name.replace("_interval", "_high"): high}
            else:
                plain[name] = value
        return plain


@dataclass(frozen=True)
class Comparison:
    """Several rules, variants and seeds on one partition.

    A line of the comparison is a rule, or a rule and a variant: ``RuleResult.name``, called ``rule`` below.

    Attributes:
        data: Name of the data set.
        users_per_client: Number of evaluated users of each client.
        num_items: Items that are ranked.
        results: In the order in which they ran.
        cold: Counts of cold items and users, see ``ColdStart.counts``; empty if they are not known.
        differences: Of the learned rules to `reference_rule`, from ``fellrec.report.significance``.
        provenance: What the results were measured with; ``None`` if it is not known.
        members: Of a federation of data sets, the ``clients`` of each and the number of ``items`` that they rank.
        run_dir: The directory with the files of the comparison; ``None`` if it is not known.
    """

    data: str
    users_per_client: Sequence[int]
    num_items: int
    results: Sequence[RuleResult]
    cold: Mapping[str, int] = field(default_factory=dict)
    differences: Sequence[Difference] = ()
    provenance: Provenance | None = None
    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run_dir: Path | None = None

    @property
    def stage(self) -> str:
        """The stage that was evaluated."""
        return self.results[0].evaluation.stage

    def rules(self, kind: str) -> list[str]:
        """Names of the rules of one kind, in order."""
        return list(dict.fromkeys(result.name for result in self.results if result.kind == kind))

    @property
    def reference_rule(self) -> str:
        """The rule that others are tested against: FedAvg if it is among them, else the baseline of gains."""
        return self.only_line("fedavg") or self.baseline

    @property
    def baseline(self) -> str:
        """The rule that gains are measured against: local training."""
        return self.only_line("local") or "local"

    def only_line(self, base: str) -> str | None:
        """The one line of a rule, whatever its settings; ``None`` if there is none, or several.

        Args:
            base: Name without settings, such as ``"fedavg"``.
        """
        found = {result.rule for result in self.results if result.kind == "learned" and _base(result.rule) == base}
        return found.pop() if len(found) == 1 else None

    def validation(self, rule: str) -> float | None:
        """Mean over seeds of the selection metric; ``None`` for reference rankers."""
        return _mean(result.validation for result in self.of_rule(rule))

    @property
    def chosen(self) -> dict[str, str]:
        """For each learned rule the line that is best on the validation split: rule without settings → line.

        Settings are tuned by it; the test split is not used for selection.
        """
        best: dict[str, tuple[float, str]] = {}
        for line in self.rules("learned"):
            value = self.validation(line)
            if value is not None and value > best.get(_base(line), (-math.inf, ""))[0]:
                best[_base(line)] = (value, line)
        return {base: line for base, (_, line) in best.items()}

    @property
    def is_tuned(self) -> bool:
        """Whether a rule has several lines to choose from."""
        return bool(self.chosen) and any(self.only_line(base) is None for base in self.chosen)

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in order."""
        return list(dict.fromkeys(result.seed for result in self.results))

    @property
    def poisoned(self) -> tuple[int, ...]:
        """Clients that misbehave in a run."""
        return tuple(sorted({client for result in self.results for client in result.evaluation.poisoned}))

    @property
    def client_names(self) -> list[str]:
        """The clients' numbers as text; those of clients that misbehave have an asterisk."""
        return [f"{client}{'*' * (client in self.poisoned)}" for client in range(len(self.users_per_client))]

    @property
    def measured_with(self) -> str:
        """Commit, number of threads and seeds as text; empty if they are not known."""
        return "" if self.provenance is None else self.provenance.text(self.seeds)

    def of_rule(self, rule: str) -> list[RuleResult]:
        """The results of one line, one per seed."""
        return [result for result in self.results if result.name == rule]

    @property
    def variants(self) -> list[str]:
        """The variants, in order; empty if only rule and seed vary."""
        return list(dict.fromkeys(result.variant for result in self.results if result.variant))

    def mean_and_sd(self, rule: str, figure: str) -> tuple[float, float]:
        """Mean and sample standard deviation over seeds of a value of the summary; the latter is 0 for one seed."""
        values = [result.evaluation.summary[figure] for result in self.of_rule(rule)]
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def gain(self, rule: str, metric: str) -> float | None:
        """Mean over clients and seeds of the difference to the baseline, paired by client and seed."""
        return _mean(
            mean_gain(result.evaluation.per_client[metric], base.evaluation.per_client[metric])
            for result, base in self.pairs(rule, self.baseline)
        )

    def difference(self, rule: str, other: str, metric: str) -> list[float]:
        """Per client, mean over seeds of ``rule`` minus ``other``, paired by seed; empty if there are no pairs."""
        pairs = [
            result.evaluation.per_client[metric] - base.evaluation.per_client[metric]
            for result, base in self.pairs(rule, other)
        ]
        return torch.stack(pairs).mean(dim=0).tolist() if pairs else []

    def seconds_per_round(self, rule: str) -> float | None:
        """Mean over seeds; ``None`` for reference rankers."""
        return _mean(result.seconds_per_round for result in self.of_rule(rule))

    def cpu_seconds_per_round(self, rule: str) -> float | None:
        """Mean over seeds; ``None`` where it is not known."""
        return _mean(result.cpu_seconds_per_round for result in self.of_rule(rule))

    @property
    def has_cpu_seconds(self) -> bool:
        """Whether the processor time of all learned rules is known."""
        learned = [result for result in self.results if result.kind == "learned"]
        return bool(learned) and all(result.cpu_seconds_per_round is not None for result in learned)

    def cost(self, rule: str, figure: Callable[[RunCost], float | None]) -> float | None:
        """Mean over seeds of a value of the cost; ``None`` without one."""
        return _mean(figure(result.cost) for result in self.of_rule(rule) if result.cost is not None)

    def pairs(self, rule: str, other: str) -> list[tuple[RuleResult, RuleResult]]:
        """Results of a line, each with the results of the other rule that it is paired with."""
        return [
            (result, base)
            for result in self.of_rule(rule)
            for base in self.results
            if base.rule == other and result.is_paired_with(base)
        ]

    def to_frame(self, of: str = "runs", all_figures: bool = False) -> pd.DataFrame:
        """The results as a table of numbers for pandas.

        Args:
            of: ``"runs"``: a row for each run, with figures of its summary, such as ``ndcg_at_10/mean``;
                ``"clients"``: a row for each run and client, with every metric, such as ``ndcg_at_10``; ``"users"``: a
                row for each run and evaluated user, with the same.
            all_figures: Whether rows of runs have every figure of every metric and cutoff; otherwise those of the main
                table, of NDCG and Recall at 10, or at the largest cutoff of the run if 10 is none.

        Raises:
            ConfigError: If ``of`` is another text.
        """
        if of not in _ROWS:
            raise ConfigError(unknown("kind of rows", of, _ROWS))
        tables = []
        for result in self.results:
            table = _ROWS[of](result)
            if of == "runs" and not all_figures:
                table = table.drop(columns=set(result.evaluation.summary) - _main_figures(result))
            about = {"rule": result.name, "kind": result.kind, "seed": result.seed}
            for place, (name, value) in enumerate(about.items()):
                table.insert(place, name, value)
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, those of the tables among them."""
        rules = [*self.rules("learned"), *self.rules("reference")]
        return {
            "data": self.data,
            "stage": self.stage,
            "num_items": self.num_items,
            "users_per_client": list(self.users_per_client),
            "members": {name: dict(member) for name, member in self.members.items()},
            "cold": dict(self.cold),
            **({"poisoned_clients": list(self.poisoned)} if self.poisoned else {}),
            "measured": {**({} if self.provenance is None else self.provenance.to_dict()), "seeds": self.seeds},
            "chosen_on_validation": self.chosen,
            "rules": {rule: self._rule_dict(rule) for rule in rules},
            "differences": [item.to_dict() for item in self.differences],
        }

    def _rule_dict(self, rule: str) -> dict[str, Any]:
        results = self.of_rule(rule)
        figures = results[0].evaluation.summary
        metrics, fedavg = results[0].evaluation.per_client, self.only_line("fedavg") or "fedavg"
        return {
            "kind": results[0].kind,
            "rule": results[0].rule,
            "variant": results[0].variant,
            "mean": {figure: self.mean_and_sd(rule, figure)[0] for figure in figures},
            "sd": {figure: self.mean_and_sd(rule, figure)[1] for figure in figures},
            "gain_over_local": {metric: self.gain(rule, metric) for metric in metrics},
            "minus_fedavg_per_client": {metric: _plain(self.difference(rule, fedavg, metric)) for metric in metrics},
            "validation": self.validation(rule),
            "seconds_per_round": self.seconds_per_round(rule),
            "cpu_seconds_per_round": self.cpu_seconds_per_round(rule),
            "runs": [_run_dict(result) for result in results],
        }


MAIN_FIGURES = {
    "mean": "mean",
    "pooled": "pooled",
    "std": "std",
    "cv": "coefficient_of_variation",
    "worst": "worst",
}
"""Columns of ``comparison.csv`` → figures of the summary."""


def _run_rows(result: RuleResult) -> pd.DataFrame:
    own = {name: getattr(result, name) for name in ("best_round", "validation", "seconds_per_round", "run_id")}
    return pd.DataFrame([{**result.evaluation.summary, **own}])


def _main_figures(result: RuleResult) -> set[str]:
    """The figures of the main table in a run's summary."""
    cutoffs = [int(name.rpartition("_")[2]) for name in result.evaluation.per_client if name.startswith("ndcg_at_")]
    cutoff = 10 if 10 in cutoffs else max(cutoffs)
    return {f"{metric}_at_{cutoff}/{figure}" for metric in ("ndcg", "recall") for figure in MAIN_FIGURES.values()}


def _client_rows(result: RuleResult) -> pd.DataFrame:
    table = pd.DataFrame({name: values.numpy() for name, values in result.evaluation.per_client.items()})
    table.insert(0, "client", table.index)
    if result.evaluation.poisoned:
        table.insert(1, "poisoned", table.index.isin(result.evaluation.poisoned))
    return table


def _user_rows(result: RuleResult) -> pd.DataFrame:
    evaluation = result.evaluation
    about = {"user": evaluation.users.numpy(), "client": evaluation.client_of_user.numpy()}
    return pd.DataFrame({**about, **{name: values.numpy() for name, values in evaluation.per_user.items()}})


_ROWS: Mapping[str, Callable[[RuleResult], pd.DataFrame]] = {
    "runs": _run_rows,
    "clients": _client_rows,
    "users": _user_rows,
}
"""What a row of `Comparison.to_frame` is → the rows of a run."""


def _base(rule: str) -> str:
    """A rule's name without settings."""
    return rule.partition(" ")[0]


def _run_dict(result: RuleResult) -> dict[str, Any]:
    evaluation = result.evaluation
    return {
        **{name: getattr(result, name) for name in _OF_RUN},
        "cost": None if result.cost is None else result.cost.to_dict(),
        "summary": dict(evaluation.summary),
        "per_client": {name: _plain(values.tolist()) for name, values in evaluation.per_client.items()},
    }


_OF_RUN = (
    *("seed", "run_id", "best_round", "validation"),
    *("seconds_per_round", "cpu_seconds_per_round", "total_seconds", "peak_memory_bytes"),
)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that exist; ``None`` without any."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _plain(values: list[float]) -> list[float | None]:
    """``None`` for NaN, which JSON does not have."""
    return [None if math.isnan(value) else value for value in values]
