"""``fellrec report``: one page, figures and tables for a paper, from finished runs."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.cli.arguments import check_empty

if TYPE_CHECKING:
    from fellrec.report.comparison import RuleResult
    from fellrec.report.runs import StoredRun

PURPOSE = "one HTML page, PDF figures, CSV and LaTeX tables from finished runs"
EXAMPLES = (
    "fellrec report runs/COMPARISON",
    "fellrec report runs/RUN_A runs/RUN_B --output paper",
    "fellrec report 0123456789abcdef0123456789abcdef tracking.uri=http://server:5000",
    "fellrec report \"tags.data = 'ml_1m' and params.seed = '0'\" --output paper",
)

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_EXPRESSION = re.compile(r"[=<>]|\s(like|ilike|in)\s", re.IGNORECASE)
_SETTINGS = ("tracking.uri=", "tracking.experiment=")
_MISSING = (
    "give the directory of a finished run, of a comparison or of a sweep, the id of an MLflow run (32 hexadecimal "
    "digits), or a search expression such as \"tags.rule = 'fedavg'\""
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN",
        help="directory of a run, a comparison or a sweep; id of an MLflow run, of a comparison too; or an MLflow "
        "search expression; tracking.uri=… and tracking.experiment=… say where MLflow's runs are",
    )
    parser.add_argument("--output", metavar="PATH", help="new directory (default: RUN/report, or fellrec-report)")
    parser.add_argument(
        "--cutoff", type=int, metavar="K", help="K of NDCG@K and Recall@K (default: 10, else the first)"
    )


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb.

    Raises:
        ConfigError: If a run does not exist, is not finished, or cannot be compared with the others.
    """
    words = [word for word in options.overrides if not word.startswith(_SETTINGS)]
    settings = [word for word in options.overrides if word.startswith(_SETTINGS)]
    folder = Path(options.output) if options.output else _default(words)
    check_empty(folder)
    with ExitStack() as stack:
        runs, references = _read(words, settings, stack)
        files = _write(runs, references, options.cutoff, folder)
    sys.stdout.write("".join(f"{path}\n" for path in files))


def _default(words: Sequence[str]) -> Path:
    is_one = len(words) == 1 and Path(words[0]).is_dir()
    return Path(words[0]) / "report" if is_one else Path("fellrec-report")


def _read(words: Sequence[str], settings: Sequence[str], stack: ExitStack) -> tuple[list[StoredRun], list[RuleResult]]:
    """The runs that the words name, each once, and the reference rankers of their comparisons.

    Words are checked before anything heavy is imported.
    """
    from fellrec.errors import ConfigError
    from fellrec.report.folders import run_folders
    from fellrec.state.nearest import similar

    if not words:
        raise ConfigError(f"no run is given: {_MISSING}")
    folders: dict[Path, str] = {}
    comparisons: list[Path] = []
    remote: list[str] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            folders |= {found.resolve(): str(found) for found in run_folders(path)}
            comparisons.append(path / "comparison")
        elif _RUN_ID.fullmatch(word) or _EXPRESSION.search(word):
            remote.append(word)
        else:
            raise ConfigError(f"{word} does not exist{similar(path)}; {_MISSING}")
    if remote:
        from fellrec.tracking.finished import download

        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fellrec-report-")))
        loaded = download(remote, *_store(settings), place)
        folders |= loaded.runs
        comparisons += loaded.comparisons
    return _results(folders, comparisons)


def _results(folders: Mapping[Path, str], comparisons: Sequence[Path]) -> tuple[list[StoredRun], list[RuleResult]]:
    from fellrec.report.runs import read_references, read_run

    runs = [read_run(folder, name) for folder, name in folders.items()]
    references = {
        (result.rule, result.seed): result
        for comparison in comparisons
        for result in read_references(comparison / "comparison.json")
    }
    return runs, list(references.values())


def _store(settings: Sequence[str]) -> tuple[str, str]:
    """Address and experiment of the MLflow store.

    Raises:
        ConfigError: If there is none.
    """
    from fellrec.config.compose import compose
    from fellrec.errors import ConfigError

    tracking = compose(settings).tracking
    if tracking.uri is None:
        raise ConfigError("tracking.uri=null: runs can be given by id or search expression only with a store")
    return str(tracking.uri), str(tracking.experiment)


def _write(runs: Sequence[StoredRun], references: Sequence[RuleResult], cutoff: int | None, folder: Path) -> list[Path]:
    from fellrec.report.page import write_report
    from fellrec.report.runs import check_comparable, comparison_of, cutoff_of, labelled
    from fellrec.report.significance import with_significance

    check_comparable(runs)
    labels = labelled(runs)
    shown = cutoff_of(labels, cutoff)
    return write_report(labels, with_significance(comparison_of(labels, references), shown), shown, folder)
