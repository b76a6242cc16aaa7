"""Flower's simulation: the hand-written local training in a ClientApp, FedAvg in a ServerApp, evaluation at the server.

python -m bench.flower WORKLOAD RESULT.json
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from bench.plain import Client, Report, Workload

client_app = ClientApp()


@cache
def client_of(folder: str) -> Client:
    """The model of a Ray worker, which stays from message to message."""
    torch.set_num_threads(1)
    return Client(Workload(Path(folder)))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Local training of one client."""
    config, partition = message.content["config"], int(context.node_config["partition-id"])
    client = client_of(str(config["folder"]))
    workload, round_index = client.workload, int(config["server-round"]) - 1
    adapter, loss = client.train(
        message.content["arrays"].to_torch_state_dict(), workload.batches(round_index, partition)
    )
    metrics = MetricRecord(
        {"num-examples": workload.settings["num_samples"][partition], "loss": loss, "client": partition}
    )
    return Message(RecordDict({"arrays": ArrayRecord(adapter), "metrics": metrics}), reply_to=message)


def main(folder: Path, result: Path) -> None:
    """All rounds."""
    report, workload = Report(result), Workload(folder)
    server_client, users = Client(workload), workload.users("val")
    versions: list[Any] = []
    server_app = ServerApp()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        versions.append(arrays.to_torch_state_dict())
        report.ndcg.append(server_client.ndcg(versions[-1], users))
        return MetricRecord({"ndcg": report.ndcg[-1]})

    def keep_losses(replies: list[RecordDict], _: str) -> MetricRecord:
        by_client = {int(reply["metrics"]["client"]): float(reply["metrics"]["loss"]) for reply in replies}
        report.losses.append([by_client[client] for client in sorted(by_client)])
        return MetricRecord({"loss": sum(report.losses[-1]) / len(by_client)})

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        clients = workload.settings["clients"]
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
            train_metrics_aggr_fn=keep_losses,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(workload.initial),
            num_rounds=workload.settings["rounds"],
            train_config=ConfigRecord({"folder": str(folder.resolve())}),
            evaluate_fn=evaluate,
        )
        best = max(range(len(versions)), key=report.ndcg.__getitem__)
        report.ndcg.append(server_client.ndcg(versions[best], workload.users("test")))

    cpus = len(os.sched_getaffinity(0))
    backend = {"init_args": {"num_cpus": cpus}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, workload.settings["clients"], backend_config=backend)
    report.write()


if __name__ == "__main__":
    # Ray's workers find the functions of this module by its name, which is not __main__.
    importlib.import_module("bench.flower").main(Path(sys.argv[1]), Path(sys.argv[2]))
