"""What a callback logs by itself."""

from __future__ import annotations

from collections.abc import Mapping

from fellrec.federated.callback import Events, FederatedCallback
from fellrec.federated.records import FitStart


class Mine(FederatedCallback):
    def on_fit_start(self, fit: FitStart) -> None:
        self.log_metric("mine/start", 7)

    def on_round_start(self, round_index: int) -> None:
        self.log_metric("mine/round", round_index)
        self.log_metric("mine/round", round_index + 0.5)


def test_a_metric_has_its_round_and_is_known_by_its_place_in_it() -> None:
    """So a round that a resumed run repeats has the same keys, which the log takes once."""
    found: list[tuple[dict[str, float], int, str]] = []

    def log(metrics: Mapping[str, float], step: int, once: str) -> None:
        found.append((dict(metrics), step, once))

    events = Events([Mine()])
    events.log_metrics = log
    events.call("on_fit_start", FitStart(3, 1, 2))
    for _ in range(2):
        events.call("on_round_start", 1)
    assert found[0] == ({"mine/start": 7.0}, 1, "Mine mine/start 1")
    assert (
        found[1:3]
        == found[3:5]
        == [
            ({"mine/round": 1.0}, 1, "Mine mine/round 1"),
            ({"mine/round": 1.5}, 1, "Mine mine/round 2"),
        ]
    )


def test_without_a_log_nothing_happens() -> None:
    Events([Mine()]).call("on_round_start", 0)
