"""What random projections of updates keep, and what they give away: ``similarity=sketch`` of FELLRec.

python benchmarks/sketches.py DATA_ROOT [--clients 12] [--sizes 64,1024,16384] [OVERRIDES…]

Trains the first round of SASRec on some one-user clients of MovieLens-1M. For each size: the error of the similarity
matrix, and what a server that knows the projection finds of one update by least squares. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fellrec.config.compose import compose
from fellrec.data.prepared import PreparedData
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_federation
from fellrec.experiment.versions import versions
from fellrec.federated.records import Trained
from fellrec.functional.mixing import gram_matrix, similarity
from fellrec.functional.sketch import places, sketch_updates
from fellrec.report.provenance import Provenance, measured_line
from fellrec.report.tables import markdown

SETTINGS = (
    "backbone=sasrec", "backbone.hidden_size=32", "data=ml_1m", "data.max_users=200", "data.max_history=50",
    "partition=per_user", "aggregation=fellrec", "trainer.batch_size=32", "trainer.learning_rate=3e-3",
    "references.show=[]",
)  # fmt: skip


def updates_of(overrides: list[str], num_clients: int) -> tuple[dict[str, Tensor], PreparedData]:
    """Updates of the first clients after one round, name → ``[N, *shape]``, and the data."""
    config = compose([*SETTINGS, *overrides])
    data = build_data(config)
    loop = build_federation(config, build_recommender(config, data)).loop()
    jobs = [loop.population.job(row, 0) for row in range(num_clients)]
    trained = [one for one in loop.executor.train(jobs, loop.events) if isinstance(one, Trained)]
    start = loop.population.initial.tensors()
    return {name: torch.stack([one.adapter.tensors()[name] - start[name] for one in trained]) for name in start}, data


def least_squares(stack: dict[str, Tensor], sketch: Tensor, name: str) -> Tensor:
    """The shortest updates with the same sketches, one parameter of them, ``[N, *shape]``.

    An entry is the sum of its bucket with its sign, divided by the number of entries in the bucket.
    """
    size = sketch.shape[1]
    found = {key: places(key, slice(0, part[0].numel()), size) for key, part in stack.items()}
    counts = torch.cat([bucket for bucket, _ in found.values()]).bincount(minlength=size)
    bucket, sign = found[name]
    return (sketch[:, bucket] * sign / counts[bucket]).reshape(stack[name].shape)


def recovery(rows: Tensor, data: PreparedData, clients: int) -> tuple[float, float]:
    """How well the rows of the item table tell the items of a client's training data from all others.

    Rows of items that a client does not have move alike, away from its histories: what is looked at is the distance of
    a row from the mean row.

    Args:
        rows: ``[N, I, D]`` updates of the item table.
        data: The data.
        clients: N.

    Returns:
        Mean AUC, and the mean fraction of a client's items among as many rows that are farthest from the mean.
    """
    areas, hits = [], []
    for client in range(clients):
        own = data.train.take(np.flatnonzero(data.client_of_user == client)).values
        is_own = np.zeros(rows.shape[1], dtype=bool)
        is_own[own] = True
        own_rows = rows[client].double()
        distances = (own_rows - own_rows.mean(dim=0)).norm(dim=1).numpy()
        areas.append(roc_auc_score(is_own, distances))
        first = np.argsort(-distances, kind="stable")[: int(is_own.sum())]
        hits.append(is_own[first].mean())
    return float(np.mean(areas)), float(np.mean(hits))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--sizes", default="64,1024,4096,16384,65536,262144")
    given, overrides = parser.parse_known_args(arguments)
    stack, data = updates_of([f"data.root={given.root}", *overrides], given.clients)
    zeros = {name: torch.zeros_like(part) for name, part in stack.items()}
    exact = similarity(gram_matrix(stack))
    num_items = len(data.catalogue)
    table = next(name for name, part in stack.items() if part.shape[1] == num_items + 1)  # row 0 is padding
    pairs = torch.triu(torch.ones_like(exact), diagonal=1).bool()
    rows = []
    for size in (*map(int, given.sizes.split(",")), None):
        if size is None:
            error, found = torch.zeros(1), stack[table].double()
        else:
            sketch = sketch_updates(stack, zeros, size)
            error, found = (similarity(sketch @ sketch.T) - exact)[pairs], least_squares(stack, sketch, table)
        area, hits = recovery(found[:, 1 : num_items + 1], data, given.clients)
        left = (found - stack[table]).norm(dim=(1, 2)) / stack[table].double().norm(dim=(1, 2))
        rows.append(
            {
                "size": "the update" if size is None else f"{size:,}",
                "bound of the error": "" if size is None else f"{(2 / size) ** 0.5 / 2:.4f}",
                "error of the similarity, RMS": f"{float(error.square().mean().sqrt()):.4f}",
                "largest": f"{float(error.abs().max()):.4f}",
                "update that is left": f"{float(left.mean()):.0%}",
                "AUC of a client's items": f"{area:.2f}",
                "items found": f"{hits:.0%}",
            }
        )
    num_entries = sum(part[0].numel() for part in stack.values())
    sys.stdout.write(
        f"{given.clients} clients of one user, {num_entries:,} entries of an update, similarities "
        f"{float(exact[pairs].min()):.3f} to {float(exact[pairs].max()):.3f}\n\n"
    )
    sys.stdout.write(markdown(pd.DataFrame(rows)) + measured_line(Provenance.of(versions()).text([0])))


if __name__ == "__main__":
    main(sys.argv[1:])
