"""Weights, adapters, activations and compute of each part, counted on a model without weights."""

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
        model: The cut model, before an adapter is attached.
        adapter: What is trained.
        objective: Local loss.
        batch: One micro-batch; the activations are those of its shape.

    Returns:
        ``head``, ``body`` and ``tail``.
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
    """What one part's forward pass left behind.

    Attributes:
        flops: Floating point operations.
        storages: Memory that the backward pass needs, parameters and buffers left out; each once.
    """

    flops: int = 0
    storages: dict[StorageWeakRef, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def saved_bytes(self) -> int:
        """Bytes of ``storages``."""
        return sum(storage.nbytes() for storage in self.storages.values())


def trace(model: SplitModel, objective: Objective, batch: Mapping[str, Tensor]) -> dict[str, Trace]:
    """Run the forward pass of one training step, part by part, and note what each part keeps for its backward pass.

    On a model without weights nothing is computed and nothing allocated. The parts are detached from each other, as
    they are on two machines: what crosses a cut is kept on both sides if both need it.

    Args:
        model: The cut model with its adapter.
        objective: Local loss; it belongs to the tail.
        batch: One micro-batch.
    """
    device = next(model.model.parameters()).device
    with torch.random.fork_rng(devices=[]), model.streams.using(StreamPosition(0)):
        batch = drawn(objective, dict(batch), model.streams)  # numbers, which a model without weights has none of
    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
    traces: dict[str, Trace] = defaultdict(Trace)
    fixed = {StorageWeakRef(tensor.untyped_storage()) for tensor in _fixed_tensors(model.model)}
    was_training = model.training
    model.train()
    attention = FusedAttention() if device.type == "meta" else torch.enable_grad()
    with attention, torch.random.fork_rng(devices=[]), model.streams.using(StreamPosition(0)):
        if isinstance(objective, PreparesSteps):
            objective.prepare_step(model, 0, 0)  # what it keeps is there in a step, and made without gradients
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
    """The hidden state on the other side of a cut: a leaf of its own that asks for a gradient if one is needed."""
    if not hidden_BLD.is_floating_point():
        return hidden_BLD
    return hidden_BLD.detach().requires_grad_(hidden_BLD.requires_grad)


@contextmanager
def _tracing(found: Trace, fixed: set[StorageWeakRef]) -> Iterator[None]:
    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in fixed:
            found.storages[key] = storage  # kept alive: a freed storage's identity would be given to another

    def never(packed: None) -> Tensor:
        raise AssertionError("a traced forward pass has no backward pass")

    with torch.autograd.graph.saved_tensors_hooks(keep, never), FlopCounterMode(display=False) as counter:
        yield
    found.flops += counter.get_total_flops()


class FusedAttention(TorchFunctionMode):
    """Lets attention on the ``meta`` device keep what it keeps where training runs.

    For ``meta`` PyTorch chooses the mathematical fallback, which keeps two L x L matrices per head. The fused kernels
    that run on GPUs, and on CPUs for plain causal attention, keep their inputs, their output and one float32 per
    query. Which of them runs does not matter: this is what all of them keep.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].device.type == "meta":
            # Transformers asks data whether rows are packed or padded. Batches are neither: they get no mask, and
            # what little an encoder keeps for the mask of padding is left out.
            return True
        if func is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            mask = rest[0] if rest else kwargs.get("attn_mask")
            return _Fused.apply(query, key, value, mask)
        if func in _ABOUT_GLOBAL_TOKENS and len(args) == 1 and args[0].device.type == "meta":
            return _ABOUT_GLOBAL_TOKENS[func](*args)
        return func(*args, **kwargs)


_ABOUT_GLOBAL_TOKENS: dict[Any, Callable[..., Any]] = {
    Tensor.item: lambda tensor: True,
    Tensor.max: lambda tensor: 1,
    Tensor.nonzero: lambda tensor: tensor.new_zeros(tensor.dim(), len(tensor), dtype=torch.long).unbind(),
}
"""A Longformer asks data whether there are global tokens, how many a row at most, and where: one a row, the first."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries ``[B, H, L, E]``, keys and values ``[B, H or fewer, L, E]``."""
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, dim=1).transpose(-2, -1)
        scores @ value.repeat_interleave(groups, dim=1)  # for the count of operations
        batch, heads, length, _ = query.shape
        # Laid out as the kernels do, so that merging the heads makes no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums, *(() if mask is None else (mask,)))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Nothing has a backward pass here."""
        raise AssertionError("a traced forward pass has no backward pass")
