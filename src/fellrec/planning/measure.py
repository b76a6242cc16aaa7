"""Counts weights, adapters, activations and FLOPs of head, body and tail, on a model without weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fellrec.functional.cost import PartCost
from fellrec.models.adapters import AdapterKind
from fellrec.models.module import Objective, PreparesSteps, drawn
from fellrec.models.remote import PARTS
from fellrec.models.split import SplitModel, bytes_of_parts
from fellrec.models.streams import StreamPosition


def measure_parts(
    model: SplitModel, adapter: AdapterKind, objective: Objective, batch: Mapping[str, Tensor]
) -> dict[str, PartCost]:
    """Attach the adapter to a model on the ``meta`` device and count each part.

    Args:
        model: The split model, before an adapter is attached.
        adapter: The adapter to attach.
        objective: The local loss.
        batch: One micro-batch; activations are counted for its shape.

    Returns:
        The costs of ``head``, ``body`` and ``tail``.
    """
    weights = bytes_of_parts(model, dict(model.model.named_parameters()))
    adapter.attach(model.model, model.arch, 0, model.part_of)
    with_adapter = bytes_of_parts(model, dict(model.model.named_parameters()))
    trainable = adapter.trainable(model.model)
    trained = bytes_of_parts(model, trainable)
    tensors = [model.part_of(name) for name in trainable]
    steps = trace(model, objective, batch)
    return {
        part: PartCost(
            num_layers=len(model.cut.layers(part)),
            weight_bytes=weights[part],
            adapter_bytes=trained[part],
            added_bytes=with_adapter[part] - weights[part],
            num_adapter_tensors=tensors.count(part),
            activation_bytes=steps[part].saved_bytes,
            forward_flops=steps[part].flops,
        )
        for part in PARTS
    }


@dataclass
class Trace:
    """Cost of the forward pass of one part.

    Attributes:
        flops: Floating point operations.
        storages: Storages that are saved for the backward pass, without parameters and buffers.
    """

    flops: int = 0
    storages: dict[StorageWeakRef, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def saved_bytes(self) -> int:
        """Total size of ``storages``, in bytes."""
        return sum(storage.nbytes() for storage in self.storages.values())


def trace(model: SplitModel, objective: Objective, batch: Mapping[str, Tensor]) -> dict[str, Trace]:
    """Run the forward pass of one training step and record the tensors that each part saves for its backward pass.

    On the ``meta`` device nothing is computed or allocated. The parts are detached from each other, as they are on two
    machines: a tensor that crosses a cut is saved on both sides if both need it.

    Args:
        model: The split model with its adapter.
        objective: The local loss; it belongs to the tail.
        batch: One micro-batch.
    """
    device = next(model.model.parameters()).device
    with torch.random.fork_rng(devices=[]), model.streams.using(StreamPosition(0)):
        batch = drawn(objective, dict(batch), model.streams)  # needs a device with real numbers, not meta
    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
    traces: dict[str, Trace] = defaultdict(Trace)
    fixed = {StorageWeakRef(tensor.untyped_storage()) for tensor in _fixed_tensors(model.model)}
    was_training = model.training
    model.train()
    attention = FusedAttention() if device.type == "meta" else torch.enable_grad()
    with attention, torch.random.fork_rng(devices=[]), model.streams.using(StreamPosition(0)):
        if isinstance(objective, PreparesSteps):
            objective.prepare_step(model, 0, 0)  # tensors cached for the step, computed without gradients
        hidden = []
        for ids in objective.inputs(on_device):
            hidden_BLD = ids
            for part in PARTS:
                if part == "body" and not model.cut.layers("body"):
                    continue
                with _tracing(traces[part], fixed):
                    run: Callable[[Tensor], Tensor] = getattr(model, part)
                    hidden_BLD = run(_received(hidden_BLD))
            hidden.append(hidden_BLD)
        with _tracing(traces["tail"], fixed):
            objective.loss_of(model, hidden, on_device)
    model.train(was_training)
    return {part: traces[part] for part in PARTS}


def _fixed_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _received(hidden_BLD: Tensor) -> Tensor:
    """The hidden state on the other side of a cut: a leaf that requires a gradient if the original does."""
    if not hidden_BLD.is_floating_point():
        return hidden_BLD
    return hidden_BLD.detach().requires_grad_(hidden_BLD.requires_grad)


@contextmanager
def _tracing(found: Trace, fixed: set[StorageWeakRef]) -> Iterator[None]:
    def keep(tensor: Tensor) -> None:
        """Record a tensor that is saved, unless it is a parameter or a buffer."""
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in fixed:
            found.storages[key] = storage  # keep it alive: the address of a freed storage would be reused

    def never(packed: None) -> Tensor:
        """Refuse to give a tensor back."""
        raise AssertionError("a traced forward pass has no backward pass")

    with torch.autograd.graph.saved_tensors_hooks(keep, never), FlopCounterMode(display=False) as counter:
        yield
    found.flops += counter.get_total_flops()


class FusedAttention(TorchFunctionMode):
    """Makes attention on the ``meta`` device save the same tensors as on the device of a run.

    On ``meta`` PyTorch uses the mathematical fallback, which saves two L x L matrices per head. The fused kernels that
    are used on GPUs, and on CPUs for plain causal attention, save their inputs, their output and one float32 per query.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].device.type == "meta":
            # transformers inspects data to find packed or padded rows. True means neither, so no mask is used; the
            # small tensors that an encoder saves for its padding mask are not counted.
            return True
        if func is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            mask = rest[0] if rest else kwargs.get("attn_mask")
            return _Fused.apply(query, key, value, mask)
        if func in _GLOBAL_TOKENS and len(args) == 1 and args[0].device.type == "meta":
            return _GLOBAL_TOKENS[func](*args)
        return func(*args, **kwargs)


_GLOBAL_TOKENS: dict[Any, Callable[..., Any]] = {
    Tensor.item: lambda tensor: True,
    Tensor.max: lambda tensor: 1,
    Tensor.nonzero: lambda tensor: tensor.new_zeros(tensor.dim(), len(tensor), dtype=torch.long).unbind(),
}
"""Answers for Longformer, which inspects data to find the global tokens: one per row, the first."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries ``[B, H, L, E]``, keys and values ``[B, H or fewer, L, E]``."""
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, dim=1).transpose(-2, -1)
        scores @ value.repeat_interleave(groups, dim=1)  # for the FLOP counter
        batch, heads, length, _ = query.shape
        # The memory layout of the kernels, so that merging the heads makes no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums, *(() if mask is None else (mask,)))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Never called."""
        raise AssertionError("a traced forward pass has no backward pass")
