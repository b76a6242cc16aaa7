"""Federated LLM-based recommendation: FELLRec on PyTorch Lightning.

In a notebook::

    import fellrec

    config = fellrec.compose(["aggregation=fedavg", "trainer.num_rounds=3"])
    run = fellrec.build(config)
    result = run.execute()
    result.evaluation.summary["ndcg_at_10/mean"], run.run_dir
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fellrec.aggregation.base import AggregationCallback
    from fellrec.config.compose import compose
    from fellrec.experiment.run import build, run
    from fellrec.federated.callback import FederatedCallback

__version__ = "0.1.0"

__all__ = ["AggregationCallback", "FederatedCallback", "__version__", "build", "compose", "run"]

_HOMES = {
    "AggregationCallback": "fellrec.aggregation.base",
    "FederatedCallback": "fellrec.federated.callback",
    "build": "fellrec.experiment.run",
    "compose": "fellrec.config.compose",
    "run": "fellrec.experiment.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line must start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fellrec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
