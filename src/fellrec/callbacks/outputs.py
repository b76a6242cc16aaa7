"""Writes the results of a run into its directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fellrec.callbacks.costs import CostMeter
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.ledger import Ledger
from fellrec.federated.records import FitResult
from fellrec.state.files import link_files
from fellrec.state.tensor_store import StoredTensors

SaveAdapter = Callable[[Mapping[str, Tensor], tuple[StoredTensors, ...], Path], None]
"""Writes one adapter of the whole model into a folder, given the changes of the base that it belongs to."""


class RunOutputs(FederatedCallback):
    """Writes ``results.json``, what there is of single users, ``ledger.csv`` and the selected ``adapters/``.

    Clients with one version of the adapter have links to the same files, which are written once.

    Args:
        run_dir: The run's directory.
        ledger: Of the run.
        write_results: Writes the test's figures and users, given the result and further figures.
        save_adapter: Writes one adapter.
        costs: Meter of the run, earlier in the list.
    """

    def __init__(
        self,
        run_dir: Path,
        ledger: Ledger,
        write_results: Callable[[FitResult, Mapping[str, Any]], None],
        save_adapter: SaveAdapter,
        costs: CostMeter | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.ledger = ledger
        self.costs = costs
        self._write_results = write_results
        self._save_adapter = save_adapter

    def on_fit_end(self, result: FitResult) -> None:
        """Write everything."""
        cost = {} if self.costs is None or self.costs.cost is None else {"cost": self.costs.cost.to_dict()}
        failed = {"dropped_clients": result.failed_clients} if result.failed_clients else {}
        self._write_results(result, cost | failed)
        self.ledger.frame().to_csv(self.run_dir / "ledger.csv", index=False)
        clients = ["shared"] if result.is_shared else [f"client_{client:02d}" for client in range(len(result.served))]
        written: dict[tuple[int, ...], Path] = {}
        for name, stored, base in zip(clients, result.served, result.bases):
            folder, version = self.run_dir / "adapters" / name, tuple(map(id, (stored, *base)))
            if version in written:
                link_files(written[version], folder)
                continue
            tensors = stored.tensors()
            self._save_adapter({key: tensors[key] for key in sorted(tensors)}, base, folder)
            written[version] = folder
