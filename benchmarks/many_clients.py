"""Memory and time by number of clients: one-user clients, the same cohort size in every round.

    python benchmarks/many_clients.py --clients 100,5000 --cohort 100 --rounds 10 --root ../shared/data/ml-1m

Each population runs in its own process. Memory is anonymous memory (``RssAnon`` of /proc/self/status): memory that
the kernel cannot drop and read again. It excludes memory-mapped adapter files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from fellrec.distributed.memory import anonymous_bytes

MB = 1e6


class Peak:
    """Maximum anonymous memory since construction, sampled every few milliseconds."""

    def __init__(self, seconds: float = 0.005) -> None:
        self.num_bytes = anonymous_bytes()
        self._seconds = seconds
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.num_bytes = max(self.num_bytes, anonymous_bytes())
            time.sleep(self._seconds)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Hydra overrides of one population."""
    common = [
        "partition=per_user",
        f"adapter={options.adapter}",
        f"trainer.num_rounds={options.rounds}",
        f"trainer.evaluate_every={options.rounds}",
        "trainer.accelerator=cpu",
        *options.overrides,
    ]
    if options.root:
        common += ["data=ml_1m", f"data.root={options.root}"]
        # The remaining users of ML-1M's 6,040 are public; the small population is a sample of as many users.
        kept = min(6040, round(options.clients / 0.8))
        common += [f"data.max_users={kept}", f"data.public_user_rate={1 - options.clients / kept:.8f}"]
    else:
        common += [f"data.reader.num_users={options.clients}", "data.public_user_rate=0"]
    return [*common, f"participation.rate={min(1.0, options.cohort / options.clients):.8f}"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run one population and measure time and memory."""
    import torch

    from fellrec.callbacks.checkpoint import Checkpoint
    from fellrec.config.compose import compose
    from fellrec.experiment.build import build_data, build_recommender
    from fellrec.experiment.federation import build_federation
    from fellrec.federated.callback import FederatedCallback

    torch.set_num_threads(options.threads)
    config = compose(overrides_of(options))
    recommender = build_recommender(config, build_data(config))
    seen: dict[str, list[float]] = {"round": [], "evaluation": [], "memory": []}

    class Meter(FederatedCallback):
        def on_evaluate_start(self, stage: str) -> None:
            self.started = time.perf_counter()

        def on_evaluate_end(self, evaluation: Any) -> None:
            seen["evaluation"].append(time.perf_counter() - self.started)

        def on_round_end(self, record: Any) -> None:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # return free memory of the allocator to the system
            seen["round"].append(record.seconds)
            seen["memory"].append(anonymous_bytes())

    folder = Path(tempfile.mkdtemp(prefix="many-clients-", dir=options.folder))
    gc.collect()
    before, peak = anonymous_bytes(), Peak()
    try:
        federation = build_federation(config, recommender)
        population = federation.population
        cohort = federation.participation.draw(population, 0).rows
        checkpoint = Checkpoint(folder, federation.persisted, population, cohort_size=len(cohort))
        federation.loop([checkpoint, Meter()]).run()
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    late = seen["memory"][len(seen["memory"]) // 4 :]  # the first rounds fill caches
    slope = float(np.polyfit(range(len(late)), late, 1)[0]) if len(late) > 2 else float("nan")
    return {
        "clients": recommender.data.num_clients,
        "cohort": len(cohort),
        "rounds": options.rounds,
        "adapter_bytes": population.bank.adapter_bytes,
        "seconds_per_round": float(np.median(seen["round"])),
        "evaluation_seconds": seen["evaluation"],
        "before_bytes": before,
        "peak_bytes": peak.num_bytes,
        "round_bytes": seen["memory"],
        "slope_bytes_per_round": slope,
        "disk_bytes": disk,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="100,5000", help="numbers of clients, separated by commas")
    parser.add_argument("--cohort", type=int, default=100, help="clients per round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--adapter", default="lora", choices=["lora", "full"])
    parser.add_argument("--root", default="", help="directory of MovieLens-1M (default: synthetic data)")
    parser.add_argument("--folder", default=None, help="parent directory of run directories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON line per population")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides")
    return parser.parse_args()


def main() -> None:
    """Run one population in this process, or several in one process each."""
    options = parse()
    populations = options.clients.split(",")
    if len(populations) == 1:
        options.clients = int(populations[0])
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return
    if not options.json:
        sys.stdout.write("clients  cohort  s/round  s/evaluation  before MB  peak MB  KB/round  disk MB\n")
    for population in populations:
        arguments = list(sys.argv[1:])
        at = next((n for n, value in enumerate(arguments) if value.startswith("--clients")), None)
        if at is not None:
            del arguments[at : at + (1 if "=" in arguments[at] else 2)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments, "--clients", population],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        line = done.stdout.splitlines()[-1]
        found = json.loads(line)
        sys.stdout.write(line + "\n" if options.json else _row(found))
        sys.stdout.flush()


def _row(found: dict[str, Any]) -> str:
    seconds = max(found["evaluation_seconds"])
    return (
        f"{found['clients']:7d}  {found['cohort']:6d}  {found['seconds_per_round']:7.2f}  "
        f"{seconds:12.1f}  {found['before_bytes'] / MB:9.1f}  {found['peak_bytes'] / MB:7.1f}  "
        f"{found['slope_bytes_per_round'] / 1e3:8.1f}  {found['disk_bytes'] / MB:7.1f}\n"
    )


if __name__ == "__main__":
    main()
