"""The models of all clients of a run as one folder that needs neither the run nor its data, and as an MLflow model.

The folder has the catalogue, the backbone (one from elsewhere is only named), and each client's adapter. It has no
interactions of users.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from safetensors.torch import load_file

from fellrec.config.instantiate import as_dict, is_own, targets
from fellrec.config.stored import add_newer
from fellrec.cut.settings import UNCHANGED
from fellrec.data.cold import ColdStart
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError
from fellrec.experiment.build import Recommender, build_adapter, build_module, head_depths
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.precision import use_precision, weights_dtype
from fellrec.experiment.served import ServedModel
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.records import FitResult, ScoreJob
from fellrec.models.backbone import load_hf
from fellrec.models.fingerprint import differences, fingerprint
from fellrec.models.peft_folder import write_tensors
from fellrec.models.split import SplitModel
from fellrec.state.files import write_json, write_parquet
from fellrec.state.tensor_store import StoredTensors
from fellrec.tracking.quiet import quiet_mlflow

_GROUPS = ("seed", "backbone", "adapter", "objective", "ranker", "split", "trainer")
_ABOUT, _CATALOGUE, _BACKBONE, _FORMAT = "model.json", "catalogue.parquet", "backbone", 1
_MOST_BYTES = 256 << 20
"""A larger backbone is not copied into every run's model, only named."""
_COPIED = (".json", ".model", ".safetensors", ".txt", ".jinja")
"""Suffixes of a backbone's files that are copied; none is a pickle."""


def why_not(config: DictConfig, data: PreparedData) -> str | None:
    """Why a run's models cannot be served without the run; ``None`` if they can."""
    if data.members:
        return "clients of data=federation have catalogues of their own"
    if config.ranker.get("reweight", "none") != "none":
        return f"ranker.reweight={config.ranker.reweight} needs the training interactions"
    plain = as_dict(config)
    if strange := [name for group in _GROUPS for name in targets({group: plain[group]}) if not is_own(name)]:
        return f"{', '.join(strange)} is not a class of fellrec"
    return None


def write_bundle(folder: Path, config: DictConfig, recommender: Recommender, result: FitResult) -> None:
    """Write the selected models of a run.

    Args:
        folder: A new folder.
        config: Of the run.
        recommender: Of the run.
        result: What was selected.
    """
    folder.mkdir(parents=True)
    data, plain = recommender.data, as_dict(config)
    catalogue = data.catalogue
    table = catalogue.attributes.assign(item_id=list(catalogue.item_ids), title=list(catalogue.titles))
    write_parquet(folder / _CATALOGUE, table)
    named = _copy_backbone(recommender.backbone.folder, folder) or str(config.backbone.get("path"))
    files: dict[int, str] = {}
    for client, stored in enumerate(result.served):
        if id(stored) not in files:
            name = files[id(stored)] = "shared" if result.is_shared else f"client_{client:02d}"
            write_tensors(stored.tensors(), folder / f"{name}.safetensors")
    changes = max(result.bases, key=len, default=())
    for number, change in enumerate(changes):
        write_tensors(change.tensors(), folder / f"base_{number:02d}.safetensors")
    about = {
        "format": _FORMAT,
        "config": {name: plain[name] for name in _GROUPS},
        "backbone": None if (folder / _BACKBONE).is_dir() else named,
        "max_history": data.max_history,
        "ranks_seen": data.ranks_seen,
        "adapters": [files[id(stored)] for stored in result.served],
        "num_changes": [len(base) for base in result.bases],
        "fingerprint": recommender.fingerprint,
    }
    write_json(folder / _ABOUT, about)


def load_bundle(folder: Path) -> ServedModel:
    """Load what `write_bundle` wrote.

    Raises:
        ConfigError: If it is of another version, or the backbone is not the one of the run.
    """
    about = json.loads((folder / _ABOUT).read_text())
    if about.get("format") != _FORMAT:
        raise ConfigError(f"{folder} has format {about.get('format')}, this version of fellrec reads {_FORMAT}")
    config = _config(about["config"])
    fabric = build_fabric(config, alone=True)
    use_precision(fabric, config)
    path = about["backbone"] or str(folder / _BACKBONE)
    backbone = load_hf(path, weights_dtype(config), quantize=config.backbone.get("quantize"))
    if differing := differences(about["fingerprint"], fingerprint(backbone)):
        raise ConfigError(f"the model was trained with another backbone than {path}; they differ in {differing}")
    model = SplitModel(backbone.model, head_depths(config), config.split.tail_layers)
    data = _catalogue_only(folder, about)
    module = build_module(config, data, backbone, model, build_adapter(config), fabric, ColdStart.of(data, 0))
    base = BaseWeights(backbone.model)
    return ServedModel(module, base, fabric, data, _jobs(folder, about["adapters"], about["num_changes"]))


def save_pyfunc(folder: Path, config: DictConfig, recommender: Recommender, result: FitResult) -> None:
    """Write the selected models of a run as an MLflow model without pickles (models from code).

    It has a copy of fellrec's source, for environments made from the model's own requirements.

    Args:
        folder: A new folder.
        config: Of the run.
        recommender: Of the run.
        result: What was selected.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    text, number = Array(DataType.string), Array(DataType.double)
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "client"), ColSpec(text, "history")]),
        outputs=Schema([ColSpec(text, "item_ids"), ColSpec(text, "titles"), ColSpec(number, "scores")]),
        params=ParamSchema([ParamSpec("k", DataType.long, 10)]),
    )
    example = pd.DataFrame({"client": [0], "history": [list(recommender.data.catalogue.titles[:2])]})
    with TemporaryDirectory(dir=folder.parent) as work, quiet_mlflow():
        write_bundle(Path(work) / "bundle", config, recommender, result)
        mlflow.pyfunc.save_model(
            Path(work) / "model",
            python_model=str(Path(__file__).with_name("served_pyfunc.py")),
            artifacts={"bundle": str(Path(work) / "bundle"), "source": str(_source(Path(work)))},
            signature=signature,
            input_example=example,
            pip_requirements=requirements(),
        )
        for path in (Path(work) / "model").rglob("*.py"):
            path.chmod(0o600)  # a copy has the mode of its source
        (Path(work) / "model").rename(folder)  # a run that is killed leaves no part of it


def _copy_backbone(source: Path | None, folder: Path) -> str | None:
    """Copy a backbone's files if they are small; gives its folder, ``None`` if it has none on this machine."""
    if source is None:
        return None
    files = [path for path in sorted(source.iterdir()) if path.is_file() and path.suffix in _COPIED]
    if sum(path.stat().st_size for path in files) <= _MOST_BYTES:
        (folder / _BACKBONE).mkdir()
        for path in files:
            shutil.copy(path, folder / _BACKBONE / path.name)
    return str(source)


def requirements() -> list[str]:
    """The packages of this environment that fellrec needs, with their versions."""
    try:
        needed = [Requirement(line) for line in requires("fellrec") or ()]
    except PackageNotFoundError:
        needed = []
    plain = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [f"{item.name}=={version(item.name).partition('+')[0]}" for item in plain]


def _source(work: Path) -> Path:
    """The package as one file from which Python can import it."""
    package, path = Path(__file__).parents[1], work / "fellrec.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.rglob("*.py")):
            archive.write(file, file.relative_to(package.parent))
    return path


def _config(plain: dict[str, Any]) -> DictConfig:
    """The settings of a run for one process on whatever device there is, with a whole model."""
    config = OmegaConf.create(plain)
    add_newer(config)
    config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes = "auto", 1, 1
    config.split.update({"transport": "none", **UNCHANGED})
    if config.adapter.get("path") is not None:
        config.adapter.path = None  # its values are in the clients' adapters
    return config


def _catalogue_only(folder: Path, about: dict[str, Any]) -> PreparedData:
    """Data without users: what a model needs to be asked."""
    table = pd.read_parquet(folder / _CATALOGUE)
    items, titles = (tuple(table.pop(name).astype(str)) for name in ("item_id", "title"))
    nothing = Ragged.from_rows([])
    return PreparedData(
        name="",
        catalogue=Catalogue(items, titles, table),
        users=pd.DataFrame({"user_id": []}),
        histories=nothing,
        train=nothing,
        valid=nothing,
        test=nothing,
        train_targets=np.zeros(0, dtype=bool),
        client_of_user=np.zeros(0, dtype=np.int64),
        num_clients=len(about["adapters"]),
        max_history=about["max_history"],
        key="",
        ranks_seen=about["ranks_seen"],
    )


def _jobs(folder: Path, adapters: Sequence[str], num_changes: Sequence[int]) -> list[ScoreJob]:
    changes = [StoredTensors(load_file(path)) for path in sorted(folder.glob("base_*.safetensors"))]
    stored = {name: StoredTensors(load_file(folder / f"{name}.safetensors")) for name in dict.fromkeys(adapters)}
    pairs = enumerate(zip(adapters, num_changes, strict=True))
    return [ScoreJob(client, stored[name], (client,), tuple(changes[:count])) for client, (name, count) in pairs]
