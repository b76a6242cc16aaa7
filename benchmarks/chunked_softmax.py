"""Memory and time of one training step by size of the catalogue: all items at once, in chunks, sampled.

    python benchmarks/chunked_softmax.py [--items 5000,20000,80000] [--rows 64]

A tiny backbone (2 layers, hidden size 64) trains on random histories of ten items from a catalogue with generated
titles, with `objective=retrieval`: ROWS rows with ten targets each, on one thread. Each case runs in its own process,
which takes a warm-up step (loss, gradients, AdamW) and a measured step: its seconds, and the maximum resident memory
above that before it. The cost of the backbone does not depend on the catalogue; the item vectors, [I, D], grow with
it unless items are sampled.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fellrec.data.readers import SyntheticReader
from fellrec.data.schema import Catalogue
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.settings import RetrievalSettings, TinySettings
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny

CASES: dict[str, dict[str, Any]] = {
    "all items": {},
    "chunk_items=2048": {"chunk_items": 2048},
    "num_negatives=2048": {"num_negatives": 2048},
    "num_negatives=2048, two towers": {"num_negatives": 2048, "item_encoder": "encoded"},
}
HISTORY = 10


@dataclass(frozen=True)
class Cost:
    """Cost of one step.

    Attributes:
        seconds: Wall-clock time.
        peak_bytes: Maximum resident memory above that before the step.
    """

    seconds: float
    peak_bytes: int


def main() -> None:
    options = _options()
    print("| items | " + " | ".join(f"{case}: MB | s" for case in CASES) + " |")
    print("|---|" + "---|---|" * len(CASES))
    for num_items in map(int, options.items.split(",")):
        found = compare(num_items, options.rows)
        cells = " | ".join(f"{cost.peak_bytes / 1e6:,.0f} | {cost.seconds:.2f}" for cost in found.values())
        print(f"| {num_items:,} | {cells} |", flush=True)


def compare(num_items: int, num_rows: int) -> dict[str, Cost]:
    """Measure every case with a catalogue of this size."""
    titles = SyntheticReader("micro_lens_shaped", num_users=1000, num_items=num_items).read().items["title"].tolist()
    catalogue = Catalogue(tuple(map(str, range(num_items))), tuple(titles), pd.DataFrame(index=range(num_items)))
    backbone = build_tiny(titles[:2000], TinySettings(hidden_size=64, num_layers=2, vocab_size=500))
    model = SplitModel(backbone.model, 1, 1)
    items = torch.randint(num_items, (num_rows, HISTORY + 1), generator=torch.Generator().manual_seed(0))
    is_target = torch.ones_like(items, dtype=torch.bool)
    is_target[:, 0] = False
    costs = {}
    for case, settings in CASES.items():
        objective = RetrievalObjective(
            backbone.tokenizer, catalogue, HISTORY, RetrievalSettings(max_title_tokens=8, **settings)
        )
        batch = objective.collate(items, is_target)
        costs[case] = _in_its_own_process(lambda: measure(objective, model, batch))  # noqa: B023 - called at once
    return costs


def measure(objective: RetrievalObjective, model: SplitModel, batch: dict[str, torch.Tensor]) -> Cost:
    """Take a warm-up step and a measured step, in a process of its own."""
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.model.parameters())

    def step() -> None:
        total, count = objective.loss(model, batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the maximum resident memory
    before, started = _resident_bytes("VmRSS"), time.perf_counter()
    step()
    return Cost(time.perf_counter() - started, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _in_its_own_process(work: Callable[[], Cost]) -> Cost:
    """Run in a forked process, which has the model and the texts, and no memory of earlier measurements."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def send(connection: Connection) -> None:
        connection.send(work())

    process = context.Process(target=send, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="5000,20000,80000")
    parser.add_argument("--rows", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
