"""Aggregation of 500 adapters in files against float32 products of the same arithmetic; prints a JSON object.

    python -m bench.aggregation --clients 500 --repeats 3

Ours is FELLRec's rule on adapters of 200 kB, files read and written. The products: all adapters are read into one
float32 matrix X, ``X @ X.T`` stands for the similarities, ``W @ X`` mixes, and each row is written to a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from many_clients import Peak
from safetensors.torch import load_file, save_file

from fellrec.aggregation import FELLRec
from fellrec.distributed.memory import anonymous_bytes
from fellrec.federated.records import Updates
from fellrec.state.bank import AdapterBank
from fellrec.state.tensor_store import open_store


def ours(folder: Path, num_clients: int, weights: torch.Tensor) -> dict[str, Any]:
    """Seconds, memory, and one aggregated adapter with the matrix that made it."""
    bank, start = AdapterBank.replicate(_start(), num_clients), _start()
    bank.tensor_store = open_store(folder)
    clients = tuple(range(num_clients))
    before = bank.stack(clients)
    for client in clients:
        bank.store(client, _moved(start, client))
    updates = Updates(clients, before, bank.stack(clients), weights, torch.ones(num_clients))
    at_start, peak = anonymous_bytes(), Peak(0.001)
    wall, cpu = time.perf_counter(), time.process_time()
    updates.check_finite(0)
    aggregated = FELLRec().aggregate(updates, 0)
    bank.replace(clients, aggregated.adapters)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    taken = peak.num_bytes - at_start
    mixing = torch.as_tensor(aggregated.matrices["mixing"]).double()
    return {"wall": wall, "cpu": cpu, "taken": taken, "mixing": mixing, "adapter": bank.row(num_clients // 2)}


def products(folder: Path, num_clients: int, mixing: torch.Tensor) -> dict[str, Any]:
    """The same for the products."""
    start = _start()
    for client in range(num_clients):
        save_file(_moved(start, client), folder / f"{client}.safetensors")
    weights = mixing.float()
    at_start, peak = anonymous_bytes(), Peak(0.001)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = [load_file(folder / f"{client}.safetensors") for client in range(num_clients)]
    matrix = torch.stack([torch.cat([row[name].flatten() for name in start]) for row in rows])
    matrix @ matrix.T
    mixed = weights @ matrix
    sizes = [tensor.numel() for tensor in start.values()]
    for client in range(num_clients):
        parts = mixed[client].split(sizes)
        adapter = {name: part.view(start[name].shape) for name, part in zip(start, parts, strict=True)}
        save_file(adapter, folder / f"{client}.new.safetensors")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    new = load_file(folder / f"{num_clients // 2}.new.safetensors")
    return {"wall": wall, "cpu": cpu, "taken": peak.num_bytes - at_start, "adapter": new}


def _start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(100, 450, generator=generator), "b": torch.randn(5000, generator=generator)}


def _moved(start: dict[str, torch.Tensor], client: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + client)
    return {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.eye(8).double() @ torch.eye(8).double()  # loads the library
    found: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": [], "taken": []} for name in ("ours", "rival")
    }
    difference = 0.0
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as place:
            mine = ours(Path(place) / "ours", options.clients, torch.linspace(2, 3, options.clients))
            (Path(place) / "products").mkdir()
            theirs = products(Path(place) / "products", options.clients, mine["mixing"])
        for name, one in (("ours", mine), ("rival", theirs)):
            for key, values in found[name].items():
                values.append(one[key])
        pairs = [(mine["adapter"][name], tensor) for name, tensor in theirs["adapter"].items()]
        difference = max(difference, *(float((a - b).abs().max()) for a, b in pairs))
    sys.stdout.write(json.dumps({**found, "difference": difference}) + "\n")


if __name__ == "__main__":
    main()
