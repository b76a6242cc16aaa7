"""Item vectors that were computed before, by what the model's weights are."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fellrec.models.split import SplitModel

_NUM_KEPT = 16
"""Tables of item vectors; a table of 20,000 items with 384 numbers has 31 MB."""


class KeptItemVectors:
    """The vectors of all items of the models that were used last.

    An adapter that was validated is the one that the next round begins with, and many clients begin with the same one:
    the vectors are those of the same weights. Weights are compared by SHA-256, so a change of one bit is seen.

    A weight's hash is computed again if the tensor is another one, or was changed in place (PyTorch counts that).
    """

    def __init__(self) -> None:
        self._vectors: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._hashes = WeakIdKeyDictionary()

    @torch.no_grad()
    def of(self, model: SplitModel, compute: Callable[[], Tensor]) -> Tensor:
        """The vectors ``[I, D]``, without gradients.

        Args:
            model: In evaluation mode.
            compute: Computes them.
        """
        device = next(model.model.parameters()).device.type
        if device == "meta":  # the planner's model, which has no values
            return compute()
        precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (device, precision, *(self._hash(name, tensor) for name, tensor in model.model.named_parameters()))
        if key in self._vectors:
            self._vectors.move_to_end(key)
        else:
            self._vectors[key] = compute()
            if len(self._vectors) > _NUM_KEPT:
                self._vectors.popitem(last=False)
        return self._vectors[key]

    def _hash(self, name: str, tensor: Tensor) -> tuple[str, bytes]:
        version, digest = self._hashes.get(tensor, (None, b""))
        if version != tensor._version:
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = hashlib.sha256(values.numpy().tobytes()).digest()
            self._hashes[tensor] = (tensor._version, digest)
        return name, digest
