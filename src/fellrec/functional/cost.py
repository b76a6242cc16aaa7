"""What a cut costs: bytes of storage, memory and traffic. Pure arithmetic on counts; METHOD §4.

Client: head and tail. Server: body. All sizes are bytes; counts per round may be means and are floats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of one number."""

_SCALE_BYTES = 4  # int8 travels with one float32 scale per token
_NORM_BYTES = 4  # of the gradient of one of the body's tensors, float32
_STEP_BYTES = 2 * 4  # clip factor and learning rate of one step, float32
_FINISH_BYTES = 2 * 8  # loss and number of samples of one client and round
_COUNT_BYTES = 4  # AdamW counts its steps per tensor, in float32


@dataclass(frozen=True)
class PartCost:
    """What one part of the model, or several together, weighs.

    Attributes:
        num_layers: Decoder layers.
        weight_bytes: The backbone's own parameters; a tied one counts once.
        adapter_bytes: Trainable parameters.
        added_bytes: Those of ``adapter_bytes`` that come on top of ``weight_bytes``: all of LoRA, none of a full
            adapter.
        num_adapter_tensors: Trainable tensors.
        activation_bytes: What the forward pass of one micro-batch keeps for the backward pass, parameters left out.
        forward_flops: Floating point operations of one micro-batch's forward pass.
    """

    num_layers: int = 0
    weight_bytes: int = 0
    adapter_bytes: int = 0
    added_bytes: int = 0
    num_adapter_tensors: int = 0
    activation_bytes: int = 0
    forward_flops: int = 0

    @property
    def gradient_bytes(self) -> int:
        """One gradient per trainable parameter, of the same type."""
        return self.adapter_bytes

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments per trainable parameter, of the same type, and one step count per tensor.

        Example:
            >>> PartCost(adapter_bytes=4 * 1000, num_adapter_tensors=2).optimizer_bytes
            8008
        """
        return 2 * self.adapter_bytes + _COUNT_BYTES * self.num_adapter_tensors

    def peak_bytes(self, in_flight: int = 1) -> int:
        """Memory at the end of the forward pass, plus gradients: everything above at once.

        Args:
            in_flight: Clients under way at the same time; they share the backbone's weights, and nothing else.

        Example:
            100 of weights, 8 of LoRA, 8 of gradients, 16 of moments, 50 of activations; a second client needs all but
            the weights again.

            >>> part = PartCost(weight_bytes=100, adapter_bytes=8, added_bytes=8, activation_bytes=50)
            >>> part.peak_bytes(), part.peak_bytes(in_flight=2)
            (182, 264)
        """
        own = self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        return self.weight_bytes + self.added_bytes + in_flight * own + (in_flight - 1) * self.adapter_bytes


def together(parts: Iterable[PartCost]) -> PartCost:
    """Sum of several parts on one machine.

    Example:
        >>> together([PartCost(num_layers=1, weight_bytes=10), PartCost(num_layers=2)])
        PartCost(num_layers=3, weight_bytes=10, adapter_bytes=0, added_bytes=0, num_adapter_tensors=0, \
activation_bytes=0, forward_flops=0)
    """
    found = list(parts)
    return PartCost(**{field.name: sum(getattr(part, field.name) for part in found) for field in fields(PartCost)})


def share(part: float, whole: float) -> float:
    """``part / whole``, and 0 where there is nothing to share.

    Example:
        A decoder layer of LLaMA-7B has 4·4096² + 3·4096·11008 + 2·4096 = 202,383,360 weights, embedding, final norm
        and LM head together 2·32000·4096 + 4096 = 262,148,096; 32 layers. METHOD §4: 67 % for k + m = 21, 13 % for 3.

        >>> layer, rest = 202_383_360, 262_148_096
        >>> [round(share(kept * layer + rest, 32 * layer + rest), 3) for kept in (21, 3)]
        [0.67, 0.129]
    """
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class RoundLoad:
    """What one client does in one round, the mean over clients.

    Attributes:
        num_steps: Optimiser steps.
        num_tokens: Padded tokens B · L that go through the model, over all steps.
    """

    num_steps: float
    num_tokens: float


@dataclass(frozen=True)
class Wire:
    """How things cross a cut.

    Attributes:
        hidden_size: D.
        hidden_dtype: Of hidden states: ``float32``, ``bfloat16`` or ``int8``.
        gradient_dtype: Of gradients, likewise.
        clips_gradients: Whether client and server agree on one gradient norm at every step.
        exchanges_adapters: Whether the rule mixes adapters; if not, none leaves its client.
    """

    hidden_size: int
    hidden_dtype: str = "float32"
    gradient_dtype: str = "float32"
    clips_gradients: bool = False
    exchanges_adapters: bool = True


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client and round; up is from the client to the server.

    Attributes:
        hidden_up_bytes: Outputs of the head.
        hidden_down_bytes: Outputs of the body.
        gradient_up_bytes: Gradients of the body's outputs.
        gradient_down_bytes: Gradients of the head's outputs.
        adapter_up_bytes: The client's trained head and tail adapters.
        adapter_down_bytes: The mixed ones.
        scalar_up_bytes: Clip factor and learning rate of every step; loss and number of samples.
        scalar_down_bytes: Gradient norms.
    """

    hidden_up_bytes: float = 0.0
    hidden_down_bytes: float = 0.0
    gradient_up_bytes: float = 0.0
    gradient_down_bytes: float = 0.0
    adapter_up_bytes: float = 0.0
    adapter_down_bytes: float = 0.0
    scalar_up_bytes: float = 0.0
    scalar_down_bytes: float = 0.0

    @property
    def hidden_bytes(self) -> float:
        """Hidden states, both ways."""
        return self.hidden_up_bytes + self.hidden_down_bytes

    @property
    def gradient_bytes(self) -> float:
        """Gradients, both ways."""
        return self.gradient_up_bytes + self.gradient_down_bytes

    @property
    def adapter_bytes(self) -> float:
        """Adapters, both ways."""
        return self.adapter_up_bytes + self.adapter_down_bytes

    @property
    def up_bytes(self) -> float:
        """Everything that the client sends."""
        return self.hidden_up_bytes + self.gradient_up_bytes + self.adapter_up_bytes + self.scalar_up_bytes

    @property
    def down_bytes(self) -> float:
        """Everything that the client receives."""
        return self.hidden_down_bytes + self.gradient_down_bytes + self.adapter_down_bytes + self.scalar_down_bytes

    @property
    def total_bytes(self) -> float:
        """Everything, both ways."""
        return self.up_bytes + self.down_bytes


def crossing_bytes(num_tokens: float, hidden_size: int, dtype: str) -> float:
    """Bytes of ``num_tokens`` rows ``[D]`` that cross a cut once.

    Example:
        >>> [crossing_bytes(10, 64, dtype) for dtype in ("float32", "bfloat16", "int8")]
        [2560, 1280, 680]
    """
    scale = _SCALE_BYTES if dtype == "int8" else 0
    return num_tokens * (hidden_size * ELEMENT_BYTES[dtype] + scale)


def traffic(head: PartCost, body: PartCost, tail: PartCost, load: RoundLoad, wire: Wire) -> Traffic:
    """Traffic of one client in one round of training; evaluation is not in it.

    Every micro-batch crosses the two cuts forward, and backward as far as something trains: gradients go up if head
    or body has trainable parameters, and down again if the head has. Without a body nothing crosses but adapters.

    Args:
        head: The head.
        body: The body.
        tail: The tail.
        load: Steps and tokens of the round.
        wire: Types on the way.

    Example:
        Two steps with 100 tokens together, D = 8, one trainable tensor of 40 bytes in each part. A crossing is
        100 · 8 · 4 = 3200 bytes, and there are four. Up: 8 bytes a step and 16 at the end; down: 4 bytes a step.

        >>> part = PartCost(num_layers=1, adapter_bytes=40, num_adapter_tensors=1)
        >>> found = traffic(part, part, part, RoundLoad(2, 100), Wire(8, clips_gradients=True))
        >>> found.hidden_bytes, found.gradient_bytes, found.adapter_bytes
        (6400, 6400, 160)
        >>> found.scalar_up_bytes, found.scalar_down_bytes
        (32, 8)
    """
    is_cut = body.num_layers > 0
    hidden = crossing_bytes(load.num_tokens, wire.hidden_size, wire.hidden_dtype) if is_cut else 0
    gradient = crossing_bytes(load.num_tokens, wire.hidden_size, wire.gradient_dtype) if is_cut else 0
    goes_up = head.num_adapter_tensors + body.num_adapter_tensors > 0
    norms = _NORM_BYTES * body.num_adapter_tensors if is_cut and wire.clips_gradients else 0
    adapter = head.adapter_bytes + tail.adapter_bytes if wire.exchanges_adapters else 0
    return Traffic(
        hidden_up_bytes=hidden,
        hidden_down_bytes=hidden,
        gradient_up_bytes=gradient if goes_up else 0,
        gradient_down_bytes=gradient if head.num_adapter_tensors else 0,
        adapter_up_bytes=adapter,
        adapter_down_bytes=adapter,
        scalar_up_bytes=(_STEP_BYTES * load.num_steps if is_cut else 0) + _FINISH_BYTES,
        scalar_down_bytes=norms * load.num_steps,
    )


def checkpoint_bytes(whole: PartCost, num_clients: int, pools_clients: bool = False) -> int:
    """Tensors of one checkpoint, at most: adapters now, best, and best per client; every client's optimiser state.

    Args:
        whole: The whole model.
        num_clients: C.
        pools_clients: Whether the rule trains one adapter for all clients.

    Example:
        Three clients, one tensor of 40 bytes: 3 · (3 · 40) adapters, 3 · (2 · 40 + 4) moments.

        >>> checkpoint_bytes(PartCost(adapter_bytes=40, num_adapter_tensors=1), num_clients=3)
        612
    """
    rows = 1 if pools_clients else num_clients
    return whole.adapter_bytes * (2 * rows + num_clients) + whole.optimizer_bytes * rows


def human_bytes(num_bytes: float) -> str:
    """Bytes for people: powers of 1000, three figures.

    Example:
        >>> [human_bytes(number) for number in (0, 999, 1234, 26_953_662_464, 3.2e15)]
        ['0 B', '999 B', '1.23 kB', '27.0 GB', '3200 TB']
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:.{digits}f} {unit}"


def training_flops(forward_flops: float, trains_all: bool) -> float:
    """Floating point operations of a forward and backward pass that training cannot do without.

    Backward, every matrix product asks for the gradient of its input, which costs as much as the product, and for that
    of its weight, which costs as much again, but only if the weight is trained. LoRA's own products are few per cent of
    the frozen ones and are counted as if they were frozen. What is computed twice to save memory does not count.

    Args:
        forward_flops: Of the forward pass.
        trains_all: Whether all weights are trained; else a low-rank adapter beside frozen ones.

    Example:
        >>> training_flops(10.0, trains_all=False), training_flops(10.0, trains_all=True)
        (20.0, 30.0)
    """
    return forward_flops * (3 if trains_all else 2)
