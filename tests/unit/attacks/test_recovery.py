"""Figures of recovery against brute force and hand-derived values."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch

from fellrec.functional.recovery import all_of_each, is_among_first, longest_common_subsequence, rouge_l


def brute_force(first: str, second: str) -> int:
    """The longest of all subsequences of the first that are subsequences of the second."""

    def is_subsequence(part: tuple[str, ...]) -> bool:
        left = iter(second)
        return all(letter in left for letter in part)

    return max(n for n in range(len(first) + 1) if any(is_subsequence(part) for part in combinations(first, n)))


def test_the_longest_common_subsequence_is_that_of_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(40):
        first, second = ("".join(draw.choices("abc", k=draw.randint(0, 7))) for _ in range(2))
        assert longest_common_subsequence(first, second) == brute_force(first, second)


@pytest.mark.parametrize(
    ("guess", "truth", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # the same
        ("a b", "a x b y z", 2 * 2 / (2 + 5)),  # precision 1, recall 2/5
        ("", "a", 0.0),
        ("a", "", 0.0),
    ],
)
def test_rouge_l_is_the_value_derived_by_hand(guess: str, truth: str, expected: float) -> None:
    assert rouge_l(guess, truth) == pytest.approx(expected)


def test_a_title_is_recovered_if_all_its_tokens_are() -> None:
    guesses = torch.tensor([[1, 9], [8, 2], [3, 9], [4, 9]])
    truth, title = torch.tensor([1, 2, 3, 5]), torch.tensor([0, 0, 1, 2])
    assert is_among_first(guesses, truth, 1).tolist() == [True, False, True, False]
    assert all_of_each(is_among_first(guesses, truth, 1), title).tolist() == [False, True, False]
    assert all_of_each(is_among_first(guesses, truth, 2), title).tolist() == [True, True, False]
