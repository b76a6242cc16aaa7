"""Changes of the frozen base: factored, versioned, applied in the same order by every process and by the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fellrec.errors import TrainingError
from fellrec.state.tensor_store import StoredTensors


class BaseWeights:
    """The base of one process's model, at any version of a run.

    A version is the sequence of changes that were made so far. Changes are added to the weights one after the other, in
    the weights' own type, so all processes have the same bits. The original weights of what is changed are kept, so
    an earlier version can be restored exactly.

    Args:
        model: The backbone, or one side's part of it.
        is_whole: Whether all changed weights must be in the model; one side of a cut ignores those of the other.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> before = model.weight.detach().clone()
        >>> change = StoredTensors({"weight|left": torch.ones(2, 1), "weight|right": torch.ones(1, 2)})
        >>> base = BaseWeights(model)
        >>> base.use([change])
        >>> torch.equal(model.weight, before + 1)
        True
        >>> base.use([])
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(self, model: nn.Module, is_whole: bool = False) -> None:
        self._model = model
        self._is_whole = is_whole
        self._applied: list[StoredTensors] = []
        self._originals: dict[str, Tensor] = {}

    @property
    def version(self) -> int:
        """Changes that are applied now."""
        return len(self._applied)

    @torch.no_grad()
    def use(self, changes: Sequence[StoredTensors]) -> None:
        """Bring the weights to the version that these changes make, the oldest first."""
        applied = self._applied
        if len(applied) == len(changes) and all(mine is theirs for mine, theirs in zip(applied, changes)):
            return
        common = 0
        while common < min(len(applied), len(changes)) and applied[common] is changes[common]:
            common += 1
        if common < len(applied):
            for name, original in self._originals.items():
                self._parameters[name].copy_(original)
            common = 0
        for change in changes[common:]:
            self._add(change.tensors())
        self._applied = list(changes)

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())

    def _add(self, factors: Mapping[str, Tensor]) -> None:
        parameters = self._parameters
        if self._is_whole:
            _check_names(parameters, factors)
        for name, weight, change in _changes(parameters, factors):
            self._originals.setdefault(name, weight.detach().to("cpu", copy=True))
            weight.add_(change.to(weight.device, weight.dtype))


def with_changes(weights: Mapping[str, Tensor], changes: Sequence[StoredTensors]) -> dict[str, Tensor]:
    """Original weights by name with changes added, as `BaseWeights` does; what is changed is copied."""
    found = dict(weights)
    for change in changes:
        for name, weight, added in _changes(found, change.tensors()):
            found[name] = weight + added.to(weight.device, weight.dtype)
    return found


def _check_names(weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    names = {key.partition("|")[0] for key in factors}
    expected = {f"{name}|{side}" for name in names & set(weights) for side in ("left", "right")}
    if wrong := sorted(expected ^ set(factors)):
        raise TrainingError(
            "a change of the base has the factors NAME|left and NAME|right of weights of the backbone; "
            f"unknown or absent: {', '.join(wrong[:3])}"
        )


def _changes(weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and its change, for those of the weights that are here."""
    for key, left in factors.items():
        name, _, side = key.partition("|")
        if side == "left" and name in weights:
            weight, change = weights[name], left.double() @ factors[f"{name}|right"].double()
            if not weight.is_floating_point():
                raise TrainingError(
                    f"the base weight {name} is quantised, this rule cannot change it; leave out backbone.quantize"
                )
            if change.shape != weight.shape:
                raise TrainingError(
                    f"the change of the base weight {name} has shape {list(change.shape)}, not {list(weight.shape)}"
                )
            yield name, weight, change
