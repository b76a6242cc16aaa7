"""What results were measured with: the line that every table of results has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_UNKNOWN = "unknown"
_COMMIT_CHARACTERS = 7
THEN = " then "
"""Between two values, of which the second replaced the first: a run was resumed with another number of threads."""


@dataclass(frozen=True)
class Provenance:
    """What results were measured with, beside their settings.

    Each value may be two, ``"4 then 1"``: of the training up to a stop, or of the whole training, and of what followed.

    Attributes:
        fellrec: Its version.
        git_commit: Of fellrec; ``"unknown"`` for a release.
        num_threads: Of each process.
    """

    fellrec: str
    git_commit: str
    num_threads: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Provenance:
        """From `to_dict`, or the content of ``versions.json``."""
        return cls(*(str(values.get(name, _UNKNOWN)) for name in ("fellrec", "git_commit", "num_threads")))

    def to_dict(self) -> dict[str, str]:
        """JSON-ready values."""
        return asdict(self)

    def text(self, seeds: Iterable[int]) -> str:
        """Commit, number of threads and seeds.

        Example:
            >>> Provenance("0.3.0", "731ba16f" * 5, "1").text([0, 1])
            'commit 731ba16, 1 thread, seeds 0, 1'
            >>> Provenance("0.3.0", "unknown", "4 then 2").text([0])
            'fellrec 0.3.0, commit unknown, 4 then 2 threads, seed 0'
        """
        threads = f"{self.num_threads} thread{'' if self.num_threads == '1' else 's'}"
        commit = THEN.join(_short(item) for item in self.git_commit.split(THEN))
        seeds = list(dict.fromkeys(seeds))
        return ", ".join(
            [
                *([f"fellrec {self.fellrec}"] if commit == _UNKNOWN else []),
                f"commit {commit}",
                "number of threads not recorded" if self.num_threads == _UNKNOWN else threads,
                f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}",
            ]
        )


def _short(commit: str) -> str:
    """The first characters of a commit's id, and whether its source was changed."""
    name, mark, dirty = commit.partition("-")
    return name[:_COMMIT_CHARACTERS] + mark + dirty


def text_of_comparison(run_dir: Path) -> str:
    """Commit, number of threads and seeds of a finished comparison.

    Args:
        run_dir: Of the comparison. If its ``comparison.json`` was written before it had them, the first run's
            ``versions.json`` has.
    """
    comparison = json.loads((run_dir / "comparison" / "comparison.json").read_text())
    measured = comparison.get("measured")
    if measured is None:
        of_runs = [json.loads(path.read_text()) for path in sorted(run_dir.glob("*/versions.json"))]
        seeds = [run["seed"] for line in comparison["rules"].values() for run in line["runs"]]
        measured = {**next(iter(of_runs), {}), "seeds": seeds}
    return Provenance.of(measured).text(measured["seeds"])


def measured_line(text: str) -> str:
    """The line below a table in Markdown; ``docs/evaluation.md`` explains it.

    Example:
        >>> measured_line("commit 731ba16, 1 thread, seed 0")
        '\\n*Measured*: commit 731ba16, 1 thread, seed 0.\\n'
    """
    return f"\n*Measured*: {text}.\n"
