"""Batches for training and evaluation, per client or pooled over all clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fellrec.data.batching import batches_in_order, length_grouped_batches, shuffled_batches
from fellrec.data.guards import check_catalogues, check_view
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.windows import TrainingRows, last_position_rows, windows
from fellrec.functional.rng import derive_seed
from fellrec.types import PUBLIC

_CACHED_CLIENTS = 128
"""Number of clients whose training rows are cached; the rows of other clients are rebuilt when requested."""
_MEASURED_USERS = 8192
"""Users whose histories are measured at once."""

Collate = Callable[[Tensor, Tensor], dict[str, Tensor]]
Lengths = Callable[[Tensor, Tensor], Tensor | None]
HistoryLengths = Callable[[Tensor], Tensor]


def _num_items(histories: Tensor) -> Tensor:
    return (histories >= 0).sum(dim=1)


class _Rows(Dataset[Any]):
    """Training rows, indexed by whole batches."""

    def __init__(self, items: Tensor, is_target: Tensor) -> None:
        self.items = items
        self.is_target = is_target

    @classmethod
    def of(cls, rows: TrainingRows) -> _Rows:
        """The rows as tensors."""
        return cls(torch.from_numpy(rows.items), torch.from_numpy(rows.is_target))

    def part(self, held_out: float, of_held_out: bool = False) -> _Rows:
        """These rows without a fraction of them, evenly spaced, or that fraction."""
        if not held_out and not of_held_out:
            return self
        counts = (torch.arange(len(self) + 1, dtype=torch.float64) * held_out + 1e-9).floor()
        index = (counts.diff() > 0) == of_held_out
        return _Rows(self.items[index], self.is_target[index])

    def relabelled(self, other_I: Tensor) -> _Rows:
        """These rows with another item in the place of each target."""
        return _Rows(torch.where(self.is_target, other_I[self.items.clamp(min=0)], self.items), self.is_target)

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        return self.items[index], self.is_target[index]


class _Users(Dataset[Any]):
    """Users to evaluate, indexed by whole batches. Their interactions are gathered per batch, not copied up front."""

    def __init__(
        self, data: PreparedData, stage: str, users: IntArray, history_lengths: HistoryLengths = _num_items
    ) -> None:
        self.users = users
        self.clients = data.client_of_user[users]
        self._seen = [data.train] if stage == "val" else [data.train, data.valid]
        self._targets = data.valid if stage == "val" else data.test
        self._max_history, self._ranks_seen = data.max_history, data.ranks_seen
        self._history_lengths = history_lengths
        self.members = torch.from_numpy(np.searchsorted(data.places.users, users, side="right") - 1)
        self._by_client = Ragged.from_pairs(self.clients, np.arange(len(users)), data.num_clients)
        check_view(data, stage, self._seen, self._targets)

    def __len__(self) -> int:
        return len(self.users)

    def of_clients(self, clients: Sequence[int]) -> IntArray:
        """Positions of the users of some clients, ascending."""
        return np.sort(self._by_client.take(np.array(clients, dtype=np.int64)).values)

    @cached_property
    def lengths(self) -> IntArray:
        """``[U]`` int64 number of tokens of each user's history."""
        parts = [np.empty(0, dtype=np.int64)]
        for first in range(0, len(self), _MEASURED_USERS):
            histories = self._seen_by(self.users[first : first + _MEASURED_USERS]).last(self._max_history)
            parts.append(self._history_lengths(torch.from_numpy(histories)).numpy())
        return np.concatenate(parts)

    def _seen_by(self, users: IntArray) -> Ragged:
        return reduce(Ragged.join, [part.take(users) for part in self._seen])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = np.asarray(indices)
        users = self.users[index]
        targets = self._targets.take(users).distinct()
        seen = self._seen_by(users)
        masked = Ragged.from_rows([[]] * len(users)) if self._ranks_seen else seen
        arrays = {
            "users": users,
            "clients": self.clients[index],
            "histories": seen.last(self._max_history),
            "target_rows": targets.row_index,
            "target_items": targets.values,
            "seen_rows": seen.row_index,
            "seen_items": seen.values,
            "masked_rows": masked.row_index,
            "masked_items": masked.values,
            "ranks_seen": np.full(1, self._ranks_seen),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def evaluated_users(data: PreparedData, stage: str) -> IntArray:
    """Indices of the clients' users that have a target and at least one earlier item, ascending."""
    targets = data.valid if stage == "val" else data.test
    seen = data.train.lengths if stage == "val" else data.train.lengths + data.valid.lengths
    return np.flatnonzero((data.client_of_user >= 0) & (targets.lengths > 0) & (seen > 0))


class FellrecDataModule(LightningDataModule):
    """Training rows and users to evaluate, per client or pooled over all clients.

    In a federation of data sets, a batch has rows of one of them.

    Lightning's hooks give the pooled data: ``Trainer().fit(module, datamodule)`` trains the centralised baseline.

    Args:
        data: The prepared data set.
        collate: Turns ``items [B, W + 1]`` and ``is_target [B, W + 1]`` into a batch (an objective's ``collate``).
        one_target_per_row: Whether a training row has one target (its last item) or one at every position.
        batch_size: Training rows per batch.
        eval_batch_size: Users per batch.
        seed: Seed of the row order of ``train_dataloader``.
        lengths: Returns the number of tokens ``[B]`` of the same rows (an objective's ``lengths``) to batch rows of
            similar length together, or ``None`` to only shuffle the rows.
        history_lengths: Returns the number of tokens ``[B]`` of the input for histories ``[B, H]``, by which users are
            batched; their number of items by default.
        relabelled: Clients whose training rows have other items as targets → ``[I]`` int64, the item that takes the
            place of each.

    Raises:
        LeakError: If the evaluation input contains a target, or lacks an interaction that precedes the targets, or a
            user has an item that is not in the catalogue of the user's client.
    """

    def __init__(
        self,
        data: PreparedData,
        collate: Collate,
        one_target_per_row: bool = False,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int = 0,
        lengths: Lengths = lambda items, is_target: None,
        history_lengths: HistoryLengths = _num_items,
        relabelled: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        check_catalogues(data)
        self.data = data
        self.collate = collate
        self.lengths = lengths
        self.history_lengths = history_lengths
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self._relabelled = relabelled
        self._make_rows = last_position_rows if one_target_per_row else windows
        self._users = {
            stage: _Users(data, stage, evaluated_users(data, stage), history_lengths) for stage in ("val", "test")
        }
        self._cache: OrderedDict[int | None, _Rows] = OrderedDict()

    def num_samples(self, client: int | None, held_out: float = 0.0) -> int:
        """Number of training targets of one client, of all for ``None``, of public users; see `train_loader`."""
        return int(self._rows(client).part(held_out).is_target.sum())

    def num_batches(self, client: int | None, held_out: float = 0.0) -> int:
        """Number of training batches per epoch, as `num_samples`."""
        rows = self._rows(client).part(held_out)
        return sum(-(-number // self.batch_size) for number in self._members(rows).bincount().tolist())

    def train_loader(
        self, client: int | None, seed: int, held_out: float = 0.0, of_held_out: bool = False
    ) -> DataLoader[Any]:
        """Shuffled training batches.

        Args:
            client: Whose; ``None`` for the pooled data of all clients, `PUBLIC` for those of the public users, which
                ``data.max_train_samples`` does not limit.
            seed: Of the order.
            held_out: Fraction of the client's rows that are left out, evenly spaced among them.
            of_held_out: Whether the batches are those of the rows that are left out instead.
        """
        return self._loader(self._rows(client).part(held_out, of_held_out), seed)

    def loss_loader(self, client: int | None, held_out: float = 0.0, of_held_out: bool = False) -> DataLoader[Any]:
        """The rows of `train_loader` by length, longest first: for sums over all of them, with little padding."""
        rows = self._rows(client).part(held_out, of_held_out)
        place = torch.arange(rows.items.shape[1])
        last = torch.where(rows.is_target, place, -1).amax(dim=1, keepdim=True)
        lengths = self.history_lengths(rows.items.masked_fill(place >= last, -1))
        order = lengths.argsort(descending=True, stable=True).tolist()
        collate, batches = self.collate, batches_in_order(order, self._members(rows), self.batch_size)
        return DataLoader(rows, batch_sampler=batches, collate_fn=lambda batch: collate(*batch))

    def longest_batch(self, client: int) -> dict[str, Tensor] | None:
        """The batch of a client's longest rows, ``None`` if batches are not grouped by length.

        No other batch has more padded tokens, so it gives the peak memory of training.
        """
        rows = self._rows(client)
        lengths = self.lengths(rows.items, rows.is_target)
        if lengths is None or not len(rows):
            return None
        longest = lengths.argsort(descending=True, stable=True)[: self.batch_size]
        return self.collate(rows.items[longest], rows.is_target[longest])

    def num_users(self, stage: str, clients: tuple[int, ...]) -> int:
        """Number of users of the given clients that are evaluated."""
        return len(self._users[stage].of_clients(clients))

    def input_lengths(self, stage: str) -> IntArray:
        """``[U]`` number of tokens of the input of each user who is evaluated, by which users are batched."""
        return self._users[stage].lengths

    def eval_loader(self, stage: str, clients: tuple[int, ...] | None = None) -> DataLoader[Any]:
        """Users of the given clients with their targets, by length of the history, longest first.

        Users of similar length are batched together, so that there is little padding.

        Args:
            stage: ``"val"`` or ``"test"``.
            clients: Whose users; ``None`` for all.
        """
        users = self._users[stage]
        which = np.arange(len(users)) if clients is None else users.of_clients(clients)
        order = which[np.argsort(-users.lengths[which], kind="stable")].tolist()
        batches = batches_in_order(order, users.members, self.eval_batch_size)
        return DataLoader(users, batch_sampler=batches, collate_fn=lambda batch: batch)

    def train_dataloader(self) -> DataLoader[Any]:
        """Lightning's hook: pooled training batches, in the order of one pooled client's first federated epoch."""
        return self.train_loader(None, derive_seed(self.seed, "order", 0, 0, 0))

    def val_dataloader(self) -> DataLoader[Any]:
        """Lightning's hook: all clients' users with their validation targets."""
        return self.eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Lightning's hook: all clients' users with their test targets."""
        return self.eval_loader("test")

    def _rows(self, client: int | None) -> _Rows:
        if client not in self._cache:
            owner = self.data.client_of_user
            users = np.flatnonzero(owner >= 0 if client is None else owner == client)
            targets = np.ones_like(self.data.train_targets) if client == PUBLIC else self.data.train_targets
            rows = _Rows.of(self._training_rows(users, targets))
            other = None if client is None else self._relabelled.get(client)
            self._cache[client] = rows if other is None else rows.relabelled(other)
            if len(self._cache) > _CACHED_CLIENTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(client)
        return self._cache[client]

    def _members(self, rows: _Rows) -> Tensor:
        """``[N]`` member of the federation that each row is of; 0 for one data set."""
        return self.data.places.of_items(rows.items[:, 0])

    def _training_rows(self, users: IntArray, is_target: np.ndarray) -> TrainingRows:
        flags = Ragged(is_target.view(np.int8), self.data.train.offsets).take(users)
        return self._make_rows(self.data.train.take(users), flags.values.astype(bool), self.data.max_history)

    def _loader(self, rows: _Rows, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        collate = self.collate
        lengths, members = self.lengths(rows.items, rows.is_target), self._members(rows)
        if len(rows) and bool((members != members[0]).any()):
            order: dict[str, Any] = {"batch_sampler": shuffled_batches(members, lengths, self.batch_size, generator)}
        elif lengths is None:
            order = {"batch_size": self.batch_size, "shuffle": True}
        else:
            order = {"batch_sampler": length_grouped_batches(lengths, self.batch_size, generator)}
        return DataLoader(rows, generator=generator, collate_fn=lambda batch: collate(*batch), **order)
