"""Five clients at once or one after the other: time of a round of local training, interleaved, as a ratio.

    python benchmarks/clients_per_step.py [--rounds 5] [OVERRIDES…]

Each round is trained by both ways in turn, from adapters of their own; the first is a warm-up. Time is CPU time of this
process on one thread, on a GPU wall-clock time.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence

import torch

from fellrec.config.compose import compose
from fellrec.distributed.devices import wait_for
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.loop import FederatedLoop

LORA = ["adapter=lora", "partition.num_clients=5", "trainer.num_rounds=1000", "trainer.evaluate_every=1000"]
SMALL = ["data=synthetic", "data.reader.num_users=300", "backbone.pretrain.steps=3"]
CASES = (
    ["trainer.batch_size=8", "trainer.max_local_steps=6"],
    ["trainer.batch_size=64", "trainer.max_local_steps=2"],
    ["objective=generative", "trainer.batch_size=8", "trainer.max_local_steps=4"],
)
"""Measured without overrides, with the tiny backbone on synthetic data."""


def measure(overrides: Sequence[str], rounds: int) -> tuple[float, float]:
    """Seconds of a round one after the other, and with five clients at once; medians."""
    loops: list[FederatedLoop] = []
    for number in (1, 5):
        config = compose([*LORA, *overrides, f"trainer.clients_per_step={number}"])
        recommender = build_recommender(config, build_data(config))
        loops.append(build_loop(config, recommender))
    device = recommender.fabric.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: list[list[float]] = [[], []]
    for round_index in range(rounds + 1):
        for loop, own in zip(loops, seconds, strict=True):
            wait_for(device)
            started = clock()
            loop.run_round(round_index)
            wait_for(device)
            own.append(clock() - started)
    first, second = (sorted(own[1:])[rounds // 2] for own in seconds)
    return first, second


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to time after the first")
    parser.add_argument(
        "overrides", nargs="*", help="settings; without any, those of the table in benchmarks/README.md"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print("| settings | one after the other: s | five at once: s | ratio |\n|---|---|---|---|")
    for overrides in [options.overrides] if options.overrides else [[*SMALL, *case] for case in CASES]:
        alone, joint = measure(overrides, options.rounds)
        shown = " ".join(override for override in overrides if override not in SMALL)
        print(f"| `{shown}` | {alone:.2f} | {joint:.2f} | {alone / joint:.2f} |", flush=True)


if __name__ == "__main__":
    main()
