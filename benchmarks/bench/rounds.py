"""Seconds of rounds, ours and the rivals' in turn in one process; prints a JSON object.

    python -m bench.rounds WORK generative ours,loop --repeats 3 [OVERRIDES…]

A round is the local training of all clients and the mean of their adapters, without evaluation and files. Rivals have
their batches in memory, padded; fellrec builds its own. Round 0 warms up, and each repeat trains all further rounds of
the workload. With ``hf_trainer`` and ``lightning_trainer`` the rows of all clients are pooled: the fit of one round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.plain import Client, Workload, mean
from bench.settings import ROUND, overrides_of
from bench.workload import frozen
from fellrec.config.compose import compose
from fellrec.experiment.auto import choose, is_auto
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop

FAST = {"precision": "auto", "attention": "auto", "clients_per_step": "5"}
"""Settings of ``trainer`` that are faster and change losses by rounding only; those that fellrec has are used."""


class Competitor(Protocol):
    """Trains rounds."""

    def restart(self) -> None:
        """Go back to the initial adapter."""

    def round(self, round_index: int) -> list[float]:
        """Train one round; gives the loss of each client."""


class Ours:
    """fellrec's loop, without callbacks."""

    def __init__(self, workload: Workload, overrides: Sequence[str]) -> None:
        # The last round of a run is validated: this run has more rounds than are trained.
        config = compose([*overrides, "trainer.num_rounds=1000", "trainer.evaluate_every=1000"])
        data = build_data(config)
        self.config = choose([config], data)[0] if is_auto(config) else config
        self.recommender = build_recommender(self.config, data)
        self.restart()

    def restart(self) -> None:
        """See ``Competitor``."""
        self.loop = build_loop(self.config, self.recommender)

    def round(self, round_index: int) -> list[float]:
        """See ``Competitor``."""
        return [trained.loss for trained in self.loop.run_round(round_index).trained]


class Loop:
    """The hand-written loop."""

    def __init__(self, workload: Workload, overrides: Sequence[str]) -> None:
        self.workload, self.client = workload, Client(workload)
        how = workload.settings
        self.batches = [[workload.batches(r, c) for c in range(how["clients"])] for r in range(how["rounds"])]
        self.restart()

    def restart(self) -> None:
        """See ``Competitor``."""
        self.adapter = self.workload.initial

    def round(self, round_index: int) -> list[float]:
        """See ``Competitor``."""
        trained = [self.client.train(self.adapter, batches) for batches in self.batches[round_index]]
        self.adapter = mean([adapter for adapter, _ in trained], self.workload.settings["num_samples"])
        return [loss for _, loss in trained]


def fast_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of `FAST` that this version of fellrec has."""
    trainer = compose(list(overrides)).trainer
    return [f"trainer.{name}={value}" for name, value in FAST.items() if name in trainer]


def competitor(name: str, workload: Workload, overrides: Sequence[str]) -> Competitor:
    """A competitor by name."""
    if name == "ours":
        return Ours(workload, overrides)
    if name == "ours_fast":
        return Ours(workload, [*overrides, *fast_overrides(overrides)])
    if name == "loop":
        return Loop(workload, overrides)
    rival: Callable[[Workload], Competitor] = importlib.import_module(f"bench.{name}").Rival
    return rival(workload)


def measure(competitors: dict[str, Competitor], rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds and losses of each competitor, which take turns."""
    found: dict[str, Any] = {name: {"wall": [], "cpu": [], "losses": []} for name in competitors}
    for repeat in range(repeats):
        for one in competitors.values():
            one.restart()
        for round_index in range(rounds):
            order = list(competitors.items())
            for name, one in order if (repeat + round_index) % 2 else reversed(order):
                wall, cpu = time.perf_counter(), time.process_time()
                losses = one.round(round_index)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if repeat == 0:
                    found[name]["losses"].append(losses)
                if repeat or round_index:
                    found[name]["wall"].append(wall)
                    found[name]["cpu"].append(cpu)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for frozen workloads")
    parser.add_argument("family", help="retrieval or generative, with pooled- before it for pooled rows")
    parser.add_argument("competitors", help="names, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    overrides = overrides_of(options.family, ROUND, options.overrides)
    workload = frozen(options.work / options.family, overrides)
    competitors = {name: competitor(name, workload, overrides) for name in options.competitors.split(",")}
    found = measure(competitors, workload.settings["rounds"], options.repeats)
    fast = competitors.get("ours_fast")
    if isinstance(fast, Ours):
        found["ours_fast"]["settings"] = [
            f"{name}={fast.config.trainer[name]}" for name in FAST if name in fast.config.trainer
        ]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
