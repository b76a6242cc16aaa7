"""Transforms of what clients send: clipping, noise, quantisation, the largest entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.federated.exchange import Transform
from fellrec.federated.transform_settings import ClipSettings, NoiseSettings, QuantiseSettings, TopKSettings
from fellrec.functional.compression import largest, levels, pack, unpack
from fellrec.functional.privacy import clip_factor, next_bound, norm_of
from fellrec.functional.rng import derive_seed

Payload = Mapping[str, Tensor]


class Clip(Transform, ClipSettings):
    """Scales a client's update by ``min(1, norm / ‖update‖)``, the norm over all of its parameters.

    With ``quantile`` γ the norm C follows that quantile of the clients' norms: after a round in which a fraction b of
    the updates was within it, ``C ← C exp(-η_C (b - γ))``. The fraction is not made private here.
    """

    def __post_init__(self) -> None:
        """Start with the given norm."""
        super().__post_init__()
        self.bound = float(self.norm)
        self._round, self._within, self._count = -1, 0, 0

    def encode(self, payload: Payload, row: int, round_index: int) -> Payload:
        """Clip."""
        if round_index != self._round:
            self._adapt()
            self._round = round_index
        norm = norm_of(payload)
        self._count += 1
        self._within += norm <= self.bound
        factor = clip_factor(norm, self.bound)
        return payload if factor == 1.0 else {name: tensor * factor for name, tensor in payload.items()}

    def state_dict(self) -> dict[str, Any]:
        """The norm, and what was counted in this round."""
        return {"bound": self.bound, "round": self._round, "within": self._within, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        if state:
            self.bound, self._round = state["bound"], state["round"]
            self._within, self._count = state["within"], state["count"]

    def _adapt(self) -> None:
        if self.quantile is not None and self._count:
            self.bound = next_bound(self.bound, self._within / self._count, self.quantile, self.adaptation_rate)
        self._within = self._count = 0


class Noise(Transform, NoiseSettings):
    """Adds Gaussian noise, which is a function of seed, round, client and parameter."""

    def encode(self, payload: Payload, row: int, round_index: int) -> Payload:
        """Add it to all entries that are floats."""
        return {name: self._noisy(name, tensor, row, round_index) for name, tensor in payload.items()}

    def _noisy(self, name: str, tensor: Tensor, row: int, round_index: int) -> Tensor:
        if not tensor.is_floating_point() or self.std == 0:
            return tensor
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "noise", round_index, row, name))
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return tensor + (self.std * noise).to(tensor.device, tensor.dtype)


class _Feedback:
    """What clients could not send so far, by ``row|name``; it is added to their next updates."""

    def __init__(self) -> None:
        self.left: dict[str, Tensor] = {}

    def add(self, payload: Payload, row: int) -> dict[str, Tensor]:
        """The payload plus what was left."""
        found = {name: self.left.get(f"{row}|{name}") for name in payload}
        return {name: t if found[name] is None else t + found[name].to(t) for name, t in payload.items()}  # type: ignore[union-attr]

    def keep(self, wanted: Payload, sent: Payload, row: int) -> None:
        """Remember the difference."""
        self.left |= {f"{row}|{name}": wanted[name] - sent[name] for name in wanted}


class Quantise(Transform, QuantiseSettings):
    """Sends levels of 8 or 4 bits and the distance of two levels, one for each parameter.

    Entries of a payload that are not floats (the places of ``topk``) are sent as they are.
    """

    def __post_init__(self) -> None:
        """Start without a rest."""
        super().__post_init__()
        self._feedback = _Feedback()

    def encode(self, payload: Payload, row: int, round_index: int) -> Payload:
        """The levels.

        Raises:
            TrainingError: If the error is to be fed back, and the entries are not the same in every round.
        """
        floats = {name: tensor for name, tensor in payload.items() if tensor.is_floating_point()}
        if self.error_feedback:
            if sparse := [name for name in floats if "|" in name]:
                raise TrainingError(
                    f"exchange.transforms: quantise cannot feed its error back for {sparse[0]}, whose entries are "
                    "others in every round; give {name: quantise, error_feedback: false}"
                )
            floats = self._feedback.add(floats, row)
        sent = {name: tensor for name, tensor in payload.items() if name not in floats}
        for name, tensor in floats.items():
            found, step = levels(tensor, self.bits)
            shape = {} if self.bits == 8 else {f"{name}|shape": torch.tensor(tensor.shape, dtype=torch.int32)}
            sent |= {f"{name}|levels": found if self.bits == 8 else pack(found), f"{name}|step": step, **shape}
        if self.error_feedback:
            self._feedback.keep(floats, self.decode(sent), row)
        return sent

    def decode(self, payload: Payload) -> Payload:
        """The values of the levels, float32."""
        found = {}
        for key, tensor in payload.items():
            name, _, what = key.rpartition("|")
            if what == "levels" and f"{name}|step" in payload:
                found[name] = self._levels(payload, name).float() * payload[f"{name}|step"]
            elif what not in ("step", "shape") or f"{name}|levels" not in payload:
                found[key] = tensor
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was rounded off."""
        return dict(self._feedback.left)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._feedback.left = dict(state)

    def _levels(self, payload: Payload, name: str) -> Tensor:
        if self.bits == 8:
            return payload[f"{name}|levels"]
        shape = payload[f"{name}|shape"].tolist()
        return unpack(payload[f"{name}|levels"], math.prod(shape)).reshape(shape)


class TopK(Transform, TopKSettings):
    """Sends the entries of each parameter with the largest absolute values, and their places."""

    def __post_init__(self) -> None:
        """Start without a rest."""
        super().__post_init__()
        self._feedback = _Feedback()

    def encode(self, payload: Payload, row: int, round_index: int) -> Payload:
        """Entries, places and shape of each parameter."""
        wanted = self._feedback.add(payload, row) if self.error_feedback else payload
        sent: dict[str, Tensor] = {}
        for name, tensor in wanted.items():
            values, places = largest(tensor, self.fraction)
            shape = torch.tensor(tensor.shape, dtype=torch.int32)
            sent |= {f"{name}|values": values, f"{name}|places": places, f"{name}|shape": shape}
        if self.error_feedback:
            self._feedback.keep(wanted, self.decode(sent), row)
        return sent

    def decode(self, payload: Payload) -> Payload:
        """Each parameter with zeros where nothing was sent."""
        found = {}
        for name in dict.fromkeys(key.rpartition("|")[0] for key in payload):
            shape, values = payload[f"{name}|shape"].tolist(), payload[f"{name}|values"]
            zeros = values.new_zeros(math.prod(shape))
            found[name] = zeros.index_copy(0, payload[f"{name}|places"].long(), values).reshape(shape)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was left out."""
        return dict(self._feedback.left)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._feedback.left = dict(state)
