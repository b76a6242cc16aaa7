"""Ratings and labels as numbers, and what to know of those that are not."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from fellrec.errors import shorten


def to_ratings(column: pd.Series) -> pd.Series:
    """Numbers as floats, and true and false as 1 and 0; NaN for anything else."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    if numbers.isna().any():
        words = column.fillna("").str.strip().str.lower()
        numbers = numbers.mask(words == "true", 1.0).mask(words == "false", 0.0)
    return numbers


def about_words(ratings: pd.Series) -> Iterator[str]:
    """How many values of a column are words, one sentence, if there are any."""
    is_word = to_ratings(ratings).isna() & (ratings.fillna("").str.strip() != "")
    if is_word.any():
        example = shorten(repr(ratings[is_word].iloc[0]), 40)
        yield f"{some_of(is_word)} interactions have no number in the column {ratings.name}, such as {example}"


def some_of(chosen: pd.Series) -> str:
    """How many are chosen, such as ``3 of 1,200``."""
    return f"{int(chosen.sum()):,} of {len(chosen):,}"
