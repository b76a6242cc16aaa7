"""What each file of a run and of a comparison is, and ``report.md``, which shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from fellrec.report.comparison import Comparison
from fellrec.report.main_table import table_caption
from fellrec.report.provenance import measured_line
from fellrec.report.significance import significance_caption
from fellrec.report.tables import display_name, markdown
from fellrec.state.files import write_atomically
from fellrec.types import Evaluation

REPORT = "report.md"
OF_RUN: Mapping[str, str] = {
    REPORT: "this page",
    "command.txt": "the commands that started and resumed the run",
    "config.yaml": "every setting, resolved",
    "versions.json": "versions of packages and prompts, commit of fellrec, number of threads",
    "data.json": "fingerprint and counts of the data",
    "backbone.json": "fingerprint of the backbone",
    "partition.parquet": "the client of each user",
    "rounds.csv": "what each client did in each round: loss, steps, seconds, targets, own weight, validation metrics",
    "evaluations.csv": "every metric, cutoff and statistic of every evaluation",
    "evaluations.json": "the same for MLflow",
    "results.json": "metrics of the tested adapters over all clients and by client; costs",
    "clients.csv": "tested metrics, a row for each client",
    "clients.json": "the same for MLflow",
    "client_costs.csv": "what each client costs: bytes, seconds, rank",
    "user_groups.csv": "tested metrics of groups of users at each client",
    "users.parquet": "tested metrics, a row for each user",
    "rankings.parquet": "the first items of each user's ranking",
    "targets.parquet": "the held-out items of each user",
    "ledger.csv": "bytes by client, round, phase, direction and kind",
    "matrices.npz": "mixing and similarity matrices of all rounds, stacked",
    "matrices.png": "the first, the middle and the last of them",
    "heat_maps": "figures of single rounds",
    "adapters": "the tested adapters",
    "model": "an MLflow model with every client's adapter",
    "checkpoints": "what a resume needs",
    "outbox": "operations of MLflow, also those that were sent",
    "finished.json": "seconds, memory and the selected round; written last",
}
"""Files and folders of a run's directory → what they are."""
OF_COMPARISON: Mapping[str, str] = {
    REPORT: "this page",
    "comparison.csv": "the main table as numbers, a row for each rule",
    "comparison.md": "the main table as text",
    "comparison.json": "everything: metrics of every run, client and seed",
    "significance.csv": "paired differences, intervals and tests as numbers",
    "significance.md": "the same as text",
    "reachable.csv": "each client's share of what centralised or local training reaches",
    "reachable.md": "means of the shares",
    "cost.csv": "storage, traffic and time of each variant",
    "cost.md": "the same as text",
    "clients.png": "a dot for each client and rule",
    "frontier.png": "mean against spread",
    "cost.png": "quality and cost by variant",
}
"""Files of a comparison's ``comparison`` folder → what they are."""


def write_run_report(run_dir: Path, title: str, evaluation: Evaluation, lines: Sequence[str]) -> None:
    """Write ``report.md`` of a finished run: what it was, each client's metrics, the matrices, the files.

    Args:
        run_dir: Of the run.
        title: Of the page.
        evaluation: Of the test.
        lines: About the run, such as its data and its selected round.

    Raises:
        StorageError: If it cannot be written.
    """
    shown = [name for name in evaluation.per_client if name.endswith("_at_10")] or list(evaluation.per_client)[:4]
    users = [int((evaluation.client_of_user == client).sum()) for client in range(len(evaluation.per_client[shown[0]]))]
    names = [f"{client}{' (poisoned)' * (client in evaluation.poisoned)}" for client in range(len(users))]
    table = pd.DataFrame({"client": names, "users": map(str, users)})
    for name in shown:
        table[name] = [f"{value:.4f}" for value in evaluation.per_client[name].tolist()]
    figures = {"mean over clients": "mean", "pooled over users": "pooled", "std over clients": "std"}
    summary = pd.DataFrame(
        {"": list(figures)} | {m: [f"{evaluation.summary[f'{m}/{f}']:.4f}" for f in figures.values()] for m in shown}
    )
    sections = [
        "\n".join(f"- {line}" for line in lines),
        f"## {evaluation.stage.capitalize()}\n\n{markdown(summary)}",
        f"## Clients\n\n{markdown(table)}",
        *_pictures(run_dir, {"matrices.png": "Mixing and similarity matrices"}),
        _files(run_dir, OF_RUN),
    ]
    _write(run_dir, title, sections)


def write_comparison_report(comparison: Comparison, folder: Path, title: str, cutoff: int) -> None:
    """Write ``report.md`` of a comparison from the tables and figures that are in its folder.

    Args:
        comparison: Results.
        folder: ``comparison``, with everything else written.
        title: Of the page.
        cutoff: K of the tables.

    Raises:
        StorageError: If it cannot be written.
    """
    captions = {"comparison.md": table_caption(comparison, cutoff)}
    if comparison.differences:
        captions["significance.md"] = significance_caption(comparison)
    titles = {
        "comparison.md": "Results",
        "significance.md": f"Differences to {display_name(comparison.reference_rule)}",
        "reachable.md": "Share of what a client could reach",
        "cost.md": "Cost",
    }
    tables = [
        f"## {heading}\n\n{_table(folder / name)}\n{captions.get(name, '')}"
        for name, heading in titles.items()
        if (folder / name).is_file()
    ]
    pictures = {"clients.png": "Clients", "frontier.png": "Mean against spread", "cost.png": "Cost"}
    measured = measured_line(comparison.measured_with) if comparison.measured_with else ""
    sections = [*tables, *_pictures(folder, pictures), _files(folder, OF_COMPARISON), measured.strip()]
    _write(folder, title, sections)


def _table(path: Path) -> str:
    """The table of a Markdown file, without the lines below it."""
    return "".join(f"{line}\n" for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|"))


def _pictures(folder: Path, titles: Mapping[str, str]) -> list[str]:
    return [f"## {title}\n\n![{title}]({name})" for name, title in titles.items() if (folder / name).is_file()]


def _files(folder: Path, known: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | {what} |" for name, what in known.items() if name == REPORT or (folder / name).exists()]
    return "\n".join(["## Files", "", "| file | content |", "|---|---|", *rows])


def _write(folder: Path, title: str, sections: Sequence[str]) -> None:
    text = "\n\n".join([f"# {title}", *(section.strip() for section in sections if section.strip())])
    write_atomically(folder / REPORT, f"{text}\n".encode())
