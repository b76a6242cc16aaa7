"""Times a few local steps of the largest client."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

from omegaconf import DictConfig, OmegaConf

from fellrec.data.prepared import PreparedData
from fellrec.errors import TrainingError
from fellrec.experiment.build import build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import Failed


class _Clock(FederatedCallback):
    """Records the end time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, loss: float) -> None:
        """Record the time; the loss is a number, so a GPU has finished the step."""
        self.ends.append(time.perf_counter())


def seconds_per_step(config: DictConfig, data: PreparedData, client: int, num_steps: int) -> float:
    """Median wall-clock seconds of a local step, after one warm-up step.

    Args:
        config: The configuration of the run; its backbone has weights, and client and server are in one process.
        data: The prepared data set.
        client: The client that trains.
        num_steps: Steps to time, at least 1.
    """
    wanted = num_steps + 1
    recommender = build_recommender(config, data)
    in_epoch = -(-recommender.datamodule.num_batches(client) // config.trainer.accumulate_grad_batches)
    epochs = -(-wanted // in_epoch)
    short = OmegaConf.merge(config, {"trainer": {"local_epochs": epochs, "max_local_steps": wanted}})
    assert isinstance(short, DictConfig)
    clock = _Clock()
    loop = build_loop(short, recommender, [clock])
    population = loop.population
    row = population.rows_of(min(client, population.num_participants - 1))[-1]
    (outcome,) = loop.train([population.job(row, 0)])
    if isinstance(outcome, Failed):
        raise TrainingError(outcome.reason)
    return statistics.median(after - before for before, after in pairwise(clock.ends))
