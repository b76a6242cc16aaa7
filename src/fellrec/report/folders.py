"""Which directories are finished runs; without heavy imports, so that a wrong one is refused at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fellrec.errors import ConfigError, shorten
from fellrec.state.lock import check_free
from fellrec.state.run_folder import CONFIG, RUNS, which_run

RESULTS, USERS = "results.json", "users.parquet"
FINISHED = "finished.json"
"""Written when everything else of a run is: what the table of a comparison says of it beside its metrics."""
_MOST_NAMES = 5


def run_folders(folder: Path) -> list[Path]:
    """The directories of the runs of a run, a comparison or a sweep.

    Raises:
        ConfigError: If there are none, or if some are not finished.
    """
    found = [folder] if (folder / CONFIG).is_file() else [path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if not found:
        raise ConfigError(f"{folder} has no {CONFIG}; {which_run(folder)}")
    for path in found:
        if not (path / RESULTS).is_file():
            check_free(path)
    unfinished = [path for path in found if not all((path / name).is_file() for name in (RESULTS, USERS))]
    if unfinished:
        names = some(str(path) for path in unfinished)
        alone = ", or give the finished runs alone" if len(found) > 1 else ""
        verb, them = ("has", "it") if len(unfinished) == 1 else ("have", "them")
        how = f"resume {them}: fellrec train resume={unfinished[0]}"
        if (folder / RUNS).is_file():
            how = f"resume the whole: fellrec compare resume={folder} (a sweep: fellrec train -m resume={folder})"
        raise ConfigError(f"not finished, or made with ~callbacks.outputs: {names} {verb} no {RESULTS}; {how}{alone}")
    return found


def some(names: Iterable[str]) -> str:
    """The first few names, for messages.

    Example:
        >>> some("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    names = [shorten(name, 120) for name in names]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{', '.join(names[:_MOST_NAMES])}{more}"
