"""What MLflow prints beside the output of a command."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """While this lasts, MLflow logs errors only: neither that it creates tables nor what it checks in a model.

    MLflow must be imported before: its import sets the level of its logger.
    """
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
