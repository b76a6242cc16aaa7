"""Environments of the rivals whose packages do not fit beside fellrec's.

Flower needs older versions of protobuf and rich, and NVFlare others of its own. Each gets an environment of its own
with its package; torch, transformers and peft come from fellrec's environment, behind its own packages, so that all
train with the same versions.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"flower": "flwr[simulation]==1.42.0", "nvflare_job": "nvflare==2.9.0"}
"""Package of each rival that has an environment of its own, by the name of its module."""


@dataclass(frozen=True)
class Environment:
    """A Python interpreter with what a rival needs.

    Attributes:
        python: The interpreter.
        packages: What is installed beside fellrec's packages.
    """

    python: Path
    packages: str = ""


def environment_of(rival: str, work: Path) -> Environment:
    """The environment of a rival, created if it is not there; this one if it needs no other packages."""
    if rival not in PACKAGES:
        return Environment(Path(sys.executable))
    folder = work / "environments" / rival
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file() or done.read_text() != PACKAGES[rival]:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGES[rival]]
        subprocess.run(install, check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
        Path(own, "fellrec_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.write_text(PACKAGES[rival])
    return Environment(python, PACKAGES[rival])
