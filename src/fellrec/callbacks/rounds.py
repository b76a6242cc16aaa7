"""What every client did in every round, as one table: from it, it can be read why a client is served badly."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fellrec.callbacks.diagnostics import effective_senders
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import Aggregated, FitResult, FitStart, RoundRecord
from fellrec.federated.settings import METRICS
from fellrec.state.files import write_atomically, writing
from fellrec.tracking.run_log import RunLog
from fellrec.types import Evaluation

FILE = "rounds.csv"
_OF_TRAINING = ("loss", "steps", "seconds", "train_targets")
_OF_RULE = ("own_weight", "effective_senders")


class RoundTable(FederatedCallback):
    """Writes ``rounds.csv``: one row for each client and round, -1 for the start, complete after every round.

    Columns: ``round``, ``client``, ``is_personal`` (1 for a client's second, personal model); ``loss``, ``steps`` and
    ``seconds`` of its local training, ``train_targets``; ``own_weight``, what the client's next adapter has of its own:
    the diagonal of the mixing matrix, or the weight of its update in a rule with one model; ``effective_senders``, see
    ``Diagnostics``; validation metrics at the cutoff of the selection metric, such as ``val_ndcg_at_10``. A cell is
    empty where a client did not train, or a round was not evaluated; so is ``client`` for pooled data.

    Args:
        log: Of the run; the file is written to its directory, and uploaded when the run is over.
        metric: The selection metric.
    """

    def __init__(self, log: RunLog, metric: str) -> None:
        self.log = log
        self.path = log.run_dir / FILE
        cutoff = metric.rpartition("_")[2]
        self.metrics = [f"{name}_at_{cutoff}" for name in METRICS]
        self._columns = [
            "round",
            "client",
            "is_personal",
            *_OF_TRAINING,
            *_OF_RULE,
            *(f"val_{m}" for m in self.metrics),
        ]
        self._has_start = False

    def on_fit_start(self, fit: FitStart) -> None:
        """Begin the file, or remove from it what a resumed run will write again."""
        lines = _complete_lines(self.path)
        kept = [line for line in lines[1:] if int(line.partition(",")[0]) < fit.round_index]
        self._has_start = any(line.startswith("-1,") for line in kept)
        write_atomically(self.path, "".join([f"{','.join(self._columns)}\n", *kept]).encode())

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Write the start; other evaluations are part of a round."""
        if evaluation.stage == "val" and evaluation.round_index < 0 and not self._has_start:
            self._has_start = True
            values = self._validated(evaluation)
            self._append([{"round": -1, "client": client, "is_personal": 0, **row} for client, row in values.items()])

    def on_round_end(self, record: RoundRecord) -> None:
        """Write the round."""
        validated, rule = self._validated(record.evaluation), _of_rule(record.aggregated, record.clients)
        rows: list[dict[str, Any]] = []
        for trained in record.trained:
            client = trained.job.data_of  # None: the pooled data of all
            is_personal = client not in (None, trained.row)
            figures = (trained.loss, trained.num_steps, round(trained.seconds, 3), trained.num_samples)
            row = {"client": client, "is_personal": int(is_personal), **dict(zip(_OF_TRAINING, figures, strict=True))}
            if not is_personal:
                row |= rule.get(trained.row, {})
                row |= {} if client is None else validated.pop(client, {})
            rows.append(row)
        rows += [{"client": client, "is_personal": 0, **values} for client, values in validated.items()]
        self._append([{"round": record.round_index, **row} for row in rows])

    def on_fit_end(self, result: FitResult) -> None:
        """Upload the file."""
        self.log.log_artifact(self.path)

    def _validated(self, evaluation: Evaluation | None) -> dict[int, dict[str, float]]:
        """Client → columns of its validation metrics."""
        if evaluation is None:
            return {}
        columns = {f"val_{name}": evaluation.per_client[name].tolist() for name in self.metrics}
        return {client: dict(zip(columns, row)) for client, row in enumerate(zip(*columns.values(), strict=True))}

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())


def _of_rule(aggregated: Aggregated, clients: Sequence[int]) -> dict[int, dict[str, float]]:
    """Row of the population → its weight of its own, and its effective senders, as far as the rule tells."""
    own, senders = own_weights(aggregated), effective_senders(aggregated)
    found: dict[int, dict[str, float]] = {row: {} for row in clients}
    for name, values in zip(_OF_RULE, (own, senders), strict=True):
        for row, value in () if values is None else zip(clients, values.expand(len(clients)).tolist(), strict=True):
            found[row][name] = value
    return found


def own_weights(aggregated: Aggregated) -> Tensor | None:
    """How much of each client's next adapter is its own, ``[N]``; ``None`` if the rule does not tell."""
    matrix = aggregated.matrices.get("mixing")
    return aggregated.per_client.get("update_weight") if matrix is None else matrix.diagonal()


def _complete_lines(path: Path) -> list[str]:
    """The complete lines of a file; empty if the file does not exist."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
