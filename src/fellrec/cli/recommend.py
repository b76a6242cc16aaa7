"""``fellrec recommend``: what a client's model of a finished run recommends after a history."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_format, add_run_dir, add_trust

if TYPE_CHECKING:
    from fellrec.experiment.served import Recommended

PURPOSE = "the items that a client's model recommends after a history of titles"
EXAMPLES = (
    "fellrec recommend runs/RUN --client 3 --history 'Heat (1995)' 'Casino (1995)' -k 10",
    "fellrec recommend runs/RUN --nearest --history 'Heat (1995)' --format json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_run_dir(parser)
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--client", type=int, help="whose model, from 0")
    whose.add_argument(
        "--nearest", action="store_true", help="that of the client whose users are nearest, for a new user"
    )
    parser.add_argument(
        "--history",
        nargs="+",
        required=True,
        metavar="TITLE",
        help="titles in quotes, or item ids, oldest first; case is ignored",
    )
    parser.add_argument("-k", type=int, default=10, help="number of items (default: 10)")
    add_format(parser)
    add_trust(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.paths import cache_dir
    from fellrec.config.stored import read_config

    run_dir = Path(options.run_dir)
    config = read_config(run_dir, options.trust)  # what can be seen now is refused before PyTorch is imported
    _check_early(run_dir, cache_dir(config), options)
    from fellrec.data.titles import items_of
    from fellrec.experiment.restore import data_of
    from fellrec.experiment.served import ServedModel, check_request, nearest_client

    data = data_of(run_dir, config)
    items = items_of(options.history, data.catalogue)
    client = nearest_client(data, items) if options.nearest else options.client
    check_request(data, client, options.history, options.k)
    found = ServedModel.of_run(run_dir, config, data).recommend(client, options.history, options.k)
    if options.format == "json":
        shown = {"client": client, "history": options.history, "items": [asdict(item) for item in found]}
        sys.stdout.write(json.dumps(shown, indent=1) + "\n")
        return
    _print(client, found)


def _check_early(run_dir: Path, cache: Path, options: argparse.Namespace) -> None:
    """Refuse an unknown client or title, if the data that the run was trained on are in the cache."""
    from fellrec.data.schema import ITEMS, Catalogue
    from fellrec.data.titles import check_client, items_of

    try:
        about = json.loads((run_dir / "data.json").read_text())
        catalogue, num_clients = Catalogue.read(cache / "data" / about["key"] / ITEMS), about["statistics"]["clients"]
    except (OSError, ValueError, KeyError, TypeError):  # the data are read and checked later
        return
    if options.client is not None:
        check_client(options.client, num_clients)
    items_of(options.history, catalogue)


def _print(client: int, found: list[Recommended]) -> None:
    from fellrec.report.tables import results_console, text_table

    rows = [(str(item.rank), item.title, item.item_id, f"{item.score:.4f}") for item in found]
    title = f"Recommended by the model of client {client}"
    results_console().print(text_table(title, ("rank", "title", "item", "score"), rows))
