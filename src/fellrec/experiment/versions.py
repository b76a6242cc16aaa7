"""What a process computes with, beside its settings: versions of packages, fellrec's commit, number of threads."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from importlib.metadata import distribution, version
from pathlib import Path

import torch

NUM_THREADS = "num_threads"
GIT_COMMIT = "git_commit"
_PACKAGES = ("fellrec", "torch", "lightning", "transformers", "peft", "torchmetrics", "hydra-core", "mlflow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results, fellrec's own commit, and the number of threads."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found, GIT_COMMIT: git_commit(), NUM_THREADS: num_threads()}


def num_threads() -> str:
    """The number of threads of this process; the order of sums, and so their last bits, depend on it."""
    return str(torch.get_num_threads())


@functools.cache
def git_commit() -> str:
    """The commit of fellrec itself: of its checkout, or recorded by pip for an installation from a repository.

    It ends in ``-dirty`` if the checkout's source or configuration files differ from the commit, files that are not
    tracked included. ``unknown`` for a release; the repository that the user is in, or that has the environment, does
    not count. Determined once per process: a later commit does not change the code that runs.
    """
    source = Path(__file__).resolve().parents[2]  # src, or site-packages
    if source.name == "src":
        return commit_of(source.parent)
    installed = json.loads(distribution("fellrec").read_text("direct_url.json") or "{}").get("vcs_info", {})
    return str(installed.get("commit_id", "unknown"))


def commit_of(checkout: Path) -> str:
    """The commit of a checkout of fellrec, with ``-dirty`` if its ``src`` or ``conf`` differ from it.

    Args:
        checkout: The top folder of the repository; ``unknown`` if it is a folder inside one, or in none.
    """
    found = _git(checkout, "rev-parse", "--show-toplevel", "HEAD")
    top, _, commit = (found or "").partition("\n")
    if not commit or Path(top).resolve() != checkout.resolve():
        return "unknown"
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=normal", "--", "src", "conf")
    return commit if changes == "" else f"{commit}-dirty"


def _git(checkout: Path, *arguments: str) -> str | None:
    """What a command of git prints; ``None`` if there is no git, or it fails. It writes nothing."""
    command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
