"""Who takes part in a round, and how many must finish it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fellrec.errors import TrainingError
from fellrec.federated.population import Population
from fellrec.federated.records import Failed, Trained
from fellrec.federated.settings import ParticipationSettings
from fellrec.functional.participation import cohort, cohort_size, largest, weighted_draw

Measure = Callable[[Sequence[int]], Mapping[int, float]]
"""Gives each participant's loss."""


class Participation:
    """Draws the cohort of a round, a pure function of seed and round.

    Args:
        settings: Fraction of the clients, quorum, and what happens if a client fails.
        seed: Of the run.
        num_samples: Training targets of each participant, for ``participation.candidates``.
    """

    def __init__(self, settings: ParticipationSettings, seed: int, num_samples: Sequence[int] = ()) -> None:
        self.settings = settings
        self.seed = seed
        self.num_samples = num_samples

    def size(self, population: Population) -> int:
        """Participants of a round."""
        return cohort_size(population.num_participants, self.settings.rate)

    def rows(self, population: Population, round_index: int, measure: Measure | None = None) -> tuple[int, ...]:
        """Rows of the population that train in a round, ascending.

        Args:
            population: Of the run.
            round_index: From 0.
            measure: Lets participants measure the losses of the models that they would start from; not needed without
                ``participation.candidates``.
        """
        num, wider = population.num_participants, self.settings.candidates
        if wider is None:
            drawn = cohort(num, self.settings.rate, self.seed, round_index)
        else:
            assert measure is not None, "participation.candidates needs losses"
            candidates = weighted_draw(self.num_samples, cohort_size(num, wider), self.seed, round_index)
            drawn = largest(measure(candidates), self.size(population))
        return tuple(sorted(row for participant in drawn for row in population.rows_of(participant)))

    def quorum(self, outcomes: Sequence[Trained | Failed]) -> list[Trained]:
        """Those of the cohort that finished; a client has finished if all of its models have.

        Raises:
            TrainingError: If one failed and ``on_failure`` is ``"stop"``, or too few finished.
        """
        finished = [outcome for outcome in outcomes if isinstance(outcome, Trained)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        if not failed:
            return finished
        if self.settings.on_failure == "stop":
            raise TrainingError(failed[0].reason)
        clients = {outcome.job.client for outcome in outcomes}
        complete = clients - {outcome.job.client for outcome in failed}
        least = max(1, math.ceil(self.settings.quorum * len(clients) - 1e-9))
        if len(complete) < least:
            raise TrainingError(
                f"only {len(complete)} of {len(clients)} clients finished round {failed[0].job.round_index}, "
                f"participation.quorum={self.settings.quorum} needs {least}; "
                + "; ".join(outcome.reason for outcome in failed)
            )
        return [outcome for outcome in finished if outcome.job.client in complete]
