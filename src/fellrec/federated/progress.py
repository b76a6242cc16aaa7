"""How far a run is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fellrec.federated.records import Failed


class Progress:
    """The next round, and the clients that did not finish a round.

    Attributes:
        round_index: The next round, from 0.
        failed_clients: Round → clients that did not finish it, because they failed or dropped out; keys are text, as
            in JSON.
    """

    def __init__(self) -> None:
        self.round_index = 0
        self.failed_clients: dict[str, list[int]] = {}

    def finish(self, round_index: int, failed: Sequence[Failed], dropped: Sequence[int] = ()) -> None:
        """A round is trained and aggregated."""
        self.round_index = round_index + 1
        if failed or dropped:
            self.failed_clients[str(round_index)] = sorted({*(outcome.job.client for outcome in failed), *dropped})

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        return {"round_index": self.round_index, "failed_clients": self.failed_clients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``."""
        self.round_index, self.failed_clients = state["round_index"], dict(state["failed_clients"])
