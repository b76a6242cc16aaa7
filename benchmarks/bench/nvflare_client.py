"""The script of a client in NVFlare's simulator."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.plain import Adapter, Client, Workload


class AdapterModule(nn.Module):
    """The initial adapter as a module, which NVFlare wants: parameters' names must not have points.

    Args:
        folder: Of the workload.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        for name, tensor in Workload(Path(folder)).initial.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor))


def from_state(state: Mapping[str, Any]) -> Adapter:
    """The adapter of a state of `AdapterModule`."""
    return {name.replace("/", "."): torch.as_tensor(value) for name, value in state.items()}


def main(folder: Path, place: Path) -> None:
    """Validate and train in every round."""
    import nvflare.client as flare

    torch.set_num_threads(1)
    flare.init()
    workload = Workload(folder)
    number = int(flare.get_site_name().removeprefix("site-")) - 1
    client, losses, ndcg = Client(workload), [], []
    users = [_own(batch, number) for batch in workload.users("val")]
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        adapter = from_state(received.params)
        if number == 0:
            torch.save(adapter, place / f"received-{received.current_round}.pt")
        ndcg.append(client.ndcg(adapter, users))
        trained, loss = client.train(adapter, workload.batches(received.current_round, number))
        losses.append(loss)
        (place / f"client-{number}.json").write_text(json.dumps({"losses": losses, "ndcg": ndcg}))
        params = {name.replace(".", "/"): tensor for name, tensor in trained.items()}
        samples = workload.settings["num_samples"][number]
        flare.send(flare.FLModel(params=params, metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": samples}))


def _own(batch: dict[str, Tensor], client: int) -> dict[str, Tensor]:
    """The users of one client in a batch of all."""
    kept = (batch["clients"] == client).nonzero()[:, 0]
    place = torch.full((len(batch["clients"]),), -1)
    place[kept] = torch.arange(len(kept))
    found = {name: batch[name][kept] for name in ("input_ids", "attention_mask", "lengths", "clients")}
    for kind in ("target", "masked"):
        rows = place[batch[f"{kind}_rows"]]
        found |= {f"{kind}_rows": rows[rows >= 0], f"{kind}_items": batch[f"{kind}_items"][rows >= 0]}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
