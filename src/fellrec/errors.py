"""The errors a user can cause. The CLI turns each into one message and a non-zero exit status."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FellrecError(Exception):
    """Base of every error whose message is written for the user.

    Attributes:
        already_reported: Whether another process of the run shows the message.
    """

    already_reported = False


class ConfigError(FellrecError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(FellrecError):
    """A data file or the interactions in it cannot be used."""


class LeakError(DataError):
    """A model would see, or be selected by, what it is tested on, or could be asked for what it cannot rank."""


class BackboneError(FellrecError):
    """A backbone, its split or its adapter cannot be built."""


class TrainingError(FellrecError):
    """Training cannot go on; the last good state is kept."""


class StorageError(FellrecError):
    """A file of a run cannot be written: the disk is full, or the folder is not ours to write to."""


class CheckpointError(FellrecError):
    """A checkpoint is damaged, or one of its files is absent."""


class SplitError(TrainingError):
    """Processes cannot go on together: a wrong message, another version, or one of them is gone."""


class Preempted(KeyboardInterrupt):
    """The run was told to stop and can be resumed; like Ctrl-C, no failure that a policy could catch or count.

    Args:
        message: What stopped it, and where.
        exit_code: Of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest_first(value: str, choices: Iterable[str]) -> list[str]:
    """Order ``choices`` for an error message: those that look like ``value`` first, the rest by name.

    Example:
        >>> nearest_first("fedavgg", ["local", "fellrec", "fedavg"])
        ['fedavg', 'fellrec', 'local']
    """
    names = sorted(str(choice) for choice in choices)
    close = get_close_matches(value, names, n=len(names) or 1, cutoff=0.6)
    return close + [name for name in names if name not in close]


def unknown(kind: str, value: object, choices: Iterable[str]) -> str:
    """Word the message for a name that is not among ``choices``.

    Example:
        >>> unknown("aggregation", "fedavgg", ["local", "fedavg"])
        "unknown aggregation 'fedavgg'; choose from: fedavg, local"
    """
    return f"unknown {kind} {str(value)!r}; choose from: {', '.join(nearest_first(str(value), choices))}"
