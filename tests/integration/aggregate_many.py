"""One aggregation over many clients' files; writes what memory it took on top, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from many_clients import Peak

from fellrec.aggregation import FELLRec
from fellrec.distributed.memory import anonymous_bytes
from fellrec.federated.records import Updates
from fellrec.functional import stacks
from fellrec.state.bank import AdapterBank
from fellrec.state.tensor_store import open_store


def main(folder: Path, num_clients: int, block_bytes: int) -> None:
    """FELLRec over ``num_clients`` adapters of 200 kB, each of which has moved another way."""
    torch.set_num_threads(1)
    stacks.BLOCK_BYTES = block_bytes
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(100, 450, generator=generator), "b": torch.randn(5000, generator=generator)}
    bank = AdapterBank.replicate(start, num_clients)
    bank.tensor_store = open_store(folder)
    clients = tuple(range(num_clients))
    before = bank.stack(clients)
    for client in clients:
        moved = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
        bank.store(client, moved)
    updates = Updates(clients, before, bank.stack(clients), torch.linspace(2, 3, num_clients), torch.ones(num_clients))
    torch.eye(8).double() @ torch.eye(8).double()  # loads the library
    at_start, peak = anonymous_bytes(), Peak(0.001)
    updates.check_finite(0)
    aggregated = FELLRec().aggregate(updates, 0)
    bank.replace(clients, aggregated.adapters)
    taken = peak.num_bytes - at_start
    some = [0, num_clients // 2, num_clients - 1]
    expected = {
        name: aggregated.matrices["mixing"] @ tensor.flatten(1).double() for name, tensor in updates.end.items()
    }
    worst = max(
        float((bank.row(client)[name].flatten() - expected[name][client]).abs().max())
        for client in some
        for name in expected
    )
    sys.stdout.write(json.dumps({"taken": taken, "adapter_bytes": bank.adapter_bytes, "worst": worst}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
