"""``trainer.select=frontier``: the best worst client among the rounds whose mean is near the best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import adapters, fake_loop, resumed
from hypothesis import given, settings
from hypothesis import strategies as st

from fellrec.federated.loop import FederatedLoop
from fellrec.metrics import summarise
from fellrec.types import Evaluation


def evaluation(values: list[float], round_index: int) -> Evaluation:
    """One user a client."""
    clients = torch.arange(len(values))
    return summarise({"ndcg_at_10": torch.tensor(values).double()}, clients, len(values), "val", round_index)


def selected(rounds: list[list[float]], floor: float = 0.9) -> FederatedLoop:
    """Rounds with these values of the clients; round r's adapters are all r."""
    loop = fake_loop(num_clients=len(rounds[0]), select="frontier", frontier_floor=floor)
    for round_index, values in enumerate(rounds):
        for row in range(len(values)):
            loop.population.bank.store(row, {name: torch.full((2,), float(round_index)) for name in ("a", "b")})
        loop.selection.update(evaluation(values, round_index))
    return loop


def served(loop: FederatedLoop) -> float:
    return float(loop.selection.served[0].tensors()["a"][0])


def test_the_best_worst_client_above_the_floor_is_selected() -> None:
    """Means 0.5, 0.48, 0.40: the third has the best worst client and is below 0.9 · 0.5."""
    loop = selected([[0.9, 0.1], [0.66, 0.30], [0.40, 0.40]])
    assert (loop.selection.round_index, served(loop)) == (1, 1.0)
    assert loop.selection.value == pytest.approx(0.48)
    assert selected([[0.9, 0.1], [0.66, 0.30], [0.40, 0.40]], floor=0.8).selection.round_index == 2
    assert selected([[0.9, 0.1], [0.66, 0.30], [0.40, 0.40]], floor=1.0).selection.round_index == 0


def test_a_higher_mean_later_raises_the_floor() -> None:
    loop = selected([[0.40, 0.40], [0.9, 0.1]])
    assert loop.selection.round_index == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=8),
    st.sampled_from([0.5, 0.8, 1.0]),
)
def test_it_is_what_a_look_back_over_all_rounds_would_select(numbers: list[list[int]], floor: float) -> None:
    rounds = [[number / 5 for number in values] for values in numbers]
    loop = selected(rounds, floor)
    figures = [(min(values), sum(values) / 2) for values in rounds]
    best = max(mean for _, mean in figures)
    expected = max((worst, mean) for worst, mean in figures if mean >= floor * best)
    assert figures[loop.selection.round_index] == expected
    assert served(loop) == loop.selection.round_index


def test_candidates_survive_a_resume(tmp_path: Path) -> None:
    """The first round is selected after the resume, because the second is not above the floor."""
    how = {"num_clients": 2, "select": "frontier", "frontier_floor": 0.9}
    first = selected([[0.9, 0.1], [0.66, 0.30]])
    other = resumed(first, tmp_path, **how)
    for loop in (first, other):
        loop.selection.update(evaluation([1.0, 0.05], 2))
        assert loop.selection.round_index == 1
    assert adapters(first) == adapters(other)
    assert len(other.selection.score_jobs()) == 2
