"""Refuses to go on where a model would be shown what it is validated or tested on. Nothing switches this off.

All checks compare interactions, which have a place in their user's own history, and not items: who uses an item twice
may find it in training and in the test. They are linear in what they look at.
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
"""Users whose prompts are compared."""


def check_holdout(data: PreparedData) -> None:
    """Training, validation and test interactions must be a user's history, cut in this order, nothing twice or lost.

    Raises:
        LeakError: If one of them is at another place than in the history. Names a user, an item and how many.
    """
    _check_order(data, (data.train, data.valid), data.test, "training, validation and test")
    lengths = data.train.lengths + data.valid.lengths + data.test.lengths
    lost = np.where(data.client_of_user >= 0, data.histories.lengths - lengths, 0)
    if lost.any():
        user = int(np.flatnonzero(lost)[0])
        item = int(data.histories.row(user)[lengths[user]])
        raise LeakError(
            f"{int((lost > 0).sum())} users have interactions that are in neither of training, validation and test, "
            f"{int(lost.sum())} in all: user {_user(data, user)} has lost item {_item(data, item)}, which would not be "
            "masked as known"
        )


def check_view(data: PreparedData, stage: str, seen: Sequence[Ragged], targets: Ragged) -> None:
    """What evaluation sees of a user, and then the targets, must be the beginning of the user's history.

    So no target is in the input, and every earlier item is known, and masked.

    Args:
        data: The prepared data.
        stage: ``"val"`` or ``"test"``.
        seen: Input, by parts, the oldest first.
        targets: Of the stage.

    Raises:
        LeakError: Naming a user, an item and how many.
    """
    _check_order(data, seen, targets, f"input and targets of stage {stage!r}")


def check_batch(batch: Mapping[str, Tensor], num_items: int) -> None:
    """No target may be masked, and all items of the history must be.

    A masked target could not be ranked. Data hold a user's item once (`fellrec.data.schema.clean`), so that none is
    both.

    Args:
        batch: From ``FellrecDataModule.eval_loader``.
        num_items: I.

    Raises:
        LeakError: Naming a user (by index), an item and how many.
    """
    histories, users = batch["histories"], batch["users"]
    masked = torch.zeros(len(users), num_items, dtype=torch.bool, device=histories.device)
    masked[batch["masked_rows"], batch["masked_items"]] = True
    hidden = masked[batch["target_rows"], batch["target_items"]]
    if hidden.any():
        first = int(hidden.nonzero()[0])
        user, item = int(users[batch["target_rows"][first]]), int(batch["target_items"][first])
        raise LeakError(
            f"{int(hidden.sum())} targets are among the items that their users have seen: item {item} of user {user}"
        )
    open_ = (histories >= 0) & ~masked.gather(1, histories.clamp(min=0))
    if open_.any():
        row, column = open_.nonzero()[0].tolist()
        raise LeakError(
            f"{int(open_.sum())} items that users have seen are not masked and could be recommended again: "
            f"item {int(histories[row, column])} of user {int(users[row])}"
        )


def check_selection(stage: str) -> None:
    """Selection of adapters and early stopping see the validation holdout only.

    Raises:
        LeakError: For an evaluation of another stage.
    """
    if stage != "val":
        raise LeakError(f"an evaluation of stage {stage!r} must not select adapters or stop a run; only 'val' may")


def check_prompts(objective: Any, data: PreparedData) -> None:
    """The prompt that an objective trains on must be, token by token, the one that it makes at inference.

    Args:
        objective: Those without ``prompts``, or whose batches do not say where targets are (``rows``, ``columns``),
            have nothing to compare.
        data: Whose users' histories are tried, a few.

    Raises:
        ConfigError: Naming a user and how many.
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
    # A title's first token is predicted from the prompt's last.
    ends = torch.full_like(lengths, ids.shape[1] + 1).scatter_reduce(0, batch["rows"], batch["columns"] + 1, "amin")
    width = min(ids.shape[1], batch["input_ids"].shape[1])
    inside = torch.arange(width) < lengths[:, None]
    differ = ((ids[:, :width] != batch["input_ids"][:, :width]) & inside).any(dim=1) | (ends != lengths)
    if differ.any():
        user = int(users[int(differ.nonzero()[0])])
        raise ConfigError(
            f"the objective's prompts for training and for inference differ for {int(differ.sum())} of {len(users)} "
            f"users that were tried, the first is user {_user(data, user)}"
        )


def check_template(recorded: Mapping[str, str | None], now: Mapping[str, str], where: str) -> None:
    """A run must go on, and be evaluated, with the prompt that it was trained with.

    Args:
        recorded: What the run has noted of its objective's texts, see ``Objective.facts``; a run of an older fellrec
            has noted nothing.
        now: The same of the objective that would be used.
        where: Names the run.

    Raises:
        ConfigError: If they differ.
    """
    known = {name: value for name, value in recorded.items() if value is not None}
    if known and known != dict(now):
        version = "prompt_template"
        hint = "; a changed text needs a new version" if known.get(version) == now.get(version) else ""
        raise ConfigError(
            f"{where} was trained with the prompt template {known.get(version)} ({known.get('prompt_sha256')}), "
            f"now it is {now.get(version)} ({now.get('prompt_sha256')}){hint}"
        )


def _check_order(data: PreparedData, earlier: Sequence[Ragged], targets: Ragged, what: str) -> None:
    """Parts and targets, one after the other, must be the beginning of each user's history."""
    parts = (*earlier, targets)
    start, wrong = np.zeros(len(data.histories), dtype=np.int64), []
    for part in parts:
        wrong.append(_is_elsewhere(part, start, data.histories))
        start = start + part.lengths
    count = sum(int(flags.sum()) for flags in wrong)
    if not count:
        return
    rows = np.concatenate([part.row_index for part in parts])
    items = np.concatenate([part.values for part in parts])
    bad = np.zeros(len(data.histories), dtype=bool)
    bad[rows[np.concatenate(wrong)]] = True
    repeated = _repeated(data, rows, items) & bad[rows]
    if repeated.any():
        first = int(np.flatnonzero(repeated)[0])
        count = len(np.unique(rows[repeated] * len(data.catalogue) + items[repeated]))
        problem = f"{count} interactions stand twice in {what}"
    else:
        first = int(np.flatnonzero(np.concatenate(wrong))[0])
        problem = f"{count} interactions of {what} are not where the history has them"
    where = f"the first is item {_item(data, items[first])} of user {_user(data, rows[first])}"
    raise LeakError(f"{problem}, in those of {int(bad.sum())} users; {where}")


def _is_elsewhere(part: Ragged, start: NDArray[np.int64], histories: Ragged) -> NDArray[np.bool_]:
    """Which of a part's values are not those of the histories from ``start`` on."""
    rows = part.row_index
    place = start[rows] + part.positions
    inside = place < histories.lengths[rows]
    found = np.full(len(rows), -1, dtype=np.int64)
    found[inside] = histories.values[(histories.offsets[:-1][rows] + place)[inside]]
    return found != part.values


def _repeated(data: PreparedData, rows: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs come once more than in the user's history; only looked at when something is wrong."""
    size = len(data.catalogue)
    pairs, inverse, counts = np.unique(rows * size + items, return_inverse=True, return_counts=True)
    known, known_counts = np.unique(data.histories.row_index * size + data.histories.values, return_counts=True)
    allowed = np.zeros(len(pairs), dtype=np.int64)
    shared = np.isin(pairs, known)
    allowed[shared] = known_counts[np.searchsorted(known, pairs[shared])]
    return (counts > allowed)[inverse]


def _user(data: PreparedData, user: int) -> str:
    return repr(str(data.users["user_id"].iloc[user]))


def _item(data: PreparedData, item: int) -> str:
    return repr(str(data.catalogue.item_ids[item]))
