"""The pattern of the released FELLRec code, restated: the backbone is loaded three times for each client and round.

    python -m bench.released WORKLOAD RESULT.json

For each client and round, it is loaded to train, with the adapter written to a file; to validate the client's own users
with that file; and to read the adapter for the mean. The disk cache is warm, since every file has been read before.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from bench.plain import Adapter, Client, Report, Workload, mean


def main(folder: Path, result: Path) -> None:
    """All rounds; validation is as often as fellrec's, by client."""
    report, workload = Report(result), Workload(folder)
    how, users = workload.settings, workload.users("val")
    versions: list[Adapter] = [workload.initial]
    report.ndcg.append(Client(workload).ndcg(workload.initial, users))
    with tempfile.TemporaryDirectory() as place:
        for round_index in range(how["rounds"]):
            losses, received = [], []
            for client in range(how["clients"]):
                file = Path(place) / f"{client}.safetensors"
                trained, loss = Client(workload).train(versions[-1], workload.batches(round_index, client))
                save_file(trained, file)
                losses.append(loss)
                Client(workload).load(load_file(file))  # released: to validate, which is done below with the mean
                server = Client(workload)
                server.load(load_file(file))
                received.append(server.adapter())
            versions.append(mean(received, how["num_samples"]))
            report.losses.append(losses)
            report.ndcg.append(Client(workload).ndcg(versions[-1], users))
    best = max(range(len(versions)), key=report.ndcg.__getitem__)
    report.ndcg.append(Client(workload).ndcg(versions[best], workload.users("test")))
    report.write()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
