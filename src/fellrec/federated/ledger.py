"""What crossed between clients and server: bytes and messages by client, round, phase, direction and kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from fellrec.state.tensor_store import StoredTensors

KINDS = ("adapter", "hidden_state", "gradient", "scalar", "masked", "key")
"""Stored by their place: new ones come last."""
PHASES = ("train", "val", "test")
DIRECTIONS = ("up", "down")
_COLUMNS = ("client", "round", "phase", "direction", "kind")
_CODES = {"phase": PHASES, "direction": DIRECTIONS, "kind": KINDS}

Key = tuple[int, int, str, str, str]


class Ledger:
    """Records every payload that passes between clients and server.

    Bytes are those of the payload (tensors and scalars). A header of constant size per message, which only processes
    need that do not share memory, is not counted; the number of messages is. Past rounds of a run are moved to files:
    thousands of clients over hundreds of rounds would fill the memory.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(client=0, round_index=2, phase="train", direction="up", kind="scalar", num_bytes=16)
        >>> ledger.total(direction="up")
        16
    """

    def __init__(self) -> None:
        self._bytes: Counter[Key] = Counter()
        self._messages: Counter[Key] = Counter()
        self._parts: list[StoredTensors] = []

    def add(self, client: int, round_index: int, phase: str, direction: str, kind: str, num_bytes: int) -> None:
        """Record one payload."""
        key = (client, round_index, phase, direction, kind)
        self._bytes[key] += num_bytes
        self._messages[key] += 1

    def merge(self, rows: Iterable[Iterable[Any]]) -> None:
        """Add the rows of another process's ledger."""
        for *key, messages, num_bytes in rows:
            self._bytes[tuple(key)] += num_bytes
            self._messages[tuple(key)] += messages

    def rows(self) -> list[list[Any]]:
        """Plain rows: client, round, phase, direction, kind, messages, bytes; sorted."""
        whole = Ledger()
        for part in self._parts:
            whole.merge(_decode(part))
        whole.merge(self._recent())
        return whole._recent()

    def rows_of(self, client: int, round_index: int) -> tuple[tuple[Any, ...], ...]:
        """Rows of a client's training in the current round."""
        return tuple(tuple(row) for row in self._recent() if row[:3] == [client, round_index, "train"])

    def forget(self, client: int, round_index: int) -> None:
        """Drop what was recorded of a training in the current round: the server's own, which sends nothing."""
        for key in [key for key in self._bytes if key[:3] == (client, round_index, "train")]:
            del self._bytes[key], self._messages[key]

    def take(self) -> list[list[Any]]:
        """``rows``, which are removed here."""
        rows = self.rows()
        self.__init__()  # type: ignore[misc]
        return rows

    def total(self, **where: Any) -> int:
        """Bytes of all rows with the given client, round, phase, direction or kind."""
        return self._sum(-1, where)

    def num_messages(self, **where: Any) -> int:
        """Payloads of all rows with the given client, round, phase, direction or kind."""
        return self._sum(-2, where)

    def frame(self) -> pd.DataFrame:
        """All rows as a table."""
        return pd.DataFrame(self.rows(), columns=[*_COLUMNS, "messages", "bytes"])

    def metrics(self, round_index: int, arrived: Collection[tuple[int, int]] = ()) -> dict[str, float]:
        """Figures of a round for MLflow, such as ``cost/train/up_bytes``; before the round is moved to a file.

        Args:
            round_index: The round.
            arrived: Clients, each with the earlier round that its training began in, whose updates arrived in this one.
        """
        figures: defaultdict[str, float] = defaultdict(float)

        def belongs(client: int, round_: int, phase: str) -> bool:
            """Whether an entry counts in the round: training counts where its update arrives."""
            return round_ == round_index or (phase == "train" and (client, round_) in arrived)

        for (client, round_, phase, direction, kind), num_bytes in self._bytes.items():
            if belongs(client, round_, phase):
                figures[f"cost/{phase}/{direction}_bytes"] += num_bytes
                figures[f"cost/{phase}/{kind}_bytes"] += num_bytes
        for (client, round_, phase, *_rest), messages in self._messages.items():
            if belongs(client, round_, phase):
                figures[f"cost/{phase}/messages"] += messages
        return dict(figures)

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``; what was recorded since the last call becomes a part of its own, out of memory.

        A part joins those before it until the last has twice its rows. So there are few: N rounds have log2(N) files.
        """
        self._parts = [StoredTensors(path=p.path, checksum=p.checksum) if p.path else p for p in self._parts]
        if self._bytes:
            rows = _encode(self._recent())
            while self._parts and len(last := self._parts[-1].tensors()["rows"]) < 2 * len(rows):
                rows = torch.cat([last, rows])
                self._parts.pop()
            self._parts.append(StoredTensors({"rows": rows}))
            self._bytes.clear()
            self._messages.clear()
        return {"parts": self._parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``."""
        self.__init__()  # type: ignore[misc]
        self._parts = list(state["parts"])

    def _recent(self) -> list[list[Any]]:
        return [[*key, self._messages[key], self._bytes[key]] for key in sorted(self._bytes)]

    def _sum(self, column: int, where: Mapping[str, Any]) -> int:
        wanted = [(_COLUMNS.index(name), value) for name, value in where.items()]
        return sum(row[column] for row in self.rows() if all(row[at] == value for at, value in wanted))


def check_rows(rows: Iterable[Sequence[Any]]) -> bool:
    """Whether rows are such as `Ledger.rows` gives."""
    return all(len(row) == len(_COLUMNS) + 2 and all(map(_fits, [*_COLUMNS, "messages", "bytes"], row)) for row in rows)


def _fits(column: str, value: Any) -> bool:
    return value in _CODES[column] if column in _CODES else isinstance(value, int) and value >= -1


def _encode(rows: list[list[Any]]) -> torch.Tensor:
    """``[R, 7]`` int64."""
    plain = [
        [_CODES[name].index(value) if name in _CODES else value for name, value in zip(_COLUMNS, row)] + row[5:]
        for row in rows
    ]
    return torch.tensor(plain, dtype=torch.int64)


def _decode(part: StoredTensors) -> Iterable[list[Any]]:
    for row in part.tensors()["rows"].tolist():
        yield [_CODES[n][v] if n in _CODES else v for n, v in zip(_COLUMNS, row)] + row[5:]
