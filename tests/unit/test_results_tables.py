"""Every table of results in the documentation says with which commit, threads and seeds it was measured.

The rule is in ``docs/extending.md``, "Results in the documentation".
"""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("README.md", "docs/*.md", "experiments/*/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
MEASURED = "*Measured*:"
COMMIT = re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{7,40}\b")
FIGURE = re.compile(r"[\[*<~±+−-]*\d")
PARTS = {
    "a commit": COMMIT,
    "the number of threads": re.compile(r"\b\d+ threads?\b|\bthreads not recorded"),
    "the seeds": re.compile(r"\bseeds? \d|\bseeds?,? not recorded"),
}


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        line: Number of its first line, from 1.
        section: The heading above it.
        below: The paragraph below it, in one line.
    """

    line: int
    section: str
    below: str


def tables(page: str) -> Iterator[Table]:
    """The tables of results of a page: those of Markdown, and those that a command printed."""
    lines = page.split("\n")
    section, start, is_code = "", 0, False
    while start < len(lines):
        line = lines[start]
        is_code ^= line.startswith("```")
        if line.startswith("#") and not is_code:
            section = line
        end = start
        if line.strip().startswith("|") and not is_code:
            while end < len(lines) and lines[end].strip().startswith("|"):
                end += 1
            is_table = has_figures(lines[start + 2 : end])
        elif line.startswith("    "):
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            is_table = any("──" in line for line in lines[start:end])
        else:
            start += 1
            continue
        if is_table:
            yield Table(start + 1, section, paragraph(lines[end:]))
        start = end


def has_figures(rows: list[str]) -> bool:
    """Whether in half of the rows a cell after the first one begins with a figure; backquotes make it a setting's value."""
    return 2 * sum(any(FIGURE.match(cell.strip()) for cell in row.strip(" |").split("|")[1:]) for row in rows) >= len(
        rows
    )


def paragraph(lines: list[str]) -> str:
    """The first paragraph, in one line."""
    found: list[str] = []
    for line in (line.strip() for line in lines):
        if line:
            found.append(line)
        elif found:
            break
    return " ".join(found)


def problems(page: str, history: Collection[str] | None) -> list[str]:
    """What the lines below the tables of results lack.

    Args:
        page: Markdown.
        history: All commits; ``None`` if they are not known.
    """
    found = []
    for table in tables(page):
        where = f"line {table.line}, {table.section}"
        if not table.below.startswith(MEASURED):
            found.append(f"{where}: no paragraph that begins with {MEASURED} below the table")
            continue
        found += [f"{where}: {MEASURED} lacks {name}" for name, form in PARTS.items() if not form.search(table.below)]
        if "-dirty" in table.below:
            found.append(f"{where}: measured with changes that are not committed")
        if history is not None:
            commits = COMMIT.findall(table.below)
            unknown = [commit for commit in commits if not any(known.startswith(commit) for known in history)]
            found += [f"{where}: commit {commit} is not in the history" for commit in unknown]
    return found


@pytest.fixture(scope="module")
def history() -> list[str] | None:
    """All commits that lead to this one; ``None``, with a warning, without them, as in a shallow clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    is_whole = git("rev-parse", "--show-toplevel", "--is-shallow-repository").split("\n") == [str(ROOT), "false"]
    if not is_whole:
        warnings.warn(
            f"{ROOT} has no complete history (git fetch --unshallow): it is NOT checked that the commits of tables of "
            "results exist",
            stacklevel=1,
        )
        return None
    return git("rev-list", "HEAD").split("\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_of_results_says_how_it_was_measured(path: Path, history: list[str] | None) -> None:
    name = str(path.relative_to(ROOT))
    assert not problems(path.read_text(encoding="utf-8"), history), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_line_is_needed(path: Path) -> None:
    """Without any one of the lines, one table is reported; so each line is below a table that counts as results."""
    page = path.read_text(encoding="utf-8")
    places = [found.start() for found in re.finditer(rf"^ {{0,3}}{re.escape(MEASURED)}", page, re.MULTILINE)]
    whole = len(problems(page, None))
    for place in places:
        assert len(problems(page[:place] + "Some text. " + page[place:].lstrip(), None)) == whole + 1


RESULTS = "# Page\n\n| rule | NDCG |\n|---|---|\n| local | 0.12 |\n| fedavg | 0.13 |\n\n"
PRINTED = "# Page\n\n    rule   NDCG\n    ───────────\n    local  0.12\n\n    Markov 0.13\n\n"
LINE = "*Measured*: commit 0123abc, 1 thread, seeds 0, 1.\n"


@pytest.mark.parametrize("table", [RESULTS, PRINTED])
@pytest.mark.parametrize(
    ("below", "problem"),
    [
        (LINE, ""),
        (
            "*Measured*: at or just before commit\n0123abc; number of threads not recorded;\none seed, not recorded.\n",
            "",
        ),
        ("", "no paragraph that begins with"),
        (f"Some text.\n\n{LINE}", "no paragraph that begins with"),
        (LINE.replace("commit 0123abc, ", ""), "lacks a commit"),
        (LINE.replace("1 thread, ", ""), "lacks the number of threads"),
        (LINE.replace("seeds 0, 1", "three seeds"), "lacks the seeds"),
        (LINE.replace("0123abc", "0123abc-dirty"), "not committed"),
        (LINE.replace("0123abc", "0123abd"), "commit 0123abd is not in the history"),
        (LINE.replace("0123abc", "0123abc (local), 7654321 (fedavg)"), "commit 7654321 is not in the history"),
    ],
)
def test_what_a_line_lacks_is_named(table: str, below: str, problem: str) -> None:
    found = problems(table + below, ["0123abcdef" * 4])
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_two_tables_need_two_lines() -> None:
    assert len(problems(RESULTS + RESULTS + LINE, None)) == 1
    assert not problems(RESULTS + LINE + "\n" + RESULTS + LINE, None)


@pytest.mark.parametrize(
    "table",
    [
        "| setting | default |\n|---|---|\n| `a` | `0.1` |\n| `b` | `0.2` |\n",
        "| page | content |\n|---|---|\n| a | UTF-8 |\n| b | up to 20 users |\n| c | [seed 0](b2.md#3) |\n",
        "| 0 | finished |\n|---|---|\n| 1 | an error |\n",
        "```\n| a | 1 |\n|---|---|\n| b | 2 |\n```\n",
        "    fellrec train trainer.num_rounds=3\n",
    ],
)
def test_tables_of_settings_and_terms_need_no_line(table: str) -> None:
    assert not problems(f"# Page\n\n{table}", None)
