"""The hand-written loop: one process, one model, FedAvg over the clients' adapters, as many evaluations as fellrec.

python -m bench.loop WORKLOAD RESULT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.plain import Adapter, Client, Report, Workload, mean


def run_round(client: Client, workload: Workload, adapter: Adapter, round_index: int) -> tuple[Adapter, list[float]]:
    """Train all clients from one adapter; gives the mean and the clients' losses."""
    trained = [
        client.train(adapter, workload.batches(round_index, number)) for number in range(workload.settings["clients"])
    ]
    return mean([new for new, _ in trained], workload.settings["num_samples"]), [loss for _, loss in trained]


def main(folder: Path, result: Path) -> None:
    """All rounds: validation before the first and after each one, and the test of the best."""
    report, workload = Report(result), Workload(folder)
    client, adapter = Client(workload), workload.initial
    versions = [adapter]
    evaluates = workload.settings["family"] == "retrieval"
    if evaluates:
        report.ndcg.append(client.ndcg(adapter, workload.users("val")))
    for round_index in range(workload.settings["rounds"]):
        adapter, losses = run_round(client, workload, adapter, round_index)
        versions.append(adapter)
        report.losses.append(losses)
        if evaluates:
            report.ndcg.append(client.ndcg(adapter, workload.users("val")))
    if evaluates:
        best = max(range(len(versions)), key=report.ndcg.__getitem__)
        report.ndcg.append(client.ndcg(versions[best], workload.users("test")))
    report.write()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
