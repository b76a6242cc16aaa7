"""Differential privacy of updates: a trusted server clips each client's update, adds them up, and adds noise."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import CheckpointError, ConfigError
from fellrec.federated.accountant import Sampling
from fellrec.federated.privacy_settings import PrivacySettings
from fellrec.functional.privacy import clip_factor, next_bound, norm_of, update_multiplier
from fellrec.functional.rng import derive_seed

log = logging.getLogger(__name__)


class PrivateMean:
    """The noised mean of clipped updates, and what it has cost: DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963).

    Per round, with the clipping norm C, the noise multiplier z and the expected cohort m, a constant:

        mean = (Σ_k Δ_k min(1, C / ‖Δ_k‖) + N(0, (z C)² I)) / m

    Every client counts the same: its number of samples would reveal something of its data. An update that is not finite
    counts as 0. All that the aggregation rule gets of the clients is this mean, so what it makes of it costs nothing
    more.

    Args:
        settings: The budget and how updates are clipped.
        sampling: Who takes part in a round.
        num_rounds: Rounds of the run.
        seed: Of the run; noise is a function of it, the round and the parameter. Whoever knows it can remove the noise.

    Raises:
        ConfigError: If ``dp-accounting`` is not installed, or the budget cannot be kept.

    Attributes:
        multiplier: z, of the whole release of a round.
        bound: C now.
    """

    def __init__(self, settings: PrivacySettings, sampling: Sampling, num_rounds: int, seed: int) -> None:
        assert settings.epsilon is not None, "privacy.unit is not none"
        assert settings.delta is not None, "privacy.unit is not none"
        self.settings, self.sampling, self.seed = settings, sampling, seed
        self.delta = settings.delta
        self.multiplier = sampling.multiplier(settings.epsilon, num_rounds, settings.delta)
        self.bound = float(settings.clip_norm)
        self.count_std = settings.count_std or max(sampling.cohort_size / 20, self.multiplier)
        if not math.isfinite(self.update_multiplier):
            raise ConfigError(
                f"privacy.count_std={self.count_std:g} is not allowed: more than half the noise multiplier "
                f"{self.multiplier:.4g}, or the noised count alone costs more than privacy.epsilon={settings.epsilon}"
            )
        self._num_rounds = 0
        self._rounds_of: Counter[int] = Counter()
        self._std = math.nan
        if settings.delta * sampling.num_clients >= 1:
            log.warning(
                "privacy.delta=%g with %d clients: such a δ allows publishing one client's data as they are; give less "
                "than 1 / number of clients",
                settings.delta,
                sampling.num_clients,
            )

    @property
    def update_multiplier(self) -> float:
        """That of the sum of updates; larger than `multiplier` if a count of the clients within the norm is noised too.

        The count's noise, relative to its sensitivity, is that of two populations that differ as the sums do.
        """
        if self.settings.clip_quantile is None:
            return self.multiplier
        return self.sampling.sensitivity * update_multiplier(
            self.multiplier / self.sampling.sensitivity, self.count_std / self.sampling.sensitivity
        )

    @property
    def std(self) -> float:
        """Standard deviation of the noise in each entry of the mean, now."""
        return self.update_multiplier * self.bound / self.sampling.cohort_size

    def mean(
        self, updates: Iterable[Mapping[str, Tensor]], clients: Sequence[int], round_index: int
    ) -> dict[str, Tensor]:
        """Clip, add up, add noise, divide; what the round cost is recorded.

        Args:
            updates: The clients' updates by parameter; read once, one after the other.
            clients: Who was to train in the round, those that failed too; not those that dropped out.
            round_index: From 0.

        Returns:
            Parameter → tensor of its shape, float64.
        """
        total: dict[str, Tensor] = {}
        within = count = 0
        for update in updates:
            norm = norm_of(update)
            count, within = count + 1, within + (norm <= self.bound)
            factor = clip_factor(norm, self.bound)
            for name, tensor in update.items():
                clipped = tensor.double() * factor if math.isfinite(norm) else torch.zeros_like(tensor).double()
                total[name] = total[name] + clipped if name in total else clipped
        self._std = self.std
        mean = {name: t / self.sampling.cohort_size + self._noise(name, t, round_index) for name, t in total.items()}
        if self.settings.clip_quantile is not None:
            self._adapt(within, count, round_index)
        self._num_rounds += 1
        self._rounds_of.update(set(clients))
        return mean

    @property
    def epsilon(self) -> float:
        """ε of the rounds so far, from who really took part."""
        rounds = max(self._rounds_of.values(), default=0) if self.sampling.kind == "all" else self._num_rounds
        return self.sampling.epsilon(self.multiplier, rounds, self.delta)

    def costs(self) -> dict[str, float]:
        """Figures of the last round, under MLflow-safe names."""
        return {"privacy/epsilon": self.epsilon, "privacy/noise_std": self._std, "privacy/clip_norm": self.bound}

    def report(self) -> dict[str, Any]:
        """What the run guarantees, JSON values."""
        return {
            "unit": self.settings.unit,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "planned_epsilon": self.settings.epsilon,
            "noise_multiplier": self.multiplier,
            "num_rounds": self._num_rounds,
            "neighbours": self.sampling.neighbours,
            "event": self.sampling.event,
        }

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        return {
            "bound": self.bound,
            "multiplier": self.multiplier,
            "num_rounds": self._num_rounds,
            "rounds_of": {str(client): count for client, count in sorted(self._rounds_of.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``.

        Raises:
            CheckpointError: If the noise was other than it would be now, as with another version of the accountant.
        """
        if not math.isclose(state["multiplier"], self.multiplier, rel_tol=1e-6):
            raise CheckpointError(
                f"the run was started with the noise multiplier {state['multiplier']:.6g}, and dp-accounting now gives "
                f"{self.multiplier:.6g}: install the version that it was started with"
            )
        self.multiplier = float(state["multiplier"])
        self.bound, self._num_rounds = float(state["bound"]), int(state["num_rounds"])
        self._rounds_of = Counter({int(client): int(count) for client, count in state["rounds_of"].items()})

    def _noise(self, name: str, like: Tensor, round_index: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "privacy", round_index, name))
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (self._std * noise).to(like.device)

    def _adapt(self, within: int, count: int, round_index: int) -> None:
        """Let the norm follow a noised count of the clients within it, each of which counts ±1/2."""
        assert self.settings.clip_quantile is not None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "privacy count", round_index))
        noise = self.count_std * float(torch.randn((), generator=generator, dtype=torch.float64))
        fraction = 0.5 + (within - count / 2 + noise) / self.sampling.cohort_size
        self.bound = next_bound(self.bound, fraction, self.settings.clip_quantile, self.settings.clip_rate)
