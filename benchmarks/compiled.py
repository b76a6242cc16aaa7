"""Steps with and without ``trainer.compile``: CPU seconds of forward and backward pass, and the losses of both.

    python benchmarks/compiled.py [OVERRIDES…]

The batches are the same; medians of their repeats after the first one. The seconds of compiling are wall time, because
compilers
are processes of their own.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.federated.trial import trial_step

_COMMON = ("data=synthetic", "data.reader.num_users=400")
_BATCHES, _REPEATS = 6, 5


def measure(overrides: Sequence[str], is_compiled: bool) -> tuple[float, float, list[float]]:
    """Median CPU seconds of a step, wall seconds of the first pass over the batches, and its losses."""
    config = compose([*_COMMON, *overrides, f"trainer.compile={str(is_compiled).lower()}"])
    recommender = build_recommender(config, build_data(config))
    batches = list(itertools.islice(recommender.datamodule.train_loader(0, 0), _BATCHES))
    started, measured = time.perf_counter(), list[float]()
    losses = [trial_step(recommender.fabric, recommender.module, batch, 0) for batch in batches]
    first = time.perf_counter() - started
    for batch in batches * _REPEATS:
        began = time.process_time()
        trial_step(recommender.fabric, recommender.module, batch, 0)
        measured.append(time.process_time() - began)
    return statistics.median(measured), first, losses


def main(overrides: Sequence[str]) -> None:
    """Print the seconds of both and their ratio."""
    torch.set_num_threads(1)
    (plain, plain_first, expected), (fast, fast_first, losses) = (measure(overrides, on) for on in (False, True))
    difference = max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(losses, expected, strict=True))
    sys.stdout.write(
        f"step: {plain:.3f} s, compiled {fast:.3f} s, ratio {fast / plain:.2f}; "
        f"compiling {fast_first - plain_first:.0f} s; losses differ by {difference:.1e}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
