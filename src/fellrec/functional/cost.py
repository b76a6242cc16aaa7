"""Storage, memory and traffic of a split model, computed from counts (METHOD §4).

The client has head and tail, the server has the body. Counts per round may be means and are floats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes per element."""

_SCALE_BYTES = 4  # int8: one float32 scale per token
_NORM_BYTES = 4  # float32 gradient norm of one tensor of the body
_RATE_BYTES = 4  # float32 learning rate
_STEP_BYTES = 4 + _RATE_BYTES  # float32 clip factor and learning rate of one step
_REPORT_BYTES = 2 * 8  # loss and number of samples of one client in one round
_LOSS_BYTES = 8  # one loss that is measured
_COUNT_BYTES = 4  # float32 step count of AdamW, one per tensor


@dataclass(frozen=True)
class PartCost:
    """Sizes of one part of the model, or of several parts together.

    Attributes:
        num_layers: Number of decoder layers.
        weight_bytes: Parameters of the backbone; tied parameters count once.
        adapter_bytes: Trainable parameters.
        added_bytes: What the adapter adds to ``weight_bytes``: LoRA's matrices, frozen ones too; nothing of a full
            adapter.
        num_adapter_tensors: Number of trainable tensors.
        activation_bytes: Activations that the forward pass of one micro-batch saves for the backward pass, without
            parameters.
        forward_flops: Floating point operations of the forward pass of one micro-batch.
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
        """Gradients: one per trainable parameter, of the same dtype."""
        return self.adapter_bytes

    @property
    def optimizer_bytes(self) -> int:
        """AdamW: two moments per trainable parameter, of the same dtype, and one step count per tensor.

        Example:
            >>> PartCost(adapter_bytes=4 * 1000, num_adapter_tensors=2).optimizer_bytes
            8008
        """
        return 2 * self.adapter_bytes + _COUNT_BYTES * self.num_adapter_tensors

    def peak_bytes(self, num_clients: int = 1) -> int:
        """Peak memory: weights, adapters, gradients, optimiser state and activations.

        Args:
            num_clients: Number of clients in training at the same time. Only the backbone's weights are common to them.

        Example:
            100 bytes of weights, 8 of LoRA, 8 of gradients, 16 of moments, 50 of activations. A second client adds
            all but the weights.

            >>> part = PartCost(weight_bytes=100, adapter_bytes=8, added_bytes=8, activation_bytes=50)
            >>> part.peak_bytes(), part.peak_bytes(num_clients=2)
            (182, 264)
        """
        own = self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        return self.weight_bytes + self.added_bytes + num_clients * own + (num_clients - 1) * self.adapter_bytes


def total_cost(parts: Iterable[PartCost]) -> PartCost:
    """Sum of several parts.

    Example:
        >>> total_cost([PartCost(num_layers=1, weight_bytes=10), PartCost(num_layers=2)])
        PartCost(num_layers=3, weight_bytes=10, adapter_bytes=0, added_bytes=0, num_adapter_tensors=0, \
activation_bytes=0, forward_flops=0)
    """
    found = list(parts)
    return PartCost(**{field.name: sum(getattr(part, field.name) for part in found) for field in fields(PartCost)})


def fraction(part: float, whole: float) -> float:
    """``part / whole``; 0 if ``whole`` is 0.

    Example:
        A decoder layer of LLaMA-7B has 4·4096² + 3·4096·11008 + 2·4096 = 202,383,360 weights. Embedding, final norm
        and LM head have 2·32000·4096 + 4096 = 262,148,096. With k + m = 21 of 32 layers the client has 67 %, with 3
        layers 13 % (METHOD §4).

        >>> layer, rest = 202_383_360, 262_148_096
        >>> [round(fraction(kept * layer + rest, 32 * layer + rest), 3) for kept in (21, 3)]
        [0.67, 0.129]
    """
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class RoundLoad:
    """Local training of one client in one round, as a mean over clients.

    Attributes:
        num_steps: Optimiser steps of all models that the client trains.
        num_tokens: Padded tokens B · L in the input of the model, summed over all steps.
        measured_batches: Micro-batches of losses that are measured, without a backward pass.
        measured_tokens: Their padded tokens.
        num_losses: Losses that are measured.
        num_received: Adapters that are sent to the client for them.
    """

    num_steps: float
    num_tokens: float
    measured_batches: float = 0.0
    measured_tokens: float = 0
    num_losses: float = 0
    num_received: float = 0


@dataclass(frozen=True)
class TrafficSettings:
    """What client and server exchange, and in which dtypes.

    Attributes:
        hidden_size: D.
        hidden_dtype: Dtype of transferred hidden states: ``float32``, ``bfloat16`` or ``int8``.
        gradient_dtype: Dtype of transferred gradients, likewise.
        clips_gradients: Whether gradients are clipped by their norm over all parts, which needs the body's norms.
        exchanges_adapters: Whether the aggregation rule mixes adapters; if not, they are not transferred.
        has_local_terms: Whether the rule adds terms to the clients' loss: before gradients are clipped, the body's need
            the learning rate.
    """

    hidden_size: int
    hidden_dtype: str = "float32"
    gradient_dtype: str = "float32"
    clips_gradients: bool = False
    exchanges_adapters: bool = True
    has_local_terms: bool = False


@dataclass(frozen=True)
class Traffic:
    """Traffic of one client in one round; up is from the client to the server.

    Attributes:
        hidden_up_bytes: Outputs of the head.
        hidden_down_bytes: Outputs of the body.
        gradient_up_bytes: Gradients of the body's outputs.
        gradient_down_bytes: Gradients of the head's outputs.
        adapter_up_bytes: The client's trained head and tail adapters.
        adapter_down_bytes: The aggregated head and tail adapters.
        scalar_up_bytes: Clip factor and learning rate of every step; loss and number of samples.
        scalar_down_bytes: Gradient norms of the body.
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
        """Hidden states in both directions."""
        return self.hidden_up_bytes + self.hidden_down_bytes

    @property
    def gradient_bytes(self) -> float:
        """Gradients in both directions."""
        return self.gradient_up_bytes + self.gradient_down_bytes

    @property
    def adapter_bytes(self) -> float:
        """Adapters in both directions."""
        return self.adapter_up_bytes + self.adapter_down_bytes

    @property
    def up_bytes(self) -> float:
        """Everything from the client to the server."""
        return self.hidden_up_bytes + self.gradient_up_bytes + self.adapter_up_bytes + self.scalar_up_bytes

    @property
    def down_bytes(self) -> float:
        """Everything from the server to the client."""
        return self.hidden_down_bytes + self.gradient_down_bytes + self.adapter_down_bytes + self.scalar_down_bytes

    @property
    def total_bytes(self) -> float:
        """Everything in both directions."""
        return self.up_bytes + self.down_bytes


def crossing_bytes(num_tokens: float, hidden_size: int, dtype: str) -> float:
    """Bytes to transfer ``num_tokens`` hidden states ``[D]`` across a cut once.

    Example:
        >>> [crossing_bytes(10, 64, dtype) for dtype in ("float32", "bfloat16", "int8")]
        [2560, 1280, 680]
    """
    scale = _SCALE_BYTES if dtype == "int8" else 0
    return num_tokens * (hidden_size * ELEMENT_BYTES[dtype] + scale)


def traffic(head: PartCost, body: PartCost, tail: PartCost, load: RoundLoad, settings: TrafficSettings) -> Traffic:
    """Traffic of one client in one round of training, without evaluation.

    The hidden states of every micro-batch cross both cuts. Gradients are sent up if head or body has trainable
    parameters, and down if the head has. Without a body only adapters are transferred.

    Args:
        head: The head.
        body: The body.
        tail: The tail.
        load: Steps and tokens of the round.
        settings: Dtypes and kinds of the transferred tensors.

    Example:
        Two steps with 100 tokens in total, D = 8, one trainable tensor of 40 bytes in each part. Each of the four
        transfers has 100 · 8 · 4 = 3200 bytes. Scalars: 8 bytes per step and 16 per round up, 4 bytes per step down.

        >>> part = PartCost(num_layers=1, adapter_bytes=40, num_adapter_tensors=1)
        >>> found = traffic(part, part, part, RoundLoad(2, 100), TrafficSettings(8, clips_gradients=True))
        >>> found.hidden_bytes, found.gradient_bytes, found.adapter_bytes
        (6400, 6400, 160)
        >>> found.scalar_up_bytes, found.scalar_down_bytes
        (32, 8)
    """
    is_cut = body.num_layers > 0
    num_tokens = load.num_tokens + load.measured_tokens
    hidden = crossing_bytes(num_tokens, settings.hidden_size, settings.hidden_dtype) if is_cut else 0
    gradient = crossing_bytes(load.num_tokens, settings.hidden_size, settings.gradient_dtype) if is_cut else 0
    norms = _NORM_BYTES * body.num_adapter_tensors if is_cut and settings.clips_gradients else 0
    step = _STEP_BYTES + (_RATE_BYTES if settings.clips_gradients and settings.has_local_terms else 0)
    own = head.adapter_bytes + tail.adapter_bytes
    adapter = own if settings.exchanges_adapters else 0
    report = (_REPORT_BYTES if settings.exchanges_adapters else 0) + _LOSS_BYTES * load.num_losses
    return Traffic(
        hidden_up_bytes=hidden,
        hidden_down_bytes=hidden,
        gradient_up_bytes=gradient if head.num_adapter_tensors or body.num_adapter_tensors else 0,
        gradient_down_bytes=gradient if head.num_adapter_tensors else 0,
        adapter_up_bytes=adapter,
        adapter_down_bytes=adapter + own * load.num_received,
        scalar_up_bytes=(step * load.num_steps if is_cut else 0) + report,
        scalar_down_bytes=norms * load.num_steps,
    )


def checkpoint_bytes(whole: PartCost, num_clients: int, num_rows: int | None = None) -> int:
    """Maximum size of one checkpoint: current, best and best-per-client adapters, and all optimiser states.

    Args:
        whole: The whole model.
        num_clients: C.
        num_rows: Adapters that are trained, such as one for all clients; ``None`` for one a client.

    Example:
        Three clients, one tensor of 40 bytes: 3 · (3 · 40) for adapters and 3 · (2 · 40 + 4) for optimiser states.

        >>> checkpoint_bytes(PartCost(adapter_bytes=40, num_adapter_tensors=1), num_clients=3)
        612
    """
    rows = num_clients if num_rows is None else num_rows
    return whole.adapter_bytes * (2 * rows + num_clients) + whole.optimizer_bytes * rows


def human_bytes(num_bytes: float) -> str:
    """Format bytes with three significant digits and units of powers of 1000.

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
    """Floating point operations of a forward and backward pass.

    In the backward pass, the gradient of a matrix product with respect to its input costs as much as the product, and
    so does the gradient with respect to its weight, if the weight is trained. The products of LoRA are a few per cent
    of the frozen ones and are counted as frozen. Recomputation for activation checkpointing is not counted.

    Args:
        forward_flops: Operations of the forward pass.
        trains_all: Whether all weights are trained, instead of a low-rank adapter.

    Example:
        >>> training_flops(10.0, trains_all=False), training_flops(10.0, trains_all=True)
        (20.0, 30.0)
    """
    return forward_flops * (3 if trains_all else 2)
