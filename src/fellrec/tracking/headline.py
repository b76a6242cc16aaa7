"""Which metrics MLflow gets: the few that runs are compared by, or all.

A name is ``GROUP/METRIC/FIGURE``. Figures of single clients end with the client, as ``val/ndcg_at_10/client/03``.
MLflow draws a section for all names that differ in their last part only, so one has all clients of one metric. It sorts
sections by name: ``test`` comes first, then ``train`` with everything that is measured in a round, then ``val``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = r"\d{2,}"
_OF_BOTH = "mean|pooled|std|coefficient_of_variation|worst"
_OF_TEST = "worst_10_percent|gini"
_OF_SECOND = "mean|pooled"
_SECOND = {"ndcg": "recall", "mrr": "recall"}
"""What is shown beside a metric. With one target a user, the hit rate equals recall."""
_COSTS = (
    "round_seconds|round_bytes|evaluation_bytes|client/weight_bytes|client/weight_share|run/\\w+|process/\\w+"
    "|(?:client|server)/(?:busy_rate|peak_bytes)"
)
_OURS = re.compile(
    rf"(?:val|test)/(?:\w+_at_\d+/|(?:cold_\w+|groups)/|num_\w+$)|(?:train|aggregation)/\w+/client/{_NUMBER}$|cost/"
)
"""Names among which a selection is made; all others are logged, such as those of a rule or callback of the user's."""


_OF_ROUNDS = ("aggregation/", "cost/", "participation/", "profile/")


def logged_name(name: str) -> str:
    """The name of a metric in MLflow.

    Example:
        >>> logged_name("aggregation/drift"), logged_name("val/ndcg_at_10/mean")
        ('train/aggregation/drift', 'val/ndcg_at_10/mean')
    """
    return f"train/{name}" if name.startswith(_OF_ROUNDS) else name


def client_name(metric: str, client: int) -> str:
    """The name of a figure of one client.

    Example:
        >>> client_name("val/ndcg_at_10", 3)
        'val/ndcg_at_10/client/03'
    """
    return f"{metric}/client/{client:02d}"


def headline(metric: str) -> Callable[[str], bool]:
    """Whether a name is one of the few that runs are compared by.

    Three figures of each client are: of validation, of the test, and the loss.

    Args:
        metric: ``trainer.metric``.

    Example:
        >>> is_shown = headline("ndcg_at_10")
        >>> [is_shown(f"val/{name}") for name in ("ndcg_at_10/mean", "ndcg_at_10/variance", "ndcg_at_5/mean")]
        [True, False, False]
        >>> [is_shown(f"{name}/client/03") for name in ("train/loss", "train/seconds", "test/ndcg_at_10")]
        [True, False, True]
        >>> is_shown("mine/anything"), is_shown("cost/round_bytes"), is_shown("cost/train/messages")
        (True, True, False)
    """
    name, _, cutoff = metric.rpartition("_at_")
    second = f"{_SECOND.get(name, 'ndcg')}_at_{cutoff}"
    shown = re.compile(
        rf"(?:val|test)/(?:{metric}/(?:{_OF_BOTH}|client/{_NUMBER})|{second}/(?:{_OF_SECOND})|sampled_\d+_{metric}/mean)"
        rf"|test/(?:{metric}/(?:{_OF_TEST})|cold_\w+/{metric}/pooled|groups/.+/{metric}/(?:std|worst))"
        rf"|train/loss/client/{_NUMBER}|cost/(?:{_COSTS})"
    )
    return lambda key: shown.fullmatch(key) is not None or _OURS.match(key) is None
