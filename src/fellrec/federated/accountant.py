"""What releases of noised sums of updates cost: Google's ``dp-accounting``, and the event of each kind of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from fellrec.errors import ConfigError

_ORDERS = (*range(2, 21), 24, 28, 32, 40, 48, 64, 128, 256)
"""Orders of Rényi divergence; the bound holds for any of them."""
_TOLERANCE = 1e-3
"""Largest distance of a noise multiplier from the smallest one, above it."""
_SMALLEST, _GUESS = 0.1, 1.0
_SLACK = 0.01
"""Fraction of δ for rounds without clients, which are refused before a run instead of being released as noise."""


@dataclass(frozen=True)
class Sampling:
    """Who takes part in a round, as far as a guarantee depends on it; the population itself is public.

    Attributes:
        kind: ``"all"`` clients, except those that drop out; ``"poisson"``, each with the same probability,
            independently; or ``"fixed"``, a cohort of fixed size, drawn uniformly without replacement.
        num_clients: C.
        cohort_size: Clients of a round; with ``"poisson"`` their expected number.
        dropout: Probability that a client that was drawn drops out, whatever its data are.
    """

    kind: Literal["all", "poisson", "fixed"]
    num_clients: int
    cohort_size: int
    dropout: float = 0.0

    @property
    def sensitivity(self) -> float:
        """Largest change of the sum of clipped updates, in clipping norms, between neighbouring populations."""
        return 2.0 if self.kind == "fixed" else 1.0

    @property
    def neighbours(self) -> str:
        """Which populations the guarantee does not tell apart."""
        return {"all": "zero-out of one", "poisson": "zero-out of one", "fixed": "replacement of one"}[self.kind]

    @property
    def event(self) -> str:
        """What the accountant composes, one for each round."""
        size = f"{self.cohort_size} of {self.num_clients}"
        return {
            "all": "GaussianDpEvent",
            "poisson": f"PoissonSampledDpEvent({self.cohort_size / self.num_clients:.6g}, GaussianDpEvent)",
            "fixed": f"SampledWithoutReplacementDpEvent({size}, GaussianDpEvent)",
        }[self.kind]

    def epsilon(self, multiplier: float, num_rounds: int, delta: float) -> float:
        """ε of so many rounds.

        Args:
            multiplier: Standard deviation of the noise of the sum, divided by the clipping norm.
            num_rounds: Rounds; with ``"all"`` the largest number in which one client took part.
            delta: δ.

        Raises:
            ConfigError: If the package is not installed.
        """
        return _epsilon(self, multiplier, num_rounds, delta) if num_rounds else 0.0

    def multiplier(self, epsilon: float, num_rounds: int, delta: float) -> float:
        """The smallest noise multiplier with which so many rounds cost at most ε, within 0.001.

        Args:
            epsilon: ε.
            num_rounds: Rounds.
            delta: δ.

        Raises:
            ConfigError: If the package is not installed, or rounds without clients are too likely.
        """
        return _multiplier(self, epsilon, num_rounds, delta)

    def check_empty(self, epsilon: float, num_rounds: int, delta: float) -> None:
        """Refuse a population that is so small that rounds without clients weaken the guarantee.

        Such a round is refused before the run, so the cohorts are those of Poisson sampling without empty ones. With t,
        the probability of an empty one, (ε, δ) becomes (ε, δ + t exp(ε)).

        Raises:
            ConfigError: If ``t exp(ε)`` is more than a hundredth of δ.
        """
        if self.kind != "poisson":
            return
        absent = 1 - self.cohort_size / self.num_clients * (1 - self.dropout)
        chance = num_rounds * absent**self.num_clients
        if chance * math.exp(epsilon) > _SLACK * delta:
            raise ConfigError(
                f"privacy needs rounds that practically always have clients: with {self.num_clients} clients, of whom "
                f"{self.cohort_size} are expected, a round of {num_rounds} has none with probability {chance:.1g}; "
                "raise participation.rate, or use participation=default"
            )


def missing_accountant() -> str | None:
    """What to install before a private run, as a message; ``None`` if nothing is missing. Nothing is imported."""
    if find_spec("dp_accounting") is not None:
        return None
    return (
        "privacy=user_level and privacy=client_level need the package dp-accounting, which is not installed: pip "
        "install -c constraints.txt -e '.[privacy]'"
    )


def _library() -> Any:
    """The package; its import takes a second."""
    if (message := missing_accountant()) is not None:
        raise ConfigError(message)
    import dp_accounting

    return dp_accounting


def _delta_of(sampling: Sampling, delta: float) -> float:
    """What is left of δ for the noise."""
    return delta * (1 - _SLACK) if sampling.kind == "poisson" else delta


@lru_cache(maxsize=256)
def _epsilon(sampling: Sampling, multiplier: float, num_rounds: int, delta: float) -> float:
    dp, effective = _library(), multiplier / sampling.sensitivity
    if sampling.kind == "all":  # exact: n releases with multiplier z are one with z / √n (Balle and Wang 2018)
        return float(dp.get_epsilon_gaussian(effective / math.sqrt(num_rounds), delta))
    accountant = _accountant(sampling)()
    accountant.compose(_event(sampling, effective, num_rounds))
    return float(accountant.get_epsilon(_delta_of(sampling, delta)))


@lru_cache(maxsize=64)
def _multiplier(sampling: Sampling, epsilon: float, num_rounds: int, delta: float) -> float:
    dp = _library()
    sampling.check_empty(epsilon, num_rounds, delta)
    if sampling.kind == "all":
        return float(dp.get_sigma_gaussian(epsilon, delta) * math.sqrt(num_rounds))
    bracket = dp.LowerEndpointAndGuess(_SMALLEST, _GUESS)
    found = dp.calibrate_dp_mechanism(
        _accountant(sampling),
        lambda effective: _event(sampling, effective, num_rounds),
        epsilon,
        _delta_of(sampling, delta),
        bracket,
        tol=_TOLERANCE / sampling.sensitivity,
    )
    return float(found) * sampling.sensitivity


def _accountant(sampling: Sampling) -> Callable[[], Any]:
    """Makes the Rényi accountant of a kind of sampling."""
    dp = _library()
    relations = dp.NeighboringRelation
    relation = relations.REPLACE_ONE if sampling.kind == "fixed" else relations.ADD_OR_REMOVE_ONE
    return lambda: dp.rdp.RdpAccountant(_ORDERS, relation)


def _event(sampling: Sampling, effective: float, num_rounds: int) -> Any:
    """All rounds; the noise multiplier is relative to the sensitivity."""
    dp = _library()
    one = dp.GaussianDpEvent(effective)
    if sampling.kind == "poisson":
        one = dp.PoissonSampledDpEvent(sampling.cohort_size / sampling.num_clients, one)
    else:
        one = dp.SampledWithoutReplacementDpEvent(sampling.num_clients, sampling.cohort_size, one)
    return dp.SelfComposedDpEvent(one, num_rounds)
