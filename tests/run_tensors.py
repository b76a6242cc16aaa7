"""All that a run has trained and selected, as flat dictionaries of tensors, so that two runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fellrec.federated.loop import FederatedLoop
from fellrec.state.tensor_store import StoredTensors


def adapters(loop: FederatedLoop) -> dict[str, Tensor]:
    """All rows' adapters of the whole model, ``[C, *shape]`` by name, wherever its parts were trained."""
    return loop.population.bank.tensors


def selected(loop: FederatedLoop) -> dict[str, Tensor]:
    """The adapters of the population's best round, and those of each client's own best round."""
    state = loop.selection.state_dict()
    return {f"{name} {key}": t for name in ("served", "client_served") for key, t in _flat(state[name]).items()}


def optimizer_states(loop: FederatedLoop) -> dict[str, Tensor]:
    """AdamW's moments and step counters by row, parameter and key."""
    rows = range(loop.population.num_rows)
    return {f"{row} {key}": tensor for row in rows for key, tensor in loop.population.optimizer_of(row).items()}


def own_tensors(loop: FederatedLoop) -> dict[str, Tensor]:
    """Tensors of the rows, such as control variates, by row, name and parameter."""
    rows = range(loop.population.num_rows)
    return {f"{row} {key}": tensor for row in rows for key, tensor in loop.population.tensors_of(row).items()}


def all_tensors(loop: FederatedLoop) -> dict[str, Tensor]:
    """All of these."""
    return {**adapters(loop), **selected(loop), **optimizer_states(loop), **own_tensors(loop)}


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


def _flat(versions: Sequence[StoredTensors]) -> dict[str, Tensor]:
    return {f"{row} {name}": t for row, version in enumerate(versions) for name, t in version.tensors().items()}
