"""Batches of rows of similar length."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fellrec.data.batching import length_grouped_batches, length_groups
from fellrec.data.datamodule import FellrecDataModule
from fellrec.data.holdout import LeaveOneOut
from fellrec.data.partition import RandomPartition
from fellrec.data.prepare import prepare
from fellrec.data.readers import SyntheticReader
from fellrec.data.settings import DataSettings
from fellrec.functional.rng import derive_seed

LENGTHS = torch.randint(20, 200, (1003,), generator=torch.Generator().manual_seed(1))


def batches_of(seed: int, batch_size: int = 16, window_batches: int = 50) -> list[list[int]]:
    return length_grouped_batches(LENGTHS, batch_size, torch.Generator().manual_seed(seed), window_batches)


def padded(batches: list[list[int]]) -> int:
    return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)


@pytest.mark.parametrize("window_batches", [1, 3, 50])
def test_every_row_is_in_one_batch_and_all_but_one_are_full(window_batches: int) -> None:
    batches = batches_of(0, window_batches=window_batches)
    assert sorted(row for batch in batches for row in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [1003 % 16, *[16] * (1003 // 16)]


def test_the_order_is_random_and_determined_by_the_seed() -> None:
    assert batches_of(3) == batches_of(3)
    assert batches_of(3) != batches_of(4)
    assert length_grouped_batches(torch.empty(0, dtype=torch.long), 4, torch.Generator()) == []
    first, second = ({frozenset(batch) for batch in batches_of(seed)} for seed in (3, 4))
    assert len(first & second) == 0, "batches differ between epochs"
    means = torch.tensor([float(LENGTHS[batch].float().mean()) for batch in batches_of(3)])
    trend = torch.corrcoef(torch.stack([means, torch.arange(len(means)).float()]))[0, 1]
    assert abs(float(trend)) < 0.4, "short and long batches alternate: |r| < 0.4 in 99.9 % of random orders of 63"


def test_one_window_over_all_rows_has_the_padding_of_sorted_rows() -> None:
    """Batches of sorted rows have the minimum number of padded tokens (exchange argument)."""
    best = padded([batch.tolist() for batch in LENGTHS.argsort(stable=True).split(16)])
    shuffled = padded([batch.tolist() for batch in torch.randperm(1003).split(16)])
    assert padded(batches_of(0, window_batches=1000)) == best
    assert best < padded(batches_of(0, window_batches=10)) < shuffled
    assert padded(batches_of(0, window_batches=1)) > 0.9 * shuffled, "a window of one batch only shuffles"


def test_an_epoch_has_each_row_of_the_client_once() -> None:
    reader = SyntheticReader(num_users=60, num_items=50, mean_length=10)
    data = prepare(reader, DataSettings("synthetic", root=None), LeaveOneOut(), RandomPartition(num_clients=2), None)

    def collate(items: torch.Tensor, is_target: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"items": items, "lengths": (items >= 0).sum(dim=1)}

    def rows(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
        return torch.cat([batch["items"] for batch in batches]).tolist()

    module = FellrecDataModule(
        data,
        collate,
        one_target_per_row=True,
        batch_size=8,
        eval_batch_size=8,
        lengths=lambda items, is_target: (items >= 0).sum(dim=1),
    )
    plain = FellrecDataModule(data, collate, one_target_per_row=True, batch_size=8, eval_batch_size=8)
    state = torch.get_rng_state()
    epochs = [list(module.train_loader(1, seed)) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not used"
    assert rows(epochs[0]) == rows(epochs[1])
    assert rows(epochs[0]) != rows(epochs[2])
    assert sorted(rows(epochs[0])) == sorted(rows(list(plain.train_loader(1, 5))))
    assert len(epochs[0]) == module.num_batches(1) == plain.num_batches(1)

    def width(batches: list[dict[str, torch.Tensor]]) -> int:
        return sum(len(batch["lengths"]) * int(batch["lengths"].max()) for batch in batches)

    assert width(epochs[0]) < width(list(plain.train_loader(1, 5)))

    for held_out, of_held_out in ((0.0, False), (0.3, False), (0.3, True)):
        by_length = list(plain.loss_loader(1, held_out, of_held_out))
        shuffled = list(plain.train_loader(1, 5, held_out, of_held_out))
        assert sorted(rows(by_length)) == sorted(rows(shuffled)), "the same rows"
        lengths = torch.cat([batch["lengths"] for batch in by_length])
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_lightnings_hook_has_the_order_of_the_first_federated_epoch_of_one_pooled_client() -> None:
    """The row order of client 0, round 0, epoch 0 has the seed (seed, "order", 0, 0, 0)."""
    reader = SyntheticReader(num_users=60, num_items=50, mean_length=10)
    data = prepare(reader, DataSettings("synthetic", root=None), LeaveOneOut(), RandomPartition(num_clients=1), None)
    module = FellrecDataModule(data, lambda items, is_target: {"items": items}, batch_size=8, eval_batch_size=8, seed=3)
    expected = module.train_loader(0, derive_seed(3, "order", 0, 0, 0))
    for batch, other in zip(module.train_dataloader(), expected, strict=True):
        assert torch.equal(batch["items"], other["items"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.sampled_from([1, 7, 25, 1000]))
def test_groups_divide_rows_where_most_padding_is_saved(numbers: list[int], least_saving: int) -> None:
    """Every way to divide the rows in two is tried: by brute force none saves more than the first division."""
    lengths = torch.tensor(numbers)
    groups = [rows.tolist() for rows in length_groups(lengths, least_saving)]
    assert sorted(row for rows in groups for row in rows) == list(range(len(numbers)))
    assert all(rows == sorted(rows) for rows in groups)

    def entries(rows: tuple[int, ...] | list[int]) -> int:
        return len(rows) * max(numbers[row] for row in rows) if rows else 0

    everything = range(len(numbers))
    saved = [
        entries(list(everything)) - entries(part) - entries([row for row in everything if row not in part])
        for size in range(1, len(numbers))
        for part in combinations(everything, size)
    ]
    best = max(saved, default=0)
    found = entries(list(everything)) - sum(map(entries, groups))
    assert found >= best if best >= least_saving else groups == [list(everything)]
    assert found >= (len(groups) - 1) * least_saving
