"""Federated LLM-based recommendation: FELLRec on PyTorch Lightning.

In a notebook::

    import fellrec

    result = fellrec.run(["aggregation=fedavg", "trainer.num_rounds=3"])
    comparison = fellrec.compare(["aggregation=fedavg,fellrec", "seed=0,1"])
    comparison.to_frame()
    fellrec.plot(comparison)

`docs/library.md` describes these and the parts that they are made of.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fellrec.aggregation.base import AggregationCallback
    from fellrec.config.compose import compose
    from fellrec.data.prepared import PreparedData
    from fellrec.errors import FellrecError
    from fellrec.experiment.build import Recommender, build_data, build_recommender
    from fellrec.experiment.run import Run, build
    from fellrec.federated.callback import FederatedCallback
    from fellrec.library import Plot, compare, plot, run
    from fellrec.report.comparison import Comparison, RuleResult
    from fellrec.types import Evaluation

__version__ = "0.1.0"

__all__ = [
    "AggregationCallback",
    "Comparison",
    "Evaluation",
    "FederatedCallback",
    "FellrecError",
    "Plot",
    "PreparedData",
    "Recommender",
    "RuleResult",
    "Run",
    "__version__",
    "build",
    "build_data",
    "build_recommender",
    "compare",
    "compose",
    "plot",
    "run",
]

_HOMES = {
    "AggregationCallback": "fellrec.aggregation.base",
    "Comparison": "fellrec.report.comparison",
    "Evaluation": "fellrec.types",
    "FederatedCallback": "fellrec.federated.callback",
    "FellrecError": "fellrec.errors",
    "Plot": "fellrec.library",
    "PreparedData": "fellrec.data.prepared",
    "Recommender": "fellrec.experiment.build",
    "RuleResult": "fellrec.report.comparison",
    "Run": "fellrec.experiment.run",
    "build": "fellrec.experiment.run",
    "build_data": "fellrec.experiment.build",
    "build_recommender": "fellrec.experiment.build",
    "compare": "fellrec.library",
    "compose": "fellrec.config.compose",
    "plot": "fellrec.library",
    "run": "fellrec.library",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line must start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fellrec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
