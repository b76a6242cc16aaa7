"""The aggregation callbacks, one rule per file; each is imported when it is used, so that settings need no PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fellrec.aggregation.settings import RULES

if TYPE_CHECKING:
    from fellrec.aggregation.base import AggregationCallback
    from fellrec.aggregation.centralized import Centralized
    from fellrec.aggregation.cfl import CFL
    from fellrec.aggregation.ditto import Ditto
    from fellrec.aggregation.fedamp import FedAMP
    from fellrec.aggregation.fedavg import FedAvg
    from fellrec.aggregation.fedavgm import FedAvgM
    from fellrec.aggregation.fednova import FedNova
    from fellrec.aggregation.fedopt import FedAdagrad, FedAdam, FedYogi
    from fellrec.aggregation.fedper import FedPer
    from fellrec.aggregation.fedprox import FedProx
    from fellrec.aggregation.fedrep import FedRep
    from fellrec.aggregation.fellrec import FELLRec
    from fellrec.aggregation.local import Local
    from fellrec.aggregation.persistence import Persistence
    from fellrec.aggregation.pfedme import PFedMe
    from fellrec.aggregation.scaffold import Scaffold
    from fellrec.aggregation.uniform import Uniform
    from fellrec.aggregation.updatemixing import UpdateMixing

__all__ = [
    "AggregationCallback",
    "CFL",
    "Centralized",
    "Ditto",
    "FELLRec",
    "FedAMP",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedYogi",
    "Local",
    "PFedMe",
    "Persistence",
    "Scaffold",
    "Uniform",
    "UpdateMixing",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "AggregationCallback":
        return import_module(f"{__name__}.base").AggregationCallback
    return getattr(import_module(f"{__name__}.{RULES[name].about.module or name.lower()}"), name)
