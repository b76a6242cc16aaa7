"""The tracking stores that this user has named: a run directory is data, and may name any other.

Whoever writes a run directory could name a server of their own, which would then be sent files and the user's password,
or a database whose artefacts are stored anywhere.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from fellrec.errors import ConfigError
from fellrec.functional.secrets import VARIABLE, hide
from fellrec.tracking.settings import DEFAULT_URI
from fellrec.tracking.store import absolute


def remember(uri: str) -> None:
    """Record a store that the user has named; without a place to write, it is asked for again."""
    with suppress(OSError):
        if not _is_recorded(uri):
            _file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(_file(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
                file.write(f"{uri}\n")


def confirm(uri: str, run_dir: Path, how: str) -> None:
    """Let a run directory's store be used if the user has named it, in a setting, an earlier run or at the terminal.

    Args:
        uri: The store that the run directory names, without a password.
        run_dir: The run directory.
        how: How to name the store, such as ``--uri URI``.

    Raises:
        ConfigError: If the user has not.
    """
    if uri == hide(absolute(os.environ.get(VARIABLE) or DEFAULT_URI)) or _is_recorded(uri):
        return
    text = f"{run_dir} names the tracking store {uri}, which you have not used from here"
    if sys.stdin is not None and sys.stdin.isatty():
        sys.stderr.write(f"{text}. Send its metrics, files and your credentials there? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            remember(uri)
            return
    raise ConfigError(f"{text}; if it is right, name it: {how}, or {VARIABLE}={uri}")


def _is_recorded(uri: str) -> bool:
    try:
        return uri in _file().read_text().splitlines()
    except (OSError, ValueError):
        return False


def _file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "fellrec" / "tracking_stores"
