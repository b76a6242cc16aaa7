"""Freeze a workload: fellrec's batches, initial adapter and backbone as files that rivals read without fellrec.

    PYTHONPATH=benchmarks python -m bench.workload FOLDER OVERRIDES…

The folder has ``workload.json`` (hyper-parameters, number of batches and targets), ``batches.safetensors`` (each
batch's tensors under ``ROUND.CLIENT.STEP.NAME``), ``adapter.safetensors`` (the initial adapter by fellrec's names),
``users.safetensors`` (validation and test users of the retrieval family, and the texts of all items) and ``model/``,
the tiny backbone as a Hugging Face folder. See ``bench.settings`` for the overrides.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from bench.plain import Workload
from bench.settings import is_frozen, mark_frozen
from fellrec.config.compose import compose
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.executor import SerialExecutor
from fellrec.models.adapters import LoraAdapter


def freeze(folder: Path, config: DictConfig) -> dict[str, Any]:
    """Write the workload of a configuration; gives what is in ``workload.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    recommender = build_recommender(config, build_data(config))
    adapter = recommender.adapter
    assert isinstance(adapter, LoraAdapter)
    assert adapter.dropout == 0, "losses can only agree without dropout"
    batches, plan = _batches(config, recommender)
    save_file(batches, folder / "batches.safetensors")
    save_file(
        {name: tensor.contiguous() for name, tensor in recommender.initial.items()}, folder / "adapter.safetensors"
    )
    is_retrieval = hasattr(recommender.module.objective, "item_text")
    if is_retrieval:
        save_file(_users(recommender), folder / "users.safetensors")
    assert recommender.backbone.folder is not None
    shutil.copytree(recommender.backbone.folder, folder / "model", dirs_exist_ok=True)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in recommender.initial}
    trainer = config.trainer
    found = {
        "family": "retrieval" if is_retrieval else "generative",
        "temperature": config.objective.temperature if is_retrieval else None,
        "rounds": trainer.num_rounds,
        "learning_rate": trainer.learning_rate,
        "weight_decay": trainer.weight_decay,
        "gradient_clip": trainer.gradient_clip,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "target_modules": sorted(layers),
        "seed": config.seed,
        **plan,
    }
    (folder / "workload.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _batches(config: DictConfig, recommender: Recommender) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All batches of all rounds, and how many each client has."""
    loop = build_loop(config, recommender)
    executor, population = loop.executor, loop.population
    assert isinstance(executor, SerialExecutor)
    tensors: dict[str, Tensor] = {}
    steps: list[list[int]] = []
    for round_index in range(config.trainer.num_rounds):
        steps.append([])
        for row in loop.participation.draw(population, round_index).rows:
            batches = [batch for [batch] in executor.trainer.batches(population.job(row, round_index))]
            steps[-1].append(len(batches))
            for step, batch in enumerate(batches):
                tensors |= {f"{round_index}.{row}.{step}.{name}": t.contiguous() for name, t in batch.items()}
    clients = [population.data_of(row) for row in range(len(steps[0]))]
    samples = [recommender.datamodule.num_samples(client) for client in clients]
    return tensors, {"steps": steps, "num_samples": samples, "clients": len(clients)}


def _users(recommender: Recommender) -> dict[str, Tensor]:
    """Evaluated users by stage and batch, as the text of their histories, and the texts of all items."""
    objective, found = recommender.module.objective, {}
    for stage in ("val", "test"):
        for number, batch in enumerate(recommender.datamodule.eval_loader(stage)):
            ids, ends = objective._history_tokens(batch["histories"])  # type: ignore[attr-defined]
            kept = {
                name: batch[name] for name in ("clients", "target_rows", "target_items", "masked_rows", "masked_items")
            }
            tensors = {"input_ids": ids, "lengths": ends[:, -1] + 1, **kept}
            found |= {f"{stage}.{number}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    items = objective._all_texts  # type: ignore[attr-defined]
    return found | {f"items.{name}": tensor.contiguous() for name, tensor in items.items()}


def frozen(folder: Path, overrides: Sequence[str]) -> Workload:
    """The workload of a folder, which is written if it is not there or was made with other overrides."""
    if not is_frozen(folder, overrides):
        freeze(folder, compose(list(overrides)))
        mark_frozen(folder, overrides)
    return Workload(folder)


def main() -> None:
    """Freeze one workload."""
    folder, *overrides = sys.argv[1:]
    frozen(Path(folder), overrides)


if __name__ == "__main__":
    main()
