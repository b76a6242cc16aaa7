"""A client's model as a plain Transformers folder: its adapter added to the weights of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fellrec.cut.settings import UNCHANGED
from fellrec.errors import ConfigError
from fellrec.experiment.restore import data_of, restore
from fellrec.federated.client_model import WholeClientModel
from fellrec.models.adapters import FullAdapter, LoraAdapter, plain_name, save_base
from fellrec.models.peft_folder import ADAPTER_NAME
from fellrec.state.files import private_files


def check_mergeable(config: DictConfig, client: int, num_clients: int) -> None:
    """Refuse what cannot be merged before anything is loaded.

    Raises:
        ConfigError: If there is no such client, or the adapter is not a sum with the backbone's weights.
    """
    if not 0 <= client < num_clients:
        raise ConfigError(f"--client {client} is not allowed: the run has clients 0 to {num_clients - 1}")
    kind = str(config.adapter["_target_"]).rpartition(".")[2]
    if kind not in (LoraAdapter.__name__, FullAdapter.__name__):
        raise ConfigError(f"--merge needs adapter=lora or adapter=full, and the run has {kind}")
    if config.backbone.get("quantize") is not None:
        raise ConfigError(f"--merge needs a backbone that is not quantised, not quantize={config.backbone.quantize}")


def merge(run_dir: Path, config: DictConfig, client: int, folder: Path) -> None:
    """Write the model of a client of a finished run, for ``from_pretrained`` without PEFT and without fellrec.

    Args:
        run_dir: Of the run.
        config: Its configuration.
        client: Whose model.
        folder: New or empty.

    Raises:
        ConfigError: If the run is not finished, or see `check_mergeable`; if the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {folder} exists and is not empty; choose another")
    config.split.update(UNCHANGED)  # the whole model, in this process
    data = data_of(run_dir, config)
    check_mergeable(config, client, data.num_clients)
    recommender, federation = restore(run_dir, config, data)
    (job,) = [job for job in federation.selection.score_jobs() if client in job.clients]
    model = WholeClientModel(recommender.module, recommender.base)
    with model.evaluating(job, "test", 0), private_files():
        save_base(_merged(recommender.backbone.model), recommender.backbone, folder)


@torch.no_grad()
def _merged(model: torch.nn.Module) -> dict[str, Tensor]:
    """All weights of a model by their names without the adapter, which is added to them."""
    weights = {plain_name(name): p.detach() for name, p in model.named_parameters() if ".lora_" not in name}
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    for name, module in found:
        if ADAPTER_NAME in module.lora_A:
            layer: Any = module
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER_NAME).to(weight.dtype)
    return weights
