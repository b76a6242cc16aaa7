"""A run's state on disk: safetensors and JSON, written beside the old one and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fellrec.errors import TrainingError
from fellrec.federated.state import OptimizerState, RunState

_PREFIX = "round_"


def save_state(
    folder: Path,
    state: RunState,
    trainable: Mapping[str, nn.Parameter],
    more: Mapping[str, Tensor] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``folder/round_<n>`` with everything that a resume needs, then drop all but the last ``keep``.

    Args:
        folder: The run's ``checkpoints`` folder; made if absent.
        state: State between two rounds.
        trainable: The module's parameters, to name the optimiser's tensors.
        more: Further tensors that `load_state` gives back.
        keep: Checkpoints that stay on disk.

    Returns:
        The folder written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{state.round_index:05d}"
    draft = folder / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    selection = state.selection
    save_file(dict(state.bank.tensors), draft / "adapters.safetensors")
    save_file(dict(selection.bank.tensors), draft / "best.safetensors")
    save_file(dict(selection.client_bank.tensors), draft / "best_per_client.safetensors")
    save_file(_optimizer_tensors(state.optimizers, trainable), draft / "optimizer.safetensors")
    if more:
        save_file(dict(more), draft / "more.safetensors")
    (draft / "state.json").write_text(json.dumps(_scalars(state), indent=1))
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    for old in sorted(folder.glob(f"{_PREFIX}*"))[:-keep]:
        shutil.rmtree(old)
    return final


def rounds_on_disk(folder: Path) -> list[int]:
    """Rounds of the checkpoints below ``folder``, ascending."""
    return sorted(int(path.name.removeprefix(_PREFIX)) for path in folder.glob(f"{_PREFIX}*"))


def load_state(
    folder: Path, state: RunState, trainable: Mapping[str, nn.Parameter], round_index: int | None = None
) -> dict[str, Tensor]:
    """Read a checkpoint below ``folder`` into a fresh ``state``.

    Args:
        folder: The run's ``checkpoints`` folder.
        state: A state of the same run before its first round.
        trainable: The module's parameters.
        round_index: Rounds that were done when it was written; ``None`` for the newest.

    Returns:
        The further tensors that were given to `save_state`.

    Raises:
        TrainingError: If there is no such checkpoint, or it is of another run.
    """
    found = rounds_on_disk(folder)
    if not found or round_index not in (None, *found):
        what = "checkpoint" if round_index is None else f"checkpoint of round {round_index}"
        raise TrainingError(f"nothing to resume: no {what} in {folder}")
    newest = folder / f"{_PREFIX}{found[-1] if round_index is None else round_index:05d}"
    scalars = json.loads((newest / "state.json").read_text())
    selection = state.selection
    for name, bank in (
        ("adapters", state.bank),
        ("best", selection.bank),
        ("best_per_client", selection.client_bank),
    ):
        bank.load_state_dict(load_file(newest / f"{name}.safetensors"))
    state.optimizers = _optimizer_states(load_file(newest / "optimizer.safetensors"), trainable)
    state.round_index = scalars["round_index"]
    state.local_steps = scalars["local_steps"]
    state.rounds_without_gain = scalars["rounds_without_gain"]
    state.extras = scalars["extras"]
    best = scalars["selection"]
    selection.value, selection.round_index = best["value"], best["round_index"]
    selection.client_values, selection.client_rounds = best["client_values"], best["client_rounds"]
    more = newest / "more.safetensors"
    return load_file(more) if more.is_file() else {}


def _scalars(state: RunState) -> dict[str, Any]:
    selection = state.selection
    return {
        "round_index": state.round_index,
        "local_steps": state.local_steps,
        "rounds_without_gain": state.rounds_without_gain,
        "extras": state.extras,
        "selection": {
            "metric": selection.metric,
            "value": selection.value,
            "round_index": selection.round_index,
            "client_values": selection.client_values,
            "client_rounds": selection.client_rounds,
        },
    }


def _optimizer_tensors(
    optimizers: Mapping[int, OptimizerState], trainable: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    return {
        f"{client}|{name}|{key}": torch.as_tensor(value)
        for client, state in optimizers.items()
        for name, parameter in trainable.items()
        for key, value in state.get(parameter, {}).items()
    }


def _optimizer_states(
    tensors: Mapping[str, Tensor], trainable: Mapping[str, nn.Parameter]
) -> dict[int, OptimizerState]:
    states: dict[int, OptimizerState] = {}
    for path, tensor in tensors.items():
        client, name, key = path.split("|")
        parameter = trainable[name]
        on_device = tensor if key == "step" else tensor.to(parameter.device)
        states.setdefault(int(client), defaultdict(dict))[parameter][key] = on_device
    return states
