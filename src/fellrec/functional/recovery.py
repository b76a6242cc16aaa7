"""How much of a text an attacker has recovered: tokens, titles, ROUGE-L.

Shape letters: N positions, K guesses for each position, B texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def is_among_first(guesses_NK: Tensor, truth_N: Tensor, cutoff: int) -> Tensor:
    """Whether the truth is among the first guesses.

    Args:
        guesses_NK: ``[N, K]`` int64, the likeliest first.
        truth_N: ``[N]`` int64.
        cutoff: How many guesses count.

    Returns:
        ``[N]`` bool.

    Example:
        >>> is_among_first(torch.tensor([[5, 6], [7, 8]]), torch.tensor([6, 9]), 2).tolist()
        [True, False]
    """
    return (guesses_NK[:, :cutoff] == truth_N[:, None]).any(dim=1)


def all_of_each(is_right_N: Tensor, group_N: Tensor) -> Tensor:
    """For each group of positions, such as the tokens of a title, whether all of them are right.

    Args:
        is_right_N: ``[N]`` bool.
        group_N: ``[N]`` int64, from 0, none left out.

    Returns:
        ``[G]`` bool.

    Example:
        >>> all_of_each(torch.tensor([True, True, False]), torch.tensor([0, 0, 1])).tolist()
        [True, False]
    """
    wrong = torch.zeros(int(group_N.max()) + 1 if len(group_N) else 0, dtype=torch.long)
    wrong.index_add_(0, group_N, (~is_right_N).long())
    return wrong == 0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of words, by dynamic programming.

    Example:
        >>> longest_common_subsequence("police killed the gunman".split(), "police kill the gunman".split())
        3
    """
    lengths = np.zeros(len(second) + 1, dtype=np.int64)
    words = np.array(list(second), dtype=object)
    for word in first:
        extended = np.where(words == word, lengths[:-1] + 1, 0)
        lengths[1:] = np.maximum.accumulate(np.maximum(lengths[1:], extended))
    return int(lengths[-1])


def rouge_l(guess: str, truth: str) -> float:
    """ROUGE-L of a text: F1 of precision and recall of the longest common subsequence of words (Lin 2004).

    Args:
        guess: What was recovered.
        truth: What it should be.

    Returns:
        In [0, 1]; 0 if either has no words.

    Example:
        >>> rouge_l("police kill the gunman", "police killed the gunman")
        0.75
        >>> rouge_l("", "police")
        0.0
    """
    guessed, true = guess.split(), truth.split()
    common = longest_common_subsequence(guessed, true) if guessed and true else 0
    return 2 * common / (len(guessed) + len(true)) if common else 0.0
