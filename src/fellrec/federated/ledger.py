"""What crossed between clients and server: bytes and messages by client, round, phase, direction and kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from fellrec.federated.messages import ClientMessage, Message

KINDS = ("adapter", "hidden_state", "gradient", "scalar")
_COLUMNS = ("client", "round", "phase", "direction", "kind")


class Ledger:
    """Books every message that passes the transport.

    Bytes are those of the payload (tensors and scalars). A frame of constant size per message, which only processes
    need that do not share memory, is not counted; the number of messages is.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(client=0, round_index=2, phase="train", direction="up", kind="scalar", num_bytes=16)
        >>> ledger.total(direction="up")
        16
    """

    def __init__(self) -> None:
        self._bytes: Counter[tuple[int, int, str, str, str]] = Counter()
        self._messages: Counter[tuple[int, int, str, str, str]] = Counter()

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
        return [[*key, self._messages[key], self._bytes[key]] for key in sorted(self._bytes)]

    def take(self) -> list[list[Any]]:
        """``rows``, and forget them."""
        rows = self.rows()
        self.__init__()  # type: ignore[misc]
        return rows

    def total(self, **where: Any) -> int:
        """Bytes of all rows with the given client, round, phase, direction or kind."""
        return self._sum(self._bytes, where)

    def num_messages(self, **where: Any) -> int:
        """Payloads of all rows with the given client, round, phase, direction or kind."""
        return self._sum(self._messages, where)

    def frame(self) -> pd.DataFrame:
        """All rows as a table."""
        return pd.DataFrame(self.rows(), columns=[*_COLUMNS, "messages", "bytes"])

    def metrics(self, round_index: int) -> dict[str, float]:
        """One round's figures for MLflow, such as ``cost/train/up_bytes`` and ``cost/train/hidden_state_bytes``."""
        figures: defaultdict[str, float] = defaultdict(float)
        for (_, round_, phase, direction, kind), num_bytes in self._bytes.items():
            if round_ == round_index:
                figures[f"cost/{phase}/{direction}_bytes"] += num_bytes
                figures[f"cost/{phase}/{kind}_bytes"] += num_bytes
        for (_, round_, phase, *_rest), messages in self._messages.items():
            if round_ == round_index:
                figures[f"cost/{phase}/messages"] += messages
        return dict(figures)

    @staticmethod
    def _sum(counter: Counter[tuple[int, int, str, str, str]], where: dict[str, Any]) -> int:
        wanted = [(_COLUMNS.index(name), value) for name, value in where.items()]
        return sum(count for key, count in counter.items() if all(key[at] == value for at, value in wanted))
