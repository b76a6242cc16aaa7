"""A run's results per user, and their export to the formats of other evaluation tools."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fellrec.data.cold import ColdStart
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError, DataError, unknown
from fellrec.state.files import make_folder, private_files, write_atomically, write_parquet
from fellrec.state.run_folder import CONFIG, which_run
from fellrec.types import Evaluation

RANKINGS = "rankings.parquet"
TARGETS = "targets.parquet"

_BELOW_ZERO = 1e-300
"""Step below a score of 0, where some programs round neighbouring float64 to 0; far smaller than any other float32."""


def write_users(run_dir: Path, evaluation: Evaluation, data: PreparedData, cold: ColdStart) -> None:
    """Write ``users.parquet``, ``targets.parquet`` and ``rankings.parquet`` of an evaluation on the test split.

    Args:
        run_dir: Of the run.
        evaluation: Of the test split, with ``first_items``.
        data: The data set evaluated.
        cold: Its cold items and users.
    """
    users, first = evaluation.users.numpy(), evaluation.first_items
    assert first is not None, "rankings are kept at test time"
    user_ids, item_ids = data.users["user_id"].to_numpy(), np.array(data.catalogue.item_ids, dtype=object)
    clients, targets = evaluation.client_of_user.numpy(), data.test.take(users).distinct()
    has_cold_target = np.bincount(targets.row_index, weights=cold.items[targets.values], minlength=len(users)) > 0
    of_users = {
        "user_id": user_ids[users],
        "client": clients,
        "train_interactions": data.train.lengths[users],
        "is_cold": cold.users[users],
        "has_cold_target": has_cold_target,
        "is_tied": first.is_tied.numpy(),
        **{name: values.numpy() for name, values in evaluation.per_user.items()},
    }
    write_parquet(run_dir / "users.parquet", pd.DataFrame(of_users))
    row, item = targets.row_index, targets.values
    of_targets = {"user_id": user_ids[users[row]], "item_id": item_ids[item], "is_cold": cold.items[item]}
    write_parquet(run_dir / TARGETS, pd.DataFrame(of_targets))
    row, rank = np.nonzero(first.items.numpy() >= 0)
    item = first.items.numpy()[row, rank]
    of_ranks = {
        "user_id": user_ids[users[row]],
        "client": clients[row],
        "rank": rank,
        "item_id": item_ids[item],
        "score": first.scores.numpy()[row, rank],
    }
    write_parquet(run_dir / RANKINGS, pd.DataFrame(of_ranks))


def export(run_dir: Path, tool: str, folder: Path) -> list[Path]:
    """Write a run's rankings and targets in the format of another tool.

    The order is that of the metrics: tied scores are lowered by successive float64 steps, so that a tool that sorts by
    score finds the same order.

    Args:
        run_dir: Of a finished run.
        tool: One of `TOOLS`.
        folder: Target directory, created if absent. Files of the same names are replaced; only the user can read them.

    Returns:
        The files.

    Raises:
        ConfigError: If the tool is unknown or the directory has no rankings.
        DataError: If an id cannot be written in this format.
    """
    if tool not in TOOLS:
        raise ConfigError(unknown("format", tool, TOOLS))
    rankings = read_table_of_run(run_dir, RANKINGS, {"user_id": None, "item_id": None, "rank": "iu", "score": "f"})
    targets = read_table_of_run(run_dir, TARGETS, {"user_id": None, "item_id": None})
    if len(rankings) and not 0 <= rankings["rank"].min() <= rankings["rank"].max() < len(rankings):
        raise ConfigError(f"{run_dir / RANKINGS} is damaged: a rank is not one of the list's")
    rankings["user_id"], targets["user_id"] = rankings["user_id"].astype(str), targets["user_id"].astype(str)
    rankings["score"] = strictly_descending(rankings["score"].to_numpy(), rankings["rank"].to_numpy())
    files = TOOLS[tool](rankings, targets)
    with private_files():
        make_folder(folder)
        for name, content in files.items():
            write_atomically(folder / name, content)
    return [folder / name for name in files]


def read_table_of_run(run_dir: Path, name: str, columns: Mapping[str, str | None]) -> pd.DataFrame:
    """Read a table of a finished run.

    Args:
        run_dir: Of the run.
        name: The file.
        columns: The columns, with the kinds of NumPy's types that each may have; ``None`` for any.

    Raises:
        ConfigError: If it is absent, damaged or without these columns.
    """
    path = run_dir / name
    if not path.is_file():
        is_run = (run_dir / CONFIG).is_file()
        hint = "the run is not finished, or made with ~callbacks.outputs" if is_run else which_run(run_dir)
        raise ConfigError(f"{run_dir} has no {name}; {hint}")
    try:
        table = pd.read_parquet(path, columns=list(columns))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:  # pandas and pyarrow
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    for column, kinds in columns.items():
        if column not in table or (kinds is not None and table[column].dtype.kind not in kinds):
            raise ConfigError(f"{path} is damaged: it has no column {column} as runs write it")
    return table


def strictly_descending(scores: NDArray[np.float32], ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores without ties, in the same order.

    Args:
        scores: ``[n]`` float32, descending within a user.
        ranks: ``[n]`` rank of each in its user's list, ascending from 0.

    Returns:
        ``[n]`` float64: the k-th of a run of equal scores is k float64 steps lower; the first, and all that are not
        tied, keep their value. There are 2**29 float64 between neighbouring float32, so the order does not change.
        Below 0 the steps are 1e-300.

    Example:
        >>> found = strictly_descending(np.array([2.0, 1.0, 1.0, 1.0], dtype=np.float32), np.arange(4))
        >>> found[:2].tolist(), bool((np.diff(found) < 0).all()), found.astype(np.float32).tolist()
        ([2.0, 1.0], True, [2.0, 1.0, 1.0, 1.0])
    """
    position = np.arange(len(scores))
    begins = (ranks == 0) | np.r_[True, scores[1:] != scores[:-1]]
    begins[:1] = True
    behind = position - np.maximum.accumulate(np.where(begins, position, 0))
    bits = (scores.astype(np.float64) + 0.0).view(np.int64)
    top = np.int64(2**63 - 1)
    ordered = bits ^ ((bits >> 63) & top)  # integers in the order of the floats, see `functional.first_items`
    lowered = ordered - behind
    distinct = (lowered ^ ((lowered >> 63) & top)).view(np.float64)
    return np.where(scores == 0, -_BELOW_ZERO * behind, distinct)


def _ranx(rankings: pd.DataFrame, targets: pd.DataFrame) -> dict[str, bytes]:
    """``{user: {item: score}}`` and ``{user: {item: 1}}``, for ``ranx.Run.from_file`` and ``ranx.Qrels.from_file``."""
    relevance = targets.assign(score=1)
    return {"run.json": _nested(rankings), "qrels.json": _nested(relevance)}


def _trec(rankings: pd.DataFrame, targets: pd.DataFrame) -> dict[str, bytes]:
    """``user Q0 item rank score fellrec`` with ranks from 1, and ``user 0 item 1``."""
    for name in ("user_id", "item_id"):
        ids = pd.concat([rankings[name], targets[name]]).drop_duplicates()
        spaced = ids[ids.str.contains(r"\s", regex=True) | (ids == "")]
        if len(spaced):
            raise DataError(
                f"{name} {spaced.iloc[0]!r} is empty or contains white space, which TREC files do not allow"
            )
    run = pd.DataFrame(
        {
            "user": rankings["user_id"],
            "q0": "Q0",
            "item": rankings["item_id"],
            "rank": rankings["rank"] + 1,
            "score": rankings["score"],
            "tag": "fellrec",
        }
    )
    qrels = pd.DataFrame({"user": targets["user_id"], "zero": 0, "item": targets["item_id"], "relevance": 1})
    return {"run.trec": _lines(run), "qrels.trec": _lines(qrels)}


def _recbole(rankings: pd.DataFrame, targets: pd.DataFrame) -> dict[str, bytes]:
    """The input of RecBole's evaluator, see README; item 0 is RecBole's padding."""
    user_ids, user_of_target = np.unique(targets["user_id"], return_inverse=True)
    item_ids = np.unique(pd.concat([rankings["item_id"], targets["item_id"]]).to_numpy(dtype=str))
    row = pd.Index(user_ids).get_indexer(rankings["user_id"])
    rank, width = rankings["rank"].to_numpy(), int(rankings["rank"].max()) + 1
    items = np.zeros((len(user_ids), width), dtype=np.int64)
    items[row, rank] = pd.Index(item_ids).get_indexer(rankings["item_id"]) + 1
    wanted = pd.MultiIndex.from_frame(targets[["user_id", "item_id"]])
    hits = np.zeros_like(items)
    hits[row, rank] = pd.MultiIndex.from_frame(rankings[["user_id", "item_id"]]).isin(wanted)
    num_targets = np.bincount(user_of_target, minlength=len(user_ids))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        rec_topk=np.column_stack([hits, num_targets]),
        rec_items=items,
        user_ids=user_ids.astype(str),
        item_ids=np.concatenate([["[PAD]"], item_ids]),
    )
    return {"recbole.npz": buffer.getvalue()}


TOOLS: dict[str, Callable[[pd.DataFrame, pd.DataFrame], dict[str, bytes]]] = {
    "ranx": _ranx,
    "recbole": _recbole,
    "trec": _trec,
}
"""Writers by the name of the format: rankings and targets to file name → content."""


def _nested(frame: pd.DataFrame) -> bytes:
    """``{user: {item: score}}`` as JSON; a user's rows are adjacent. Joined from text, without a loop over users."""
    user, item = (frame[name].map(json.dumps) for name in ("user_id", "item_id"))
    is_first = (frame["user_id"] != frame["user_id"].shift()).to_numpy()
    opening = np.where(is_first, "},\n" + user + ": {", ", ")
    entries = opening + item + ": " + frame["score"].map(repr)
    return ("{" + "".join(entries).removeprefix("},") + "}}\n").encode()


def _lines(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(None, sep=" ", header=False, index=False, lineterminator="\n").encode()
