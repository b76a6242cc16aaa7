"""Seconds of a round with validation, 500 clients against 5, with a cohort of 5 in both; prints a JSON object.

    python -m bench.clients aggregation=fellrec --rounds 4 [OVERRIDES…]

The same users, drawn into clients at random; each client of the cohort takes one local step of 8 rows, so the
arithmetic of training is the same. The populations take turns, in one process, without files; the first round warms up.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.loop import FederatedLoop

COMMON = (
    *("data=synthetic", "data.reader.num_users=2500", "partition=random", "adapter=lora", "adapter.dropout=0"),
    *("trainer.max_local_steps=1", "trainer.batch_size=8", "trainer.num_rounds=1000", "trainer.accelerator=cpu"),
    "backbone.pretrain.steps=10",
)
COHORT, MANY = 5, 500


def loop_of(num_clients: int, overrides: Sequence[str]) -> FederatedLoop:
    """A loop after its first validation."""
    rate = COHORT / num_clients
    own = (f"partition.num_clients={num_clients}", f"participation.rate={rate}")
    config = compose([*COMMON, *own, *overrides])
    loop = build_loop(config, build_recommender(config, build_data(config)))
    loop.validate(-1)
    return loop


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--many", type=int, default=MANY)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    loops = {"ours": loop_of(options.many, options.overrides), "rival": loop_of(COHORT, options.overrides)}
    found: dict[str, dict[str, Any]] = {name: {"wall": [], "cpu": []} for name in loops}
    for round_index in range(options.rounds + 1):
        for name, loop in loops.items():
            wall, cpu = time.perf_counter(), time.process_time()
            record = loop.run_round(round_index)
            assert len(record.trained) == COHORT
            if round_index:
                found[name]["wall"].append(time.perf_counter() - wall)
                found[name]["cpu"].append(time.process_time() - cpu)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
