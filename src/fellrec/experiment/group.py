"""The directory of several runs, a comparison or a sweep: each run has a directory in it, before it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from fellrec.config.compose import without_launcher
from fellrec.config.stored import to_yaml
from fellrec.errors import ConfigError
from fellrec.state.files import make_folder, private_files, write_atomically, write_json
from fellrec.state.inside import check_inside
from fellrec.state.nearest import similar
from fellrec.state.run_folder import CONFIG, RUNS

Kind = Literal["comparison", "sweep"]
COMMANDS: Mapping[str, str] = {"comparison": "fellrec compare", "sweep": "fellrec train -m"}
"""How each is made, and resumed with ``resume=DIRECTORY``."""


@dataclass(frozen=True)
class RunGroup:
    """The content of ``runs.json``.

    Attributes:
        kind: What the runs are.
        names: Of their directories, in the order in which they run.
    """

    kind: str
    names: tuple[str, ...]


def write_group(folder: Path, kind: Kind, configs: Mapping[str, DictConfig]) -> None:
    """Write the configuration of every run into a directory of its own, and last ``runs.json``.

    Args:
        folder: Of the group.
        kind: What the runs are.
        configs: By name of the run's directory, in order.
    """
    with private_files():
        for name, config in configs.items():
            make_folder(folder / name)
            write_atomically(folder / name / CONFIG, to_yaml(in_group(config, folder / name)).encode())
        write_json(folder / RUNS, {"kind": kind, "runs": list(configs)})


def in_group(config: DictConfig, run_dir: Path) -> DictConfig:
    """The configuration of one run of a group.

    Args:
        config: Composed; its ``run_dir`` and ``resume`` are those of the group.
        run_dir: Of the run.
    """
    own = without_launcher(config)
    own.run_dir, own.resume = str(run_dir), None
    return own


def read_group(folder: Path, kind: Kind) -> RunGroup:
    """Read ``runs.json`` of a directory that is given by ``resume=``.

    Raises:
        ConfigError: If it is not the directory of such a group, saying what it is; or the file is damaged.
    """
    if not (folder / RUNS).is_file():
        if (folder / CONFIG).is_file():
            raise ConfigError(f"resume={folder} is one run; resume it by: fellrec train resume={folder}")
        raise ConfigError(f"resume={folder}: no {RUNS} there; give the directory of a {kind}{similar(folder)}")
    group = _read(folder)
    if group.kind != kind:
        raise ConfigError(_how_to_resume(folder, group))
    check_inside(folder)
    return group


def refuse_group(folder: Path) -> None:
    """Refuse the directory of a comparison or sweep where that of one run is needed.

    Raises:
        ConfigError: Saying how the whole is resumed.
    """
    if (folder / RUNS).is_file():
        raise ConfigError(_how_to_resume(folder, _read(folder)))


def _read(folder: Path) -> RunGroup:
    path = folder / RUNS
    try:
        found = json.loads(path.read_bytes())
        group = RunGroup(found["kind"], tuple(found["runs"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if group.kind not in tuple(COMMANDS) or not group.names:
        raise ConfigError(f"{path} is damaged: it names no comparison or sweep, or no runs")
    if strange := [name for name in group.names if not _is_run(folder, name)]:
        raise ConfigError(f"{path} names {strange[0]!r}, which is not the directory of a run in {folder}")
    return group


def _how_to_resume(folder: Path, group: RunGroup) -> str:
    return f"resume={folder} is a {group.kind}; resume it by: {COMMANDS[group.kind]} resume={folder}"


@contextmanager
def advising(folder: Path, kind: Kind) -> Iterator[None]:
    """Print how to resume a group whose command does not come to its end."""
    try:
        yield
    except BaseException as error:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
        sys.stderr.write(f"\n{what}; resume the {kind} by: {COMMANDS[kind]} resume={folder}\n")
        raise


def _is_run(folder: Path, name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and (folder / name / CONFIG).is_file()
