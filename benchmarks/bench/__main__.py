"""Measure rows of the table and write ``results.json`` and ``results.png``.

PYTHONPATH=src:benchmarks python -m bench --rows loop,flower --repeats 3 --work bench-work [OVERRIDES…]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from bench.environments import ROOT
from bench.report import draw, facts, print_table, write
from bench.rows import ROWS, How, Result

log = logging.getLogger("bench")


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure, print and write; a row that fails is reported, and the others are measured."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help=f"names, separated by commas; all: {','.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="folder for environments and runs")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder that holds ml-1m")
    parser.add_argument("overrides", nargs="*", help="overrides of fellrec for the rows that train")
    options = parser.parse_args(arguments)
    names = [name for name in options.rows.split(",") if name] or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    how = How(options.work.resolve(), options.repeats, options.overrides, options.data)
    how.work.mkdir(parents=True, exist_ok=True)
    known, results = facts(), list[Result]()
    for name in names:
        log.info("measuring %s", name)
        try:
            results += ROWS[name](how)
        except RuntimeError as error:
            log.warning("%s was not measured: %s", name, error)
            results.append(Result(name, name, float("nan"), note="failed"))
        write(results, known, how.work / "results.json")
        draw(results, how.work / "results.png")
    print_table(results, known)
    log.info("written: %s", how.work / "results.json")
    return results


if __name__ == "__main__":
    main()
