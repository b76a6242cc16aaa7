"""What a ranker that writes titles tells of them: one row of numbers per user, and the figures of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

REPORTED = ("is_title", "is_empty", "text")


def report_texts(texts: Sequence[str], titles: Collection[str]) -> Tensor:
    """Whether each text is a title, whether it is empty, and a number that is the same for equal texts.

    Args:
        texts: B texts that were written, one per user.
        titles: Of the catalogue.

    Returns:
        ``[B, 3]`` float64, columns as in `REPORTED`. The number is a hash of 52 bits, which float64 holds exactly.
    """
    rows = [(float(text in titles), float(not text), float(_number(text))) for text in texts]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(texts), len(REPORTED))


def generation_figures(reported: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures of all texts of an evaluation.

    Args:
        reported: Columns of `report_texts` by name, ``[U]`` each.

    Returns:
        ``generation/in_catalogue_rate`` and ``generation/empty_rate``, shares of the texts; and
        ``generation/duplicate_rate``, the share of texts that somebody else's text makes superfluous: 1 − distinct
        texts / texts. It is 0 if everybody got another text.
    """
    texts = reported["text"]
    return {
        "generation/in_catalogue_rate": float(reported["is_title"].mean()),
        "generation/empty_rate": float(reported["is_empty"].mean()),
        "generation/duplicate_rate": 1 - len(texts.unique()) / len(texts),
    }


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 12
