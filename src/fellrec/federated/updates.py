"""What an aggregation rule sees of a round; see ``fellrec.federated.records``.

Shape letters: N clients of the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.federated.jobs import not_finite
from fellrec.federated.secure_sum import SecureSum
from fellrec.functional.stacks import AdapterStack, LazyStack, as_lazy, first_row
from fellrec.types import Adapter


@dataclass(frozen=True)
class LoraLayer:
    """A layer that LoRA adapts: ``scale * B @ A`` is added to its weight ``[out, in]``.

    Attributes:
        a: Name of the parameter A, ``[rank, in]``.
        b: Name of the parameter B, ``[out, rank]``.
        weight: Name of the frozen weight.
        scale: α / rank.
        is_transposed: Whether the frozen weight is stored as ``[in, out]``, as in GPT-2's Conv1D.
    """

    a: str
    b: str
    weight: str
    scale: float
    is_transposed: bool = False

    def base_change(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """``left @ right`` ``[out, in]`` as an entry of ``Aggregated.base``; see there.

        Args:
            left: ``[out, R]``; the scale is not applied here.
            right: ``[R, in]``.

        Example:
            >>> layer = LoraLayer("a", "b", "w", 2.0, is_transposed=True)
            >>> {name: list(t.shape) for name, t in layer.base_change(torch.ones(3, 1), torch.ones(1, 2)).items()}
            {'w|left': [2, 1], 'w|right': [1, 3]}
        """
        if self.is_transposed:
            left, right = right.T.contiguous(), left.T.contiguous()
        return {f"{self.weight}|left": left, f"{self.weight}|right": right}


@dataclass(frozen=True)
class Updates:
    """What an aggregation rule sees of a round; row ``n`` of everything belongs to ``clients[n]``.

    Attributes:
        clients: Rows of the population, ascending, N of them.
        start: Adapters that the clients received, name → ``[N, *shape]``; only parameters that are exchanged.
        end: Adapters after local training, as in ``start``.
        losses: ``[N]`` float64, the local losses of METHOD (2).
        num_samples: ``[N]`` float64, training targets per client.
        start_losses: ``[N]`` float64, losses at the received adapters; ``None`` unless the rule asks for them.
        start_rounds: Round in which each client received its adapter.
        tensors: Tensors of the clients that the rule reads (``client_tensors``), by name: name → parameter →
            ``[N, *shape]``.
        start_tensors: The same before local training; zeros for clients that had none.
        num_steps: ``[N]`` float64, optimiser steps that clients took in this round.
        num_clients: C, clients of the population; 0 if it is not known.
        layers: Layers that LoRA adapts; none with ``adapter=full``.
        model: The server's model now, which the clients received, or with an asynchronous rule earlier versions of it;
            also parameters that are not trained in this round, and of all ranks; name → ``[*shape]``. Empty where
            clients have models of their own.
        ranks: ``[N]`` integers, LoRA ranks of the clients, beyond which their factors are 0; ``None`` if all have the
            same.
        root: What the server made of its model on the public users, by the same local training; name → ``[*shape]``.
            Empty unless the population is `SharedAndRoot`.
    """

    clients: tuple[int, ...]
    start: AdapterStack
    end: AdapterStack
    losses: Tensor
    num_samples: Tensor
    start_losses: Tensor | None = None
    start_rounds: tuple[int, ...] = ()
    tensors: Mapping[str, AdapterStack] = field(default_factory=dict)
    start_tensors: Mapping[str, AdapterStack] = field(default_factory=dict)
    num_steps: Tensor | None = None
    num_clients: int = 0
    layers: tuple[LoraLayer, ...] = ()
    model: Adapter = field(default_factory=dict)
    ranks: Tensor | None = None
    root: Adapter = field(default_factory=dict)

    def staleness(self, round_index: int) -> Tensor:
        """``[N]`` int64, rounds since each client received its start; 0 for all where that is not known."""
        starts = self.start_rounds or (round_index,) * len(self.clients)
        return round_index - torch.tensor(starts)

    def check_finite(self, round_index: int) -> None:
        """Refuse adapters, and tensors of clients, with infinite or undefined entries.

        Raises:
            TrainingError: Naming the parameter, the client and the round.
        """
        for stack in (self.end, *self.tensors.values()):
            _check_finite(as_lazy(stack), self.clients, round_index)

    def weighted_sums(self, weights: Tensor) -> dict[str, Tensor]:
        """``sum over n of weights[n] * end[n]`` for each parameter: all that a rule may read that sees sums only.

        Args:
            weights: ``[N]`` floats.

        Returns:
            Name → tensor of the parameter's own shape and type, computed in float64.
        """
        if secure := _secure(self.end):
            return self.like_adapters(secure.total(weights, of_updates=False))
        end, wide = _visible(self.end), weights.double()
        return {name: _joined(end, name, lambda _, block: wide @ block.double()) for name in end}

    def moved(self, weights: Tensor, model: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """``model + sum over n of weights[n] * (end[n] - start[n])``.

        Args:
            weights: ``[N]`` floats, with any sum.
            model: What is moved; ``None`` for the clients' common start.

        Returns:
            As `weighted_sums`.
        """
        if secure := _secure(self.end):
            before, total = self._model_before(model), secure.total(weights, of_updates=True)
            return self.like_adapters({name: before[name] + total[name] for name in total})
        start, end, wide = _visible(self.start), _visible(self.end), weights.double()

        def block_of(name: str, columns: slice, block: Tensor) -> Tensor:
            """Some columns of the result, float64."""
            origin = start.block(name, columns).double()
            return _model_block(model, start, name, columns) + wide @ (block.double() - origin)

        return {name: _joined(end, name, partial(block_of, name)) for name in end}

    def mixed(self, weights: Tensor, model: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """``(1 - sum of weights) * model + sum over n of weights[n] * end[n]``.

        Args:
            weights: ``[N]`` floats.
            model: As for `moved`.

        Returns:
            As `weighted_sums`.
        """
        if secure := _secure(self.end):
            kept, total = 1 - float(weights.sum()), secure.total(weights, of_updates=False)
            model_before = self._model_before(model)
            return self.like_adapters({name: kept * model_before[name] + total[name] for name in total})
        start, end, wide = _visible(self.start), _visible(self.end), weights.double()

        def block_of(name: str, columns: slice, block: Tensor) -> Tensor:
            """Some columns of the result, float64."""
            before = _model_block(model, start, name, columns)
            return before + wide @ (block.double() - before)

        return {name: _joined(end, name, partial(block_of, name)) for name in end}

    def mean_update(self, rule: str, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The common start, and the weighted sum of updates, for a rule with one model.

        Args:
            rule: Name of the rule.
            weights: ``[N]`` floats, which sum to 1 for a mean.

        Returns:
            Two mappings name → tensor of the parameter's shape, both float64.

        Raises:
            TrainingError: See `check_common_start`.
        """
        self.check_common_start(rule)
        if secure := _secure(self.end):
            return self._model_before(None), secure.total(weights, of_updates=True)
        start, end, wide = _visible(self.start), _visible(self.end), weights.double()
        first = {name: start[name][0].double() for name in end}
        mean = {name: torch.zeros(start.shapes[name], dtype=torch.float64) for name in end}
        for name in end:
            flat = mean[name].view(-1)
            for columns, block in end.blocks(name):
                flat[columns] = wide @ (block.double() - start.block(name, columns).double()).cpu()
        return first, mean

    def _model_before(self, model: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The exchanged part of a model, or the first start, float64."""
        start = _visible(self.start)
        return {name: (start[name][0] if model is None else model[name]).double().cpu() for name in start}

    def like_adapters(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One adapter's tensors in the types of the clients' own."""
        end = _visible(self.end)
        like = {name: end.block(name, slice(0, 1)) if name in end.shapes else self.model[name] for name in adapter}
        return {name: tensor.to(like[name].dtype) for name, tensor in adapter.items()}

    def check_common_start(self, rule: str) -> None:
        """Refuse clients that started the round with different adapters.

        Args:
            rule: Name of the rule that assumes one common start.

        Raises:
            TrainingError: Naming the rule, a parameter and the clients.
        """
        try:
            first_row(_visible(self.start))
        except ValueError as error:
            raise TrainingError(
                f"aggregation {rule} needs clients that start a round with the same adapter, but {error} differs "
                f"between clients {list(self.clients)}"
            ) from None


class SumsOnly(Mapping[str, Tensor]):
    """Adapters of which only weighted sums may be read, see ``Updates.weighted_sums``.

    Args:
        stack: The adapters.
        rule: Name of the rule, for the error message.
        secure: Computes sums where the server has no single adapter; ``None`` where it has.
    """

    def __init__(self, stack: AdapterStack, rule: str, secure: SecureSum | None = None) -> None:
        self.hidden = as_lazy(stack)
        self.rule = rule
        self.secure = secure

    def __getitem__(self, name: str) -> Tensor:
        """Refuse.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError(
            f"aggregation {self.rule} declares sees='sums' and reads single adapters; use updates.weighted_sums"
        )

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.hidden)

    def __len__(self) -> int:
        return len(self.hidden)


def _check_finite(stack: LazyStack, clients: Sequence[int], round_index: int) -> None:
    for name in stack:
        finite = torch.ones(stack.num_rows, dtype=torch.bool)
        for _, block in stack.blocks(name):
            if not bool(block.sum().isfinite()):  # faster than to look at every entry
                finite &= block.isfinite().all(dim=1).cpu()
        if not bool(finite.all()):
            client = clients[int(finite.logical_not().nonzero()[0])]
            raise TrainingError(not_finite(name, f"client {client}", round_index))


def _secure(stack: AdapterStack) -> SecureSum | None:
    """What computes sums instead of the server, if anything."""
    return stack.secure if isinstance(stack, SumsOnly) else None


def _visible(stack: AdapterStack) -> LazyStack:
    """A stack for sums, which may be hidden from the rule."""
    return stack.hidden if isinstance(stack, SumsOnly) else as_lazy(stack)


def _model_block(model: Mapping[str, Tensor] | None, start: LazyStack, name: str, columns: slice) -> Tensor:
    """Entries of a model, or of the first start, float64."""
    block = start.block(name, columns)
    found = block[0] if model is None else model[name].reshape(-1)[columns]
    return found.to(block.device).double()


def _joined(stack: LazyStack, name: str, row_of: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """One tensor of a parameter's shape and type, from a row of values for each block of columns."""
    rows = [row_of(columns, block).to(block.dtype) for columns, block in stack.blocks(name)]
    return torch.cat(rows).reshape(stack.shapes[name]) if rows else torch.empty(stack.shapes[name])
