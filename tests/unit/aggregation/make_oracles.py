"""Results of other libraries on a few updates, for ``test_oracles.py``; writes ``oracles.json`` beside this file.

The libraries cannot be installed beside this package: flwr 1.42 needs protobuf < 7 and rich < 15; byzfl 0.0.11 needs
torchvision, which with another build of torch than its own breaks the import of transformers; fluke-fl 0.8.1 needs 35
further packages, among them wandb, clearml, opacus and tensorboard. In an environment of their own:

    pip install flwr==1.42.0 byzfl==0.0.11 fluke-fl==0.8.1
    python tests/unit/aggregation/make_oracles.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

NUM_CLIENTS, NUM_ROUNDS, SIZE, BYZANTINE = 11, 3, 6, 2
PATH = Path(__file__).with_name("oracles.json")


def inputs() -> dict[str, Any]:
    """A start, the clients' updates of three rounds, their samples and their losses."""
    random = np.random.default_rng(17)
    updates = random.normal(0.3, 1.0, (NUM_ROUNDS, NUM_CLIENTS, SIZE)).round(3)
    updates[:, -1] *= 20  # one client is far away
    return {
        "start": random.normal(size=SIZE).round(3).tolist(),
        "updates": updates.tolist(),
        "samples": random.integers(1, 50, NUM_CLIENTS).tolist(),
        "losses": random.uniform(0.2, 3.0, NUM_CLIENTS).round(3).tolist(),
        "steps": random.integers(1, 9, NUM_CLIENTS).tolist(),
    }


def of_flower(given: dict[str, Any]) -> dict[str, Any]:
    """Flower's strategies: models after each round for those with state, otherwise after one round."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, aggregate
    from flwr.serverapp.strategy.qfedavg import compute_delta_and_h

    start, samples = np.array(given["start"]), given["samples"]
    strategies = {
        "fedavgm": FedAvgM(initial_parameters=ndarrays_to_parameters([start]), server_momentum=0.8,
                           server_learning_rate=0.5),
        "fedadagrad": FedAdagrad(initial_parameters=ndarrays_to_parameters([start]), eta=0.1, tau=1e-3),
        "fedadam": FedAdam(initial_parameters=ndarrays_to_parameters([start]), eta=0.1, beta_1=0.9, beta_2=0.99,
                           tau=1e-3),
        "fedyogi": FedYogi(initial_parameters=ndarrays_to_parameters([start]), eta=0.1, beta_1=0.9, beta_2=0.99,
                           tau=1e-3),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, strategy in strategies.items():
        model, found[name] = start, []
        for number, updates in enumerate(np.array(given["updates"]), start=1):
            results = [
                (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([model + update]), num, {}))
                for update, num in zip(updates, samples, strict=True)
            ]
            aggregated, _ = strategy.aggregate_fit(number, results, [])
            (model,) = parameters_to_ndarrays(aggregated)
            found[name].append(model.tolist())

    def sent(num: int | None = None) -> list[Any]:
        return [([start + u], num or n) for u, n in zip(np.array(given["updates"][0]), samples, strict=True)]

    found["fedavg"] = aggregate.aggregate(sent())[0].tolist()
    found["median"] = aggregate.aggregate_median(sent())[0].tolist()
    found["trimmed_mean"] = aggregate.aggregate_trimmed_avg(sent(), (BYZANTINE + 0.5) / NUM_CLIENTS)[0].tolist()
    found["krum"] = aggregate.aggregate_krum(sent(), BYZANTINE, 0)[0].tolist()
    found["multi_krum"] = aggregate.aggregate_krum(sent(1), BYZANTINE, NUM_CLIENTS - BYZANTINE)[0].tolist()
    found["bulyan"] = aggregate.aggregate_bulyan(sent(), BYZANTINE, aggregate.aggregate_krum, to_keep=0)[0].tolist()
    pairs = [
        compute_delta_and_h([start], [start + update], 0.7, 2.0, loss)
        for update, loss in zip(np.array(given["updates"][0]), given["losses"], strict=True)
    ]
    found["qfedavg"] = aggregate.aggregate_qffl([start], *zip(*pairs, strict=True))[0].tolist()
    return found


def of_byzfl(given: dict[str, Any]) -> dict[str, Any]:
    """ByzFL's aggregators of the first round's updates."""
    from byzfl import ARC, NNM, CenteredClipping, Clipping, GeometricMedian, Krum, Median, MultiKrum, TrMean

    updates = np.array(given["updates"][0])
    rules = {
        "median": Median(),
        "trimmed_mean": TrMean(f=BYZANTINE),
        "krum": Krum(f=BYZANTINE + 1),
        "multi_krum": MultiKrum(f=BYZANTINE),
        "geometric_median": GeometricMedian(nu=1e-6, T=1000),
        "centered_clipping": CenteredClipping(L=3, tau=1.5),
        "norm_clipping": lambda vectors: Clipping(c=1.5)(vectors).mean(axis=0),
        "nnm": NNM(f=BYZANTINE),
        "arc": ARC(f=BYZANTINE),
    }
    return {name: rule(updates.copy()).tolist() for name, rule in rules.items()}


def of_fluke(given: dict[str, Any]) -> dict[str, Any]:
    """Fluke's servers of FedNova and FedAMP, called with stand-ins for everything but the aggregation."""
    import torch
    from fluke.algorithms.fedamp import FedAMPServer
    from fluke.algorithms.fednova import FedNovaServer

    updates = torch.tensor(given["updates"][0], dtype=torch.float64)
    models = []
    for update in updates:
        models.append(torch.nn.Linear(SIZE, 1, bias=False).double())
        models[-1].weight.data = update[None].clone()
    zero = torch.nn.Linear(SIZE, 1, bias=False).double()
    zero.weight.data.zero_()
    clients = [SimpleNamespace(index=number) for number in range(NUM_CLIENTS)]
    weights = [num / sum(given["samples"]) for num in given["samples"]]
    channel = SimpleNamespace(
        receive=lambda _, index, kind: SimpleNamespace(payload=given["steps"][index]),
        send=lambda message, index: sent.__setitem__(index, message.payload.weight.data[0].tolist()),
    )
    sent: dict[int, list[float]] = {}
    nova = SimpleNamespace(
        model=zero, channel=channel, hyper_params=SimpleNamespace(lr=1.0), _get_client_weights=lambda _: weights
    )
    FedNovaServer.aggregate(nova, clients, models)
    moved = zero.weight.data[0].tolist()
    given_to_amp = {"model": zero, "channel": channel, "hyper_params": SimpleNamespace(sigma=9.0, alpha=0.5)}
    amp = type("Amp", (FedAMPServer,), given_to_amp)
    amp.__new__(amp).aggregate(clients, models)
    return {"fednova": moved, "fedamp": [sent[number] for number in range(NUM_CLIENTS)]}


def main() -> None:
    """Write the file."""
    given = inputs()
    found = {"flwr": of_flower(given), "byzfl": of_byzfl(given), "fluke-fl": of_fluke(given)}
    versions = {name: version(name) for name in found}
    PATH.write_text(json.dumps({"versions": versions, "inputs": given, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
