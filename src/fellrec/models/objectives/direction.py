"""What may be read of a text: a token of a causal model has seen what is before it, one of an encoder everything."""

from __future__ import annotations

from fellrec.errors import ConfigError


def reading(is_causal: bool, order: str | None, pooling: str | None) -> tuple[str, str]:
    """Order and pooling of the retrieval objective, where they are left open those of the backbone.

    Args:
        is_causal: Whether the backbone is; else it is a bidirectional encoder.
        order: ``objective.order``.
        pooling: ``objective.pooling``.

    Returns:
        Order and pooling.

    Raises:
        ConfigError: If the target could be seen by what predicts it, or what is read has not seen the history.

    Example:
        >>> reading(True, None, None), reading(False, None, "mean")
        (('oldest_first', 'last'), ('newest_first', 'mean'))
    """
    if is_causal:
        if pooling == "first":
            raise ConfigError(
                "objective.pooling=first is not allowed with a causal backbone, whose first token sees no other; "
                "choose from: last, mean"
            )
        return order or "oldest_first", pooling or "last"
    if order == "oldest_first":
        raise ConfigError(
            "objective.order=oldest_first is not allowed with an encoder as backbone: it sees both directions, so "
            "every position would see its own target; choose from: newest_first"
        )
    if pooling == "last":
        raise ConfigError(
            "objective.pooling=last is not allowed with an encoder as backbone, whose last token stands for no more "
            "than any other; choose from: first, mean"
        )
    return order or "newest_first", pooling or "first"
