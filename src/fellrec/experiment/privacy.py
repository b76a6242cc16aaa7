"""Differential privacy of a run's updates: what it cannot be combined with, and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from fellrec.aggregation.base import AggregationCallback
from fellrec.config.instantiate import as_dict, import_target, settings
from fellrec.config.members import is_federation
from fellrec.data.partition import PerUserPartition
from fellrec.federated.accountant import Sampling, missing_accountant
from fellrec.federated.privacy import PrivateMean
from fellrec.federated.privacy_settings import PrivacySettings
from fellrec.federated.samplers import PoissonSampler, UniformSampler
from fellrec.functional.participation import cohort_size

_SUMS = "fedavg, fedprox, fedavgm, fedadam, ffa_lora or another rule for which fellrec show says that it sees sums"


def privacy_problems(config: DictConfig, rule: AggregationCallback) -> list[str]:
    """Why the guarantee would not hold for a configuration; one line each, before anything is loaded.

    Args:
        config: The configuration of a run.
        rule: Its aggregation rule.
    """
    if not (config.get("privacy") and config.privacy.unit != "none"):
        return []
    plain, name = as_dict(config), f"privacy={config.privacy.unit}_level"
    found = [missing_accountant(), *(_with(name, problem) for problem in _of_rule(rule) if problem)]
    found += [_with(name, problem) for problem in (*_of_unit(config), *_of_run(plain), *_of_cohorts(plain)) if problem]
    return [problem for problem in found if problem]


def _with(name: str, problem: str) -> str:
    return f"{name}: {problem}"


def _of_rule(rule: AggregationCallback) -> list[str | None]:
    """Problems with what the rule reads: all that it gets is the noised mean of the updates."""
    called = f"aggregation {rule.name}"
    reads = {
        "the clients' losses": rule.needs_start_loss,
        f"the clients' tensors {', '.join(rule.client_tensors)}": bool(rule.client_tensors),
    }
    return [
        f"no update leaves a client with {called}; use privacy=none" if rule.sees == "nothing" else None,
        f"{called} needs the adapter of every client, and only the noised mean of all updates is released; use {_SUMS}"
        if rule.sees == "adapters"
        else None,
        f"{called} has no rounds with a cohort; use {_SUMS}" if rule.limits.asynchronous else None,
        *(f"{called} reads {what}, which are not released; use {_SUMS}" for what, does in reads.items() if does),
    ]


def _of_unit(config: DictConfig) -> list[str | None]:
    """Problems with what a client is."""
    if config.privacy.unit != "user":
        return []
    if is_federation(config):
        return ["users of several data sets may be the same people: data=federation needs privacy=client_level"]
    if issubclass(import_target(config.partition._target_, "partition"), PerUserPartition):
        return []
    return [
        "a client with several users sends one update, in which no single user's part is bounded; use "
        "partition=per_user, or privacy=client_level, which protects whole clients"
    ]


def _of_run(plain: Mapping[str, Any]) -> list[str | None]:
    """Problems with what else leaves a client, or depends on its data."""
    transport, patience = plain["split"]["transport"], plain["trainer"]["patience"]
    ranks = plain["adapter"].get("rank")
    return [
        f"split.transport={transport} sends hidden states of every step to the server, which are not protected; use "
        "split.transport=none"
        if transport != "none"
        else None,
        f"trainer.patience={patience} ends the run by validation data, which are not protected; use null"
        if patience is not None
        else None,
        f"clients need one rank: adapter.rank={ranks} is not allowed, give one number"
        if isinstance(ranks, (list, dict))
        else None,
    ]


def _of_cohorts(plain: Mapping[str, Any]) -> list[str | None]:
    """Problems with who takes part: it must not depend on a client's data, and its probability must be known."""
    how = plain["participation"]
    kind = import_target(how["sampler"]["_target_"], "participation.sampler")
    is_fixed = kind is UniformSampler and how["rate"] < 1
    return [
        f"participation.sampler={kind.__name__} draws clients with unknown probabilities, or by their data; use "
        "participation=default or poisson"
        if kind not in (UniformSampler, PoissonSampler)
        else None,
        f"participation.over_selection={how['over_selection']} keeps the clients that are fast, which have few data; "
        "leave it at 1"
        if how["over_selection"] != 1
        else None,
        f"participation.dropout={how['dropout']} with cohorts of fixed size changes who is drawn; use "
        "participation=poisson, or participation.rate=1"
        if is_fixed and how["dropout"]
        else None,
    ]


def sampling_of(config: DictConfig, num_clients: int) -> Sampling:
    """How clients are drawn, for the accountant."""
    how = config.participation
    is_poisson = import_target(how.sampler._target_, "participation.sampler") is PoissonSampler
    size = cohort_size(num_clients, how.rate)
    if size == num_clients:
        return Sampling("all", num_clients, size, how.dropout)
    return Sampling("poisson" if is_poisson else "fixed", num_clients, size, how.dropout)


def build_privacy(config: DictConfig, num_clients: int) -> PrivateMean | None:
    """What protects the updates of a run; ``None`` if nothing does.

    Args:
        config: Of the run.
        num_clients: C.

    Raises:
        ConfigError: If the budget cannot be kept.
    """
    how = settings(PrivacySettings, config.get("privacy") or {}, "privacy")
    if not how.is_on:
        return None
    return PrivateMean(how, sampling_of(config, num_clients), config.trainer.num_rounds, config.seed)


def introduction(private: PrivateMean | None) -> str:
    """A line for people on what is protected and how much noise that needs; empty if nothing is."""
    if private is None:
        return ""
    given, sampling = private.settings, private.sampling
    return (
        f"privacy: each {given.unit}'s data, ε={given.epsilon:g} and δ={given.delta:g} after all rounds (neighbours: "
        f"{sampling.neighbours}; {sampling.event}); noise multiplier {private.multiplier:.4g}, so "
        f"{private.std:.3g} in each entry of the mean of {sampling.cohort_size} updates clipped to {private.bound:g}"
    )
