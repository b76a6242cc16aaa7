"""Finished runs, read from their directories and put side by side: what a report is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fellrec.config.stored import read_settings
from fellrec.data.files import PLACES
from fellrec.errors import ConfigError, shorten
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.costs import RunCost
from fellrec.report.folders import FINISHED, RESULTS, USERS, some
from fellrec.report.provenance import Provenance
from fellrec.report.styles import in_order
from fellrec.state.run_folder import CONFIG
from fellrec.types import Evaluation

_DATA, _VERSIONS, _PARTITION, _ROUNDS, _MATRICES = (
    *("data.json", "versions.json", "partition.parquet"),
    *("rounds.csv", "matrices.npz"),
)
FILES = (CONFIG, RESULTS, USERS, _DATA, _VERSIONS, _PARTITION, FINISHED, _ROUNDS, _MATRICES)
"""The files of a run that a report reads."""
_OF_FINISHED = ("seconds_per_round", "total_seconds", "peak_memory_bytes", "best_round", "validation")
_NOT_COMPARED = (
    *("run_dir", "resume", "cache_dir", "tracking.", "launcher."),
    *(f"{group}.{name}" for group in ("data", "data.reader") for name in PLACES),
)
"""Settings that say where something is: they are never shown as a difference."""
_OF_MACHINE = (
    *("callbacks.", "references.", "backbone.path", "trainer.accelerator", "trainer.strategy", "trainer.plugins"),
    *("trainer.devices", "trainer.num_nodes", "trainer.clients_per_step", "trainer.eval_batch_size"),
    *("trainer.timeout_seconds", "trainer.checkpoint", "split.timeout_seconds", "participation.sampler.path"),
)
"""Settings that are shown as a difference, but do not tell two lines of a table from each other."""


@dataclass(frozen=True)
class StoredRun:
    """A finished run.

    Attributes:
        folder: With the files of the run.
        name: What messages and tables call it: its directory, or its id.
        settings: Flat.
        data: Content of ``data.json``: key, name, statistics.
        versions: Content of ``versions.json``.
        result: Its rule is without settings that vary.
        cold: Counts of cold items and users, as in ``results.json``.
        rounds: ``rounds.csv``; ``None`` if the run has none.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    result: RuleResult
    cold: Mapping[str, int] = field(default_factory=dict)
    rounds: pd.DataFrame | None = None

    def matrices(self) -> dict[str, NDArray[Any]]:
        """``matrices.npz``; empty if the run has none."""
        path = self.folder / _MATRICES
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def read_run(folder: Path, name: str = "") -> StoredRun:
    """Read the files of a finished run.

    Args:
        folder: With them.
        name: What to call it; empty for its directory.

    Raises:
        ConfigError: If a file is absent or damaged.
    """
    settings = read_settings(folder)
    try:
        found, data = (json.loads((folder / file).read_bytes()) for file in (RESULTS, _DATA))
        versions = json.loads((folder / _VERSIONS).read_bytes()) if (folder / _VERSIONS).is_file() else {}
        finished = json.loads((folder / FINISHED).read_bytes()) if (folder / FINISHED).is_file() else {}
        users, partition = (pd.read_parquet(folder / file) for file in (USERS, _PARTITION))
        evaluation = evaluation_of(found, users, partition["user_id"])
        cost = RunCost.of_dict(found["cost"]) if found.get("cost") else None
        result = RuleResult(
            rule=str(found["rule"]).partition(" ")[0],
            seed=int(found["seed"]),
            kind="learned",
            evaluation=evaluation,
            cost=cost,
            **{**_known(evaluation, cost), **{key: finished[key] for key in _OF_FINISHED if key in finished}},
        )
        path = folder / _ROUNDS
        rounds = pd.read_csv(path) if path.is_file() else None
        return StoredRun(
            folder,
            name or str(folder),
            settings,
            dict(data),
            dict(versions),
            result,
            dict(found.get("cold", {})),
            rounds,
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the results in {folder} are damaged: {' '.join(str(error).split())}") from error


def evaluation_of(found: Mapping[str, Any], users: pd.DataFrame, user_ids: pd.Series) -> Evaluation:
    """The evaluation that ``results.json`` and ``users.parquet`` describe.

    Args:
        found: Content of the former.
        users: The latter.
        user_ids: All users in the order of the data, which gives each an index.

    Raises:
        ValueError: If a user is not among them.
        LookupError: If a value is absent.
    """
    index = pd.Index(user_ids).get_indexer(users["user_id"])
    if (index < 0).any():
        raise ValueError(f"{USERS} has a user who is not in the data")
    return Evaluation(
        stage=str(found["stage"]),
        round_index=int(found["round_index"]),
        per_user={name: torch.from_numpy(users[name].to_numpy(np.float64, copy=True)) for name in found["per_client"]},
        client_of_user=torch.from_numpy(users["client"].to_numpy(np.int64, copy=True)),
        per_client={name: torch.tensor(values, dtype=torch.float64) for name, values in found["per_client"].items()},
        summary={name: float(value) for name, value in found["summary"].items()},
        users=torch.from_numpy(index.astype(np.int64)),
        poisoned=tuple(int(client) for client in found.get("poisoned_clients", ())),
    )


def _known(evaluation: Evaluation, cost: RunCost | None) -> dict[str, Any]:
    """What runs without ``finished.json`` still tell."""
    seconds = None if cost is None or not cost.rounds.num_rounds else cost.rounds.seconds / cost.rounds.num_rounds
    return {"best_round": evaluation.round_index, "seconds_per_round": seconds}


def read_references(path: Path) -> list[RuleResult]:
    """The reference rankers of a comparison, from its ``comparison.json``; empty if the file does not exist.

    Raises:
        ConfigError: If it is damaged.
    """
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_bytes())
        return [
            RuleResult(line["rule"], int(run["seed"]), "reference", _reference(str(found["stage"]), run))
            for line in found["rules"].values()
            if line["kind"] == "reference"
            for run in line["runs"]
        ]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _reference(stage: str, run: Mapping[str, Any]) -> Evaluation:
    none = torch.zeros(0, dtype=torch.int64)
    per_client = {
        name: torch.tensor([np.nan if value is None else value for value in values], dtype=torch.float64)
        for name, values in run["per_client"].items()
    }
    return Evaluation(stage, -1, {}, none, per_client, dict(run["summary"]), none)


def check_comparable(runs: Sequence[StoredRun]) -> None:
    """Refuse runs whose figures cannot be put side by side.

    Raises:
        ConfigError: Naming two of them and what differs.
    """
    first = runs[0]
    for other in runs[1:]:
        both = f"{first.name} and {other.name} cannot be compared"
        if first.data.get("key") != other.data.get("key"):
            raise ConfigError(
                f"{both}: they have different data, partitions or holdouts ({_data_text(first)}; {_data_text(other)}"
                f"{_differing_text(first, other)}); give runs on one of them"
            )
        for what, name in (("stage", "evaluated on"), ("trainer.metric", "selected by")):
            values = [run.settings.get(what, run.result.evaluation.stage) for run in (first, other)]
            if values[0] != values[1]:
                raise ConfigError(f"{both}: they were {name} {values[0]} and {values[1]}; give runs with one of them")
        evaluations = first.result.evaluation, other.result.evaluation
        if set(evaluations[0].per_client) != set(evaluations[1].per_client):
            names = sorted(set(evaluations[0].per_client) ^ set(evaluations[1].per_client))
            raise ConfigError(f"{both}: only one of them has {some(names)}; give runs with the same trainer.cutoffs")
        if not torch.equal(evaluations[0].users, evaluations[1].users):
            raise ConfigError(f"{both}: they were tested on different users")


def _data_text(run: StoredRun) -> str:
    return f"{shorten(str(run.data.get('name')), 80)}, key {shorten(str(run.data.get('key')), 40)}"


def _differing_text(first: StoredRun, other: StoredRun) -> str:
    groups = ("data.", "partition.", "holdout.")
    keys = [key for key in differing([first, other]) if key.startswith(groups)]
    return f"; they differ in {some(keys)}" if keys else ""


def differing(runs: Sequence[StoredRun]) -> list[str]:
    """Settings that are not the same in all runs, in the order of the configuration."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(_NOT_COMPARED))
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def labelled(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """The runs, each with what tells its line from the others: the settings of its rule, and others, that vary.

    Raises:
        ConfigError: If two runs would be the same seed of the same line.
    """
    of_rule: dict[str, list[StoredRun]] = {}
    for run in runs:
        of_rule.setdefault(run.result.rule, []).append(run)
    varying = [key for key in differing(runs) if key != "seed" and not key.startswith(_OF_MACHINE)]
    shared = [key for key in varying if not key.startswith(("aggregation.", "split."))]
    found = []
    for run in runs:
        own = [key for key in differing(of_rule[run.result.rule]) if key.startswith("aggregation.")]
        rule = " ".join([run.result.rule, *_texts(run, [*own, *shared])])
        variant = " ".join(_texts(run, [key for key in varying if key.startswith("split.")]))
        found.append(replace(run, result=replace(run.result, rule=rule, variant=variant)))
    place = {name: number for number, name in enumerate(in_order(dict.fromkeys(run.result.name for run in found)))}
    found.sort(key=lambda run: place[run.result.name])
    seen: dict[tuple[str, int], StoredRun] = {}
    for run in found:
        same = seen.setdefault((run.result.name, run.result.seed), run)
        if same is not run:
            raise ConfigError(
                f"{same.name} and {run.name} have the same settings and seed ({run.result.name}, seed "
                f"{run.result.seed}); give one of them"
            )
    return found


def _texts(run: StoredRun, keys: Sequence[str]) -> list[str]:
    """``name=value`` of settings that a run has, without the group where the name alone is enough."""
    short = [key.rpartition(".")[2] for key in keys]
    return [
        f"{name if short.count(name) == 1 else key}={str(run.settings[key]).lower().replace(' ', '')}"
        for key, name in zip(keys, short, strict=True)
        if key in run.settings and not key.endswith("._target_")
    ]


def comparison_of(runs: Sequence[StoredRun], references: Sequence[RuleResult] = ()) -> Comparison:
    """Labelled runs of the same data as a comparison, without the statistics of differences.

    Args:
        runs: See `labelled`.
        references: Reference rankers on the same users.
    """
    first = runs[0]
    evaluation = first.result.evaluation
    count = len(next(iter(evaluation.per_client.values())))
    users = torch.bincount(evaluation.client_of_user, minlength=count).tolist()
    items = int(first.data.get("statistics", {}).get("items", 0))
    measured = {tuple(Provenance.of(run.versions).to_dict().values()) for run in runs}
    provenance = Provenance.of(first.versions) if len(measured) == 1 else None
    results = [run.result for run in runs]
    usable = [one for one in references if set(one.evaluation.per_client) >= set(evaluation.per_client)]
    name = str(first.data.get("name", ""))
    return Comparison(name, users, items, [*results, *usable], first.cold, provenance=provenance)


def cutoff_of(runs: Sequence[StoredRun], requested: int | None) -> int:
    """The cutoff K that a report shows: the requested one, else 10 if the runs have it, else their first.

    Raises:
        ConfigError: If the runs do not have the requested one.
    """
    known = [
        int(name.rpartition("_")[2]) for name in runs[0].result.evaluation.per_client if name.startswith("ndcg_at_")
    ]
    wanted = requested if requested is not None else 10 if 10 in known else known[0]
    if wanted not in known:
        raise ConfigError(f"--cutoff {wanted} is not among those of the runs: {', '.join(map(str, known))}")
    return wanted
