"""Clients on several processes of one machine: seconds per round and peak memory.

    python benchmarks/processes.py                                   # 1, 2, 3 processes; 4, 8, 16 clients per round
    python benchmarks/processes.py --processes 1,2,4,8 --clients 64 -- data=ml_1m data.root=ml-1m

Each cell is one ``fellrec train`` in which every client trains in every round; every process has one thread. A round
is local training and aggregation, without evaluation; the first round is not timed. Memory is the maximum resident
memory of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from fellrec.functional.cost import human_bytes

DEFAULT = (
    *("data.reader.num_users=1200", "data.reader.num_items=300", "backbone.pretrain.steps=5", "adapter=lora"),
    *("trainer.max_local_steps=10", "trainer.batch_size=16"),
)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        processes: Number of processes.
        clients: Number of clients per round.
        seconds_per_round: Median over all rounds except the first.
        busy_rate: Fraction of the processes' time that is local training; ``None`` for one process.
        peak_bytes: Maximum memory of one process.
    """

    processes: int
    clients: int
    seconds_per_round: float
    busy_rate: float | None
    peak_bytes: int


def measure(processes: int, clients: int, rounds: int, overrides: Sequence[str], work: Path) -> Cell:
    """Run once and read the metrics from MLflow."""
    name = f"{processes}-{clients}"
    store = f"sqlite:///{work / name}.db"
    command = [
        *(sys.executable, "-m", "fellrec", "train", *overrides, f"trainer.devices={processes}"),
        *(f"partition.num_clients={clients}", "partition=random", f"trainer.num_rounds={rounds + 1}"),
        *(f"trainer.evaluate_every={rounds + 1}", f"run_dir={work / name}", f"tracking.uri={store}"),
        *(f"cache_dir={work / 'cache'}", "trainer.accelerator=cpu", "--format", "json"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])

    def history(metric: str) -> list[float]:
        points = sorted(client.get_metric_history(run.info.run_id, metric), key=lambda point: point.step)
        return [point.value for point in points][1:]

    busy, peaks = history("train/cost/process/busy_rate"), history("train/cost/process/peak_bytes")
    (learned,) = (rule for rule in json.loads(done.stdout)["rules"].values() if rule["kind"] == "learned")
    return Cell(
        processes=processes,
        clients=clients,
        seconds_per_round=statistics.median(history("train/cost/round_seconds")),
        busy_rate=statistics.mean(busy) if busy else None,
        peak_bytes=int(max([*peaks, learned["runs"][0]["peak_memory_bytes"]])),
    )


def show(cells: Sequence[Cell]) -> None:
    """Print the table."""
    table = Table(title=f"{os.cpu_count()} processors; seconds per round of local training and aggregation")
    for column in ("processes", "clients per round", "s/round", "times one", "processes busy", "peak memory of one"):
        table.add_column(column, justify="right")
    for cell in cells:
        first = next(other for other in cells if other.clients == cell.clients)
        busy = "" if cell.busy_rate is None else f"{100 * cell.busy_rate:.0f} %"
        table.add_row(
            *(str(cell.processes), str(cell.clients), f"{cell.seconds_per_round:.2f}"),
            *(f"{cell.seconds_per_round / first.seconds_per_round:.2f}", busy, human_bytes(cell.peak_bytes)),
        )
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells and print them; ``--json FILE`` writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,3")
    parser.add_argument("--clients", default="4,8,16")
    parser.add_argument("--rounds", type=int, default=4, help="rounds to time after the first")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("overrides", nargs="*", help="overrides for fellrec train, after --")
    options = parser.parse_args(arguments)
    processes, clients = ([int(item) for item in text.split(",")] for text in (options.processes, options.clients))
    with tempfile.TemporaryDirectory() as work:
        cells = [
            measure(number, size, options.rounds, options.overrides or DEFAULT, Path(work))
            for size in clients
            for number in processes
        ]
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    show(cells)


if __name__ == "__main__":
    main()
