"""NVFlare's simulator: the hand-written local training behind its client API, its FedAvg recipe.

    python -m bench.nvflare_job WORKLOAD RESULT.json

Every client validates its own users with the model that it receives; the last model is validated and the best one
tested after the simulation, so that there are as many evaluations as fellrec's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes import FedAvgRecipe
from nvflare.recipe import SimEnv

from bench.nvflare_client import AdapterModule, from_state
from bench.plain import Adapter, Client, Report, Workload


def main(folder: Path, result: Path) -> None:
    """All rounds."""
    report, workload = Report(result), Workload(folder)
    clients, rounds = workload.settings["clients"], workload.settings["rounds"]
    with tempfile.TemporaryDirectory() as place:
        recipe = FedAvgRecipe(
            name="bench",
            model=AdapterModule(str(folder.resolve())),
            min_clients=clients,
            num_rounds=rounds,
            train_script=str(Path(__file__).with_name("nvflare_client.py")),
            train_args=f"{folder.resolve()} {place}",
        )
        recipe.execute(SimEnv(num_clients=clients, workspace_root=f"{place}/workspace"))
        found = [json.loads(file.read_text()) for file in sorted(Path(place).glob("client-*.json"))]
        last = max(Path(place).rglob("FL_global_model.pt"), key=os.path.getmtime)
        versions: list[Adapter] = [torch.load(Path(place) / f"received-{n}.pt") for n in range(rounds)]
        versions.append(from_state(torch.load(last)["model"]))
    report.losses = [[client["losses"][number] for client in found] for number in range(rounds)]
    report.ndcg = [sum(client["ndcg"][number] for client in found) / clients for number in range(rounds)]
    client = Client(workload)
    report.ndcg.append(client.ndcg(versions[-1], workload.users("val")))
    best = max(range(len(versions)), key=report.ndcg.__getitem__)
    report.ndcg.append(client.ndcg(versions[best], workload.users("test")))
    report.write()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
