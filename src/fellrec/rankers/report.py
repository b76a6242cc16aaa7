"""Reports of rankers that generate titles: one row of numbers per user, and the metrics of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

REPORTED = ("is_title", "is_empty", "text")


def report_texts(texts: Sequence[str], titles: Collection[str]) -> Tensor:
    """Whether each text is a title, whether it is empty, and a hash of the text.

    Args:
        texts: B generated texts, one per user.
        titles: Titles of the catalogue.

    Returns:
        ``[B, 3]`` float64, columns as in `REPORTED`. The hash has 52 bits, which float64 represents exactly.
    """
    rows = [(float(text in titles), float(not text), float(_number(text))) for text in texts]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(texts), len(REPORTED))


def generation_figures(reported: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of all generated texts of an evaluation.

    Args:
        reported: Columns of `report_texts` by name, ``[U]`` each.

    Returns:
        ``generation/in_catalogue_rate``, the fraction of texts that are titles; ``generation/empty_rate``, the fraction
        of empty texts; and ``generation/duplicate_rate``, 1 − distinct texts / texts.
    """
    texts = reported["text"]
    return {
        "generation/in_catalogue_rate": float(reported["is_title"].mean()),
        "generation/empty_rate": float(reported["is_empty"].mean()),
        "generation/duplicate_rate": 1 - len(texts.unique()) / len(texts),
    }


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12
