"""How long a round takes here: a few real steps of the largest client."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from itertools import pairwise

from omegaconf import DictConfig

from fellrec.build import build_loop, build_recommender
from fellrec.data.prepared import PreparedData
from fellrec.federated.client import LocalTrainer


def seconds_per_step(config: DictConfig, data: PreparedData, client: int, num_steps: int) -> float:
    """Median wall seconds of a local step, after one step to warm up.

    Args:
        config: The run's configuration; its backbone must have weights.
        data: The prepared data set.
        client: Whose batches are used.
        num_steps: Steps to time, at least 1.
    """
    recommender = build_recommender(config, data)
    loop = build_loop(config, recommender, ())
    wanted = num_steps + 1
    epochs = -(-wanted // recommender.datamodule.num_batches(client))
    settings = replace(loop.trainer.settings, local_epochs=epochs, max_local_steps=wanted)
    trainer = LocalTrainer(recommender.fabric, recommender.module, recommender.datamodule, loop.optimizer, settings)
    ends: list[float] = []
    trainer.train(client, client, 0, 0, on_step=lambda loss: ends.append(time.perf_counter()))
    return statistics.median(after - before for before, after in pairwise(ends))
