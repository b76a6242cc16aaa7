"""Time of the executed split relative to the unsplit run; traffic and accuracy by data type of hidden states.

python benchmarks/split_throughput.py [--rounds N] [--repeats N] [--parts inprocess,distributed,packing] [OVERRIDES…]

Rounds of all configurations are interleaved, so that other jobs on the machine affect all of them; results are medians.
``CPU ratio`` compares CPU time, which is less affected by other jobs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import RoundRecord
from fellrec.report.costs import Rounds
from fellrec.report.tables import markdown

PACKINGS = ("float32", "bfloat16", "int8")
NO_EVALUATION = ["trainer.num_rounds=1000", "trainer.evaluate_every=1000"]


class Measured:
    """A loop with the record and the CPU time of every round.

    Args:
        overrides: Of the configuration.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        config = compose(overrides)
        self.loop: FederatedLoop = build_loop(config, build_recommender(config, build_data(config)))
        self.records: list[RoundRecord] = []
        self.rounds = Rounds()

    def run_round(self) -> None:
        """Run the next round."""
        started = time.process_time()
        record = self.loop.run_round(self.loop.progress.round_index)
        self.rounds = self.rounds.plus(record, time.process_time() - started)
        self.records.append(record)

    def seconds(self) -> float:
        """Median of all rounds except the first."""
        return median(self.rounds.round_seconds[1:])

    def cpu_seconds(self) -> float:
        """Median of all rounds except the first; for rounds without an evaluation."""
        return median(self.rounds.cpu_seconds[1:])

    def busy_rate(self) -> float:
        """Busy rate of the server over all rounds."""
        return self.rounds.busy_rate("server") or 0.0


def interleave(runs: Sequence[Measured], num_rounds: int) -> None:
    """Run one round of each loop in turn, every second time in reverse order."""
    for number in range(num_rounds):
        for run in runs if number % 2 == 0 else reversed(runs):
            run.run_round()


def in_process(overrides: Sequence[str], options: argparse.Namespace) -> pd.DataFrame:
    """Compare an executed round with an unsplit one, both in this process."""
    base = [*overrides, *NO_EVALUATION]
    unsplit, split = Measured(base), Measured([*base, "split.transport=inprocess"])
    interleave([unsplit, split], options.rounds * options.repeats + 1)
    row = _row("1", split.seconds(), unsplit.seconds(), split.busy_rate())
    return pd.DataFrame([{**row, "CPU ratio": f"{split.cpu_seconds() / unsplit.cpu_seconds():.2f}"}])


def distributed(overrides: Sequence[str], options: argparse.Namespace) -> pd.DataFrame:
    """Compare runs started by torchrun with unsplit rounds of this process, which run between the launches."""
    base = [*overrides, f"trainer.num_rounds={options.rounds + 1}", "trainer.evaluate_every=1000"]
    unsplit = Measured([*overrides, *NO_EVALUATION])
    interleave([unsplit], 1)
    found: dict[int, list[tuple[float, float]]] = {}
    for _, processes in itertools.product(range(options.repeats), (2, 3)):
        interleave([unsplit], options.rounds)
        found.setdefault(processes, []).append(_launch(base, processes))
    interleave([unsplit], options.rounds)
    return pd.DataFrame(
        [
            _row(str(processes), median(s for s, _ in runs), unsplit.seconds(), median(b for _, b in runs))
            for processes, runs in found.items()
        ]
    )


def _launch(overrides: Sequence[str], processes: int) -> tuple[float, float]:
    """Median seconds of all rounds except the first, and the server's busy rate."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "fellrec", "train", *overrides, "split.transport=distributed", f"trainer.devices={processes}"]
        command += [f"run_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        measured = json.loads(Path(folder, "run", "results.json").read_text())["cost"]["measured"]
    seconds, busy = median(measured["round_seconds"][1:]), measured["server_busy_rate"]
    sys.stderr.write(f"{processes} processes: {seconds:.2f} s/round, server busy {busy:.2f}\n")
    return seconds, busy


def _row(processes: str, seconds: float, unsplit: float, busy: float) -> dict[str, str]:
    return {
        "processes": processes,
        "s/round": f"{seconds:.2f}",
        "unsplit": f"{unsplit:.2f}",
        "ratio": f"{seconds / unsplit:.2f}",
        "server busy": f"{100 * busy:.0f} %",
    }


def packing(overrides: Sequence[str], options: argparse.Namespace) -> pd.DataFrame:
    """The same run with each data type of hidden states and gradients; accuracy on the test split."""
    base = [*overrides, "split.transport=inprocess", f"trainer.num_rounds={options.rounds}"]
    runs = {name: Measured([*base, f"split.hidden_dtype={name}", f"split.gradient_dtype={name}"]) for name in PACKINGS}
    for run in runs.values():
        run.loop.validate(-1)
    interleave(list(runs.values()), options.rounds)
    rows, plain_loss = [], _last_loss(runs[PACKINGS[0]])
    for name, run in runs.items():
        ledger, summary = run.loop.exchange.ledger, run.loop.test().summary
        crossing = sum(ledger.total(kind=kind, phase="train") for kind in ("hidden_state", "gradient"))
        rows.append(
            {
                "data type": name,
                "MB a round": f"{crossing / options.rounds / 1e6:.1f}",
                "s/round": f"{run.seconds():.2f}",
                "last loss": f"{_last_loss(run):.5f}",
                "difference": f"{_last_loss(run) - plain_loss:+.5f}",
                "NDCG@10": f"{summary['ndcg_at_10/mean']:.4f}",
            }
        )
    return pd.DataFrame(rows)


def _last_loss(run: Measured) -> float:
    """Mean training loss over the clients of the last round."""
    trained = run.records[-1].trained
    return sum(client.loss for client in trained) / len(trained)


PARTS: dict[str, Callable[[Sequence[str], argparse.Namespace], pd.DataFrame]] = {
    "inprocess": in_process,
    "distributed": distributed,
    "packing": packing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each run")
    parser.add_argument("--repeats", type=int, default=2, help="launches of each distributed run")
    parser.add_argument("--parts", default=",".join(PARTS), help="tables to produce")
    parser.add_argument("overrides", nargs="*", help="overrides of fellrec train")
    options = parser.parse_args()
    for part in options.parts.split(","):
        sys.stdout.write(f"{part}\n\n{markdown(PARTS[part](options.overrides, options))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
