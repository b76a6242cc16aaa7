"""Leak checks: raise an error if training or evaluation input contains held-out targets. They cannot be disabled.

The checks compare interactions by their position in the user's history, not by item: a user who interacts with an item
twice may have it in training and in test. Their cost is linear in the size of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from fellrec.errors import ConfigError, LeakError

_SAMPLE = 64
"""Number of users whose prompts are compared."""


def check_holdout(data: PreparedData) -> None:
    """Check that training, validation and test interactions, concatenated in this order, are each user's history.

    Raises:
        LeakError: If an interaction is duplicated, missing or out of order. Gives counts, a user and an item.
    """
    _check_order(data, (data.train, data.valid), data.test, "training, validation and test")
    lengths = data.train.lengths + data.valid.lengths + data.test.lengths
    lost = np.where(data.client_of_user >= 0, data.histories.lengths - lengths, 0)
    if lost.any():
        user = int(np.flatnonzero(lost)[0])
        item = int(data.histories.row(user)[lengths[user]])
        raise LeakError(
            f"{int(lost.sum())} interactions of {int((lost > 0).sum())} users are missing from training, validation "
            f"and test, so they would not be masked; first: item {_item(data, item)} of user {_user(data, user)}"
        )


def check_catalogues(data: PreparedData) -> None:
    """Check that all interactions of a federation's users are with items of their own catalogue.

    Raises:
        LeakError: If not, or if a user belongs to a client of another catalogue. Gives a user and an item.
    """
    places = data.places
    member_of_user = np.repeat(np.arange(len(places)), np.diff(places.users))
    for part in (data.histories, data.train, data.valid, data.test):
        member_of_item = np.searchsorted(places.items, part.values, side="right") - 1
        wrong = np.flatnonzero(member_of_item != member_of_user[part.row_index])
        if len(wrong):
            item, user = part.values[wrong[0]], part.row_index[wrong[0]]
            raise LeakError(
                f"{len(wrong)} interactions are with items of another catalogue than that of the user's client; first: "
                f"item {_item(data, item)} of user {_user(data, user)}"
            )
    private = data.client_of_user >= 0
    member_of_client = np.searchsorted(places.clients, data.client_of_user, side="right") - 1
    strange = np.flatnonzero(private & (member_of_client != member_of_user))
    if len(strange):
        raise LeakError(
            f"{len(strange)} users belong to clients with another catalogue; first: user {_user(data, strange[0])} of "
            f"client {data.client_of_user[strange[0]]}"
        )


def check_view(data: PreparedData, stage: str, seen: Sequence[Ragged], targets: Ragged) -> None:
    """Check that an evaluation's input followed by its targets is a prefix of each user's history.

    Then no target is in the input, and every earlier item is masked.

    Args:
        data: The prepared data.
        stage: ``"val"`` or ``"test"``.
        seen: Parts of the input, oldest first.
        targets: Targets of the stage.

    Raises:
        LeakError: If it is not. Gives counts, a user and an item.
    """
    _check_order(data, seen, targets, f"input and targets of stage {stage!r}")


def check_batch(batch: Mapping[str, Tensor], num_items: int) -> None:
    """Check that no target is masked, that all items of the histories are, and that all are in the catalogue.

    Prepared data contain each item at most once per user (`fellrec.data.clean.clean`), so the two do not conflict; with
    repeats (``PreparedData.ranks_seen``) no item is masked.

    Args:
        batch: From ``FellrecDataModule.eval_loader``.
        num_items: I, of the catalogue that the batch's users are ranked on.

    Raises:
        LeakError: If the check fails. Gives counts, a user index and an item index.
    """
    histories, users = batch["histories"], batch["users"]
    for name, least in (("histories", -1), ("target_items", 0), ("masked_items", 0)):
        if ((batch[name] < least) | (batch[name] >= num_items)).any():
            raise LeakError(f"a batch has {name} that are not in the catalogue of {num_items} items of its first user")
    masked = torch.zeros(len(users), num_items, dtype=torch.bool, device=histories.device)
    masked[batch["masked_rows"], batch["masked_items"]] = True
    hidden = masked[batch["target_rows"], batch["target_items"]]
    if hidden.any():
        first = int(hidden.nonzero()[0])
        user, item = int(users[batch["target_rows"][first]]), int(batch["target_items"][first])
        raise LeakError(f"{int(hidden.sum())} targets are masked as seen items; first: item {item} of user {user}")
    open_ = (histories >= 0) & ~masked.gather(1, histories.clamp(min=0))
    if open_.any() and not bool(batch["ranks_seen"].any()):
        row, column = open_.nonzero()[0].tolist()
        raise LeakError(
            f"{int(open_.sum())} items of the histories are not masked and could be recommended again; "
            f"first: item {int(histories[row, column])} of user {int(users[row])}"
        )


def check_selection(stage: str) -> None:
    """Check that adapter selection and early stopping use the validation stage.

    Raises:
        LeakError: For an evaluation of another stage.
    """
    if stage != "val":
        raise LeakError(f"stage {stage!r} must not be used for adapter selection or early stopping; use 'val'")


def check_prompts(objective: Any, data: PreparedData) -> None:
    """Check that an objective's prompts are equal in training and inference, token by token, for a sample of users.

    Args:
        objective: The objective. The check is skipped if it has no ``prompts``, or if its batches do not contain the
            positions of the targets (``rows``, ``columns``).
        data: Source of the histories.

    Raises:
        ConfigError: If prompts differ. Gives their number and a user.
    """
    if not hasattr(objective, "prompts"):
        return
    users = np.flatnonzero((data.client_of_user >= 0) & (data.train.lengths > 1))[:_SAMPLE]
    items = torch.from_numpy(data.train.take(users).last(data.max_history + 1))
    is_target = torch.arange(items.shape[1]) == (items >= 0).sum(dim=1, keepdim=True) - 1
    batch = objective.collate(items, is_target)
    if not {"input_ids", "rows", "columns"} <= batch.keys():
        return
    ids, lengths = objective.prompts(items.masked_fill(is_target, -1))
    # The first token of a title is predicted at the last position of the prompt.
    ends = torch.full_like(lengths, ids.shape[1] + 1).scatter_reduce(0, batch["rows"], batch["columns"] + 1, "amin")
    width = min(ids.shape[1], batch["input_ids"].shape[1])
    inside = torch.arange(width) < lengths[:, None]
    differ = ((ids[:, :width] != batch["input_ids"][:, :width]) & inside).any(dim=1) | (ends != lengths)
    if differ.any():
        user = int(users[int(differ.nonzero()[0])])
        raise ConfigError(
            f"the objective's prompts for training and inference differ for {int(differ.sum())} of {len(users)} "
            f"checked users; first: user {_user(data, user)}"
        )


def check_template(recorded: Mapping[str, str | None], now: Mapping[str, str], where: str) -> None:
    """Check that a run is resumed or evaluated with the prompt template of its training.

    Args:
        recorded: Objective metadata recorded by the run, see ``Objective.metadata``; empty for runs of older versions.
        now: Metadata of the current objective.
        where: Path of the run, for the error message.

    Raises:
        ConfigError: If the templates differ.
    """
    known = {name: value for name, value in recorded.items() if value is not None}
    if known and known != dict(now):
        version = "prompt_template"
        hint = "; a changed text needs a new version" if known.get(version) == now.get(version) else ""
        raise ConfigError(
            f"{where} was trained with prompt template {known.get(version)} ({known.get('prompt_sha256')}), but the "
            f"current template is {now.get(version)} ({now.get('prompt_sha256')}){hint}"
        )


def _check_order(data: PreparedData, earlier: Sequence[Ragged], targets: Ragged, what: str) -> None:
    """Check that the parts and targets, concatenated, are a prefix of each user's history."""
    parts = (*earlier, targets)
    start, wrong = np.zeros(len(data.histories), dtype=np.int64), []
    for part in parts:
        wrong.append(_differs(part, start, data.histories))
        start = start + part.lengths
    is_wrong = np.concatenate(wrong)
    if not is_wrong.any():
        return
    rows = np.concatenate([part.row_index for part in parts])[is_wrong]
    items = np.concatenate([part.values for part in parts])[is_wrong]
    raise LeakError(
        f"{len(rows)} interactions of {len(np.unique(rows))} users in {what} are duplicated or not in the order of the "
        f"history; first: item {_item(data, items[0])} of user {_user(data, rows[0])}"
    )


def _differs(part: Ragged, start: NDArray[np.int64], histories: Ragged) -> NDArray[np.bool_]:
    """``[total]`` bool: values of a part that differ from the histories at positions ``start`` onwards."""
    rows = part.row_index
    position = start[rows] + part.positions
    inside = position < histories.lengths[rows]
    expected = np.full(len(rows), -1, dtype=np.int64)
    expected[inside] = histories.values[(histories.offsets[:-1][rows] + position)[inside]]
    return expected != part.values


def _user(data: PreparedData, user: int) -> str:
    return repr(str(data.users["user_id"].iloc[user]))


def _item(data: PreparedData, item: int) -> str:
    return repr(str(data.catalogue.item_ids[item]))
