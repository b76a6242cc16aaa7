"""The matrices of an aggregation over the whole run: one file of numbers and one figure."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult, FitStart, RoundRecord
from fellrec.functional.ranges import Allowed, Natural, whole
from fellrec.tracking.run_log import RunLog

Rounds = Annotated[
    Sequence[int],
    Allowed(
        lambda value: isinstance(value, (list, tuple)) and all(map(whole(0).accepts, value)),
        "a list of rounds, from 0, such as [0,9]",
    ),
]
FILE = "matrices.npz"
FIGURE = "matrices.png"


class Matrices(FederatedCallback):
    """Keeps mixing and similarity matrices of every round, and uploads them once, when the run is over.

    ``matrices.npz`` has ``rounds`` ``[R]``, ``clients`` ``[R, N]`` (-1 where a cohort has fewer), and every matrix by
    its name, ``[R, N, N]`` with NaN where a cohort has fewer or a round has none; rows are receivers, columns senders.
    ``matrices.png`` shows the first, the middle and the last round on one scale.

    Args:
        log: Of the run; the files are written to its directory.
        heat_maps: Rounds, from 0, of which each matrix gets a figure of its own.
        max_logged_clients: In a larger population no matrix is kept.
    """

    def __init__(self, log: RunLog, heat_maps: Rounds = (), max_logged_clients: Natural = 100) -> None:
        self.log = log
        self.run_dir = log.run_dir
        self.heat_maps = list(heat_maps)
        self.max_logged_clients = max_logged_clients
        self._is_on = True

    @property
    def folder(self) -> Path:
        """The files of single rounds, until the run is over."""
        return self.run_dir / "matrices"

    def on_fit_start(self, fit: FitStart) -> None:
        """Count the clients, and remove what a resumed run will write again."""
        self._is_on = fit.num_clients <= self.max_logged_clients
        for path in self.folder.glob("*.npz"):
            if int(path.stem) >= fit.round_index:
                path.unlink()

    def on_round_end(self, record: RoundRecord) -> None:
        """Keep the round's matrices, and draw them if that was asked for."""
        found: dict[str, Any] = {name: matrix.double().numpy() for name, matrix in record.aggregated.matrices.items()}
        if not found or not self._is_on:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{record.round_index:05d}.npz"
        np.savez_compressed(path, clients=np.array(record.clients), **found)
        if record.round_index in self.heat_maps:
            self._draw(record.round_index, record.clients, found)

    def on_fit_end(self, result: FitResult) -> None:
        """Write and upload one file of numbers and one figure."""
        paths = sorted(self.folder.glob("*.npz")) if self.folder.is_dir() else []
        if not paths:
            return
        from fellrec.report.plots import matrices_over_rounds, save_png

        found: dict[str, Any] = stacked({int(path.stem): dict(np.load(path)) for path in paths})
        np.savez_compressed(self.run_dir / FILE, **found)
        save_png(matrices_over_rounds(found), self.run_dir / FIGURE)
        for name in (FILE, FIGURE):
            self.log.log_artifact(self.run_dir / name)
        shutil.rmtree(self.folder)

    def _draw(self, round_index: int, clients: Sequence[int], found: dict[str, NDArray[np.float64]]) -> None:
        from fellrec.report.plots import heat_map, save_png

        folder = self.run_dir / "heat_maps"
        folder.mkdir(exist_ok=True)
        for name, matrix in found.items():
            path = folder / f"{name}_{round_index:05d}.png"
            save_png(heat_map(matrix.tolist(), clients, f"{name}, round {round_index}", name == "mixing"), path)
            self.log.log_artifact(path, "heat_maps")


def stacked(rounds: dict[int, dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Matrices of all rounds in one array each.

    Args:
        rounds: Round → ``clients`` ``[N]`` and matrices ``[N, N]``; N may differ between rounds.

    Example:
        >>> found = stacked({0: {"clients": np.array([4]), "mixing": np.eye(1)}, 2: {"clients": np.array([1, 4])}})
        >>> found["rounds"].tolist(), found["clients"].tolist(), found["mixing"][0].tolist()
        ([0, 2], [[4, -1], [1, 4]], [[1.0, nan], [nan, nan]])
    """
    size = max(len(found["clients"]) for found in rounds.values())
    names = sorted({name for found in rounds.values() for name in found} - {"clients"})
    clients = np.full((len(rounds), size), -1)
    matrices = {name: np.full((len(rounds), size, size), np.nan) for name in names}
    for place, found in enumerate(rounds.values()):
        count = len(found["clients"])
        clients[place, :count] = found["clients"]
        for name in names:
            if name in found:
                matrices[name][place, :count, :count] = found[name]
    return {"rounds": np.array(list(rounds)), "clients": clients, **matrices}
