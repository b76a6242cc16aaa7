"""What crossed between clients and server: bytes and messages by client, round, phase, direction and kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fellrec.cut.messages import ClientMessage, Message
from fellrec.state.files import make_folder, read_checked, write_checked

KINDS = ("adapter", "hidden_state", "gradient", "scalar")
_PART = "ledger_"
_COLUMNS = ("client", "round", "phase", "direction", "kind")


class Ledger:
    """Books every message that passes the transport.

    Bytes are those of the payload (tensors and scalars). A frame of constant size per message, which only processes
    need that do not share memory, is not counted; the number of messages is. A run's past rounds are in files:
    thousands of clients over hundreds of rounds would fill the memory.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(client=0, round_index=2, phase="train", direction="up", kind="scalar", num_bytes=16)
        >>> ledger.total(direction="up")
        16
    """

    def __init__(self) -> None:
        self._bytes: Counter[tuple[int, int, str, str, str]] = Counter()
        self._messages: Counter[tuple[int, int, str, str, str]] = Counter()
        self._parts: list[Path] = []

    def book(self, message: Message) -> None:
        """Book a message about a client; what the experiment itself asks (``Done``, ``Mixed``, …) is not counted."""
        if isinstance(message, ClientMessage):
            direction = "up" if message.to_server else "down"
            for kind, num_bytes in message.sizes().items():
                self.add(message.client, message.round_index, message.phase, direction, kind, num_bytes)

    def add(self, client: int, round_index: int, phase: str, direction: str, kind: str, num_bytes: int) -> None:
        """Book one payload."""
        key = (client, round_index, phase, direction, kind)
        self._bytes[key] += num_bytes
        self._messages[key] += 1

    def merge(self, rows: Iterable[Iterable[Any]]) -> None:
        """Take over the rows of another process's ledger."""
        for *key, messages, num_bytes in rows:
            self._bytes[tuple(key)] += num_bytes
            self._messages[tuple(key)] += messages

    def rows(self) -> list[list[Any]]:
        """Plain rows: client, round, phase, direction, kind, messages, bytes; sorted."""
        whole = self._with_parts()
        return [[*key, whole._messages[key], whole._bytes[key]] for key in sorted(whole._bytes)]

    def take(self) -> list[list[Any]]:
        """``rows``, and forget them."""
        rows = self.rows()
        self.__init__()  # type: ignore[misc]
        return rows

    def archive(self, folder: Path, number: int) -> None:
        """Move what was booked so far out of memory into ``folder/ledger_<number>.json``.

        Raises:
            StorageError: If it cannot be written.
        """
        path = folder / f"{_PART}{number:05d}.json"
        make_folder(folder)
        write_checked(path, [[*key, self._messages[key], self._bytes[key]] for key in sorted(self._bytes)])
        self._parts.append(path)
        self._bytes.clear()
        self._messages.clear()

    def reopen(self, folder: Path, number: int) -> None:
        """Go on after the part ``number`` of those in ``folder``; what was booked after it is booked again.

        Raises:
            CheckpointError: If a part is damaged.
        """
        self.__init__()  # type: ignore[misc]
        self._parts = [p for p in sorted(folder.glob(f"{_PART}*.json")) if p.stem <= f"{_PART}{number:05d}"]
        for path in self._parts:
            read_checked(path)

    def total(self, **where: Any) -> int:
        """Bytes of all rows with the given client, round, phase, direction or kind."""
        return self._sum(self._with_parts()._bytes, where)

    def num_messages(self, **where: Any) -> int:
        """Payloads of all rows with the given client, round, phase, direction or kind."""
        return self._sum(self._with_parts()._messages, where)

    def frame(self) -> pd.DataFrame:
        """All rows as a table."""
        return pd.DataFrame(self.rows(), columns=[*_COLUMNS, "messages", "bytes"])

    def metrics(self, round_index: int) -> dict[str, float]:
        """Figures for MLflow of a round that is not archived yet, such as ``cost/train/up_bytes``."""
        figures: defaultdict[str, float] = defaultdict(float)
        for (_, round_, phase, direction, kind), num_bytes in self._bytes.items():
            if round_ == round_index:
                figures[f"cost/{phase}/{direction}_bytes"] += num_bytes
                figures[f"cost/{phase}/{kind}_bytes"] += num_bytes
        for (_, round_, phase, *_rest), messages in self._messages.items():
            if round_ == round_index:
                figures[f"cost/{phase}/messages"] += messages
        return dict(figures)

    def _with_parts(self) -> Ledger:
        """All of it, in memory."""
        if not self._parts:
            return self
        whole = Ledger()
        for path in self._parts:
            whole.merge(read_checked(path))
        whole.merge([*key, self._messages[key], count] for key, count in self._bytes.items())
        return whole

    @staticmethod
    def _sum(counter: Counter[tuple[int, int, str, str, str]], where: dict[str, Any]) -> int:
        wanted = [(_COLUMNS.index(name), value) for name, value in where.items()]
        return sum(count for key, count in counter.items() if all(key[at] == value for at, value in wanted))
