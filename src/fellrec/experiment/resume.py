"""What is resumed: the configurations of a run, a comparison or a sweep, from its directory. Without PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from omegaconf import DictConfig

from fellrec.config.compose import compose
from fellrec.config.stored import PLACES, moved, read_config
from fellrec.errors import ConfigError
from fellrec.experiment.group import Kind, read_group, refuse_group
from fellrec.experiment.store import store_of
from fellrec.state.run_folder import CONFIG, which_run
from fellrec.tracking.known import confirm
from fellrec.tracking.run_log import store_of_run

_PROCESSES = ("trainer.devices", "trainer.num_nodes")
"""Settings that a resumed run may change: they do not change the result."""
_STORE = "tracking.uri="


def resume_dir(overrides: Sequence[str]) -> Path | None:
    """The directory given by ``resume=``, verbatim: Hydra's grammar does not allow every path."""
    given = [item.removeprefix("resume=") for item in overrides if item.startswith("resume=")]
    return Path(given[-1]) if given and given[-1] not in ("", "null") else None


def resumed(overrides: Sequence[str], run_dir: Path, trusted: Collection[str] = ()) -> DictConfig:
    """The configuration of a run that is resumed.

    Args:
        overrides: Hydra overrides; only ``resume``, ``tracking.uri``, the number of processes and the places of files
            are allowed.
        run_dir: The run's directory.
        trusted: Classes that are not of fellrec and may be used.

    Raises:
        ConfigError: If it is not the directory of a run, or there are other overrides.
    """
    if not (run_dir / CONFIG).is_file():
        refuse_group(run_dir)
        raise ConfigError(f"resume={run_dir}: no {CONFIG} there; {which_run(run_dir)}")
    config = _moved(overrides, run_dir, trusted)
    config.tracking.uri = _store(overrides, run_dir, config)
    config.run_dir, config.resume = str(run_dir), str(run_dir)
    return config


def resumed_group(
    overrides: Sequence[str], folder: Path, kind: Kind, trusted: Collection[str] = ()
) -> dict[str, DictConfig]:
    """The configurations of a comparison or sweep that is resumed, by name of the run's directory, in order.

    Args:
        overrides: As for `resumed`.
        folder: The directory of the group, which becomes ``run_dir`` and ``resume`` of each configuration.
        kind: What it must be.
        trusted: As for `resumed`.

    Raises:
        ConfigError: If it is not the directory of such a group, or there are other overrides.
    """
    configs = {name: _moved(overrides, folder / name, trusted) for name in read_group(folder, kind).names}
    uri = _store(overrides, folder, next(iter(configs.values())))
    for config in configs.values():
        config.tracking.uri = uri
        config.run_dir = config.resume = str(folder.absolute())
    return configs


def _moved(overrides: Sequence[str], run_dir: Path, trusted: Collection[str]) -> DictConfig:
    others = [item for item in overrides if not item.startswith(("resume=", _STORE))]
    return moved(read_config(run_dir, trusted), others, (*_PROCESSES, *PLACES, "tracking.uri"))


def _store(overrides: Sequence[str], run_dir: Path, config: DictConfig) -> str | None:
    """Where a resumed run is tracked: in the store of ``tracking.uri=``, or in its own if the user has named that.

    Raises:
        ConfigError: If the user has not.
    """
    if given := [item for item in overrides if item.startswith(_STORE)]:
        uri: str | None = compose(given).tracking.uri
    else:
        named = store_of(config)
        uri = None if named is None else store_of_run(run_dir, named)
        if uri is not None:
            confirm(uri, run_dir, f"tracking.uri={uri}")
    return uri
