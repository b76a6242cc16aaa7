"""Where a run is tracked: the store of its configuration, checked before training and named at the end."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from omegaconf import DictConfig

from fellrec.functional.quoting import hydra_value
from fellrec.functional.secrets import hide
from fellrec.tracking.known import remember
from fellrec.tracking.links import UI_ADDRESS, run_page
from fellrec.tracking.run_log import place_of
from fellrec.tracking.settings import DEFAULT_URI
from fellrec.tracking.store import absolute, check_reachable


def store_of(config: DictConfig) -> str | None:
    """Where a run is tracked; ``None`` without a store or without the callback that tracks."""
    is_tracked = config.callbacks.get("mlflow") is not None
    return str(config.tracking.uri) if is_tracked and config.tracking.uri is not None else None


def check_store(config: DictConfig) -> None:
    """Check that a run can be tracked, and record that the user has named the store.

    Raises:
        ConfigError: If the store cannot be used, or the experiment was deleted.
    """
    uri, tracking = store_of(config), config.tracking
    may_be_away = config.resume is not None or tracking.on_unreachable == "keep"
    check_reachable(uri, may_be_away=may_be_away, experiment=tracking.experiment)
    if uri is not None:
        remember(uri)


def finish_message(run_dir: Path, config: DictConfig) -> str:
    """Paths of the run directory and of the MLflow store, how to open them, and the link of the run's page there."""
    uri = store_of(config)
    if uri is None:
        return f"Run directory: {run_dir}"
    value = uri if re.fullmatch(r"[\w:/.@%+-]+", uri, re.ASCII) else hydra_value(uri)
    option = "" if uri == absolute(DEFAULT_URI) else f" {_in_shell(f'tracking.uri={value}')}"
    is_server = uri.startswith("http")
    how = hide(uri) if is_server else f"fellrec ui{option}"
    found = place_of(run_dir)
    link = "" if found is None else f"\nResult: {run_page(hide(uri) if is_server else UI_ADDRESS, *found)}"
    shown = f"MLflow: {uri}, experiment {config.tracking.experiment}; open it by: {how}{link}"
    return f"Run directory: {run_dir}\n{shown}"


def _in_shell(word: str) -> str:
    """A word for a shell, in double quotes if it has only single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
