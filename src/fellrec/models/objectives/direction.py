"""History order and pooling that are valid for causal models and for bidirectional encoders."""

from __future__ import annotations

from fellrec.errors import ConfigError


def order_and_pooling(is_causal: bool, order: str | None, pooling: str | None) -> tuple[str, str]:
    """Order and pooling of the retrieval objective, with the backbone's defaults for ``None``.

    Args:
        is_causal: Whether the backbone is causal; else it is a bidirectional encoder.
        order: ``objective.order``.
        pooling: ``objective.pooling``.

    Returns:
        Order and pooling.

    Raises:
        ConfigError: If a target would be in the input that predicts it, or the pooled token does not attend to the
            history.

    Example:
        >>> order_and_pooling(True, None, None), order_and_pooling(False, None, "mean")
        (('oldest_first', 'last'), ('newest_first', 'mean'))
    """
    if is_causal:
        if pooling == "first":
            raise ConfigError(
                "objective.pooling=first is not allowed with a causal backbone, whose first token attends to no other "
                "token; choose from: last, mean"
            )
        return order or "oldest_first", pooling or "last"
    if order == "oldest_first":
        raise ConfigError(
            "objective.order=oldest_first is not allowed with an encoder as backbone: its attention is bidirectional, "
            "so every position would attend to its own target; choose from: newest_first"
        )
    if pooling == "last":
        raise ConfigError(
            "objective.pooling=last is not allowed with an encoder as backbone, whose last token does not represent "
            "the text; choose from: first, mean"
        )
    return order or "newest_first", pooling or "first"
