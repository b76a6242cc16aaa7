"""The aggregation callbacks, one rule per file."""

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.build import build_aggregation
from fellrec.aggregation.centralized import Centralized
from fellrec.aggregation.fedavg import FedAvg
from fellrec.aggregation.fellrec import FELLRec
from fellrec.aggregation.local import Local
from fellrec.aggregation.persistence import Persistence
from fellrec.aggregation.uniform import Uniform
from fellrec.aggregation.updatemixing import UpdateMixing

__all__ = [
    "AggregationCallback",
    "Centralized",
    "FELLRec",
    "FedAvg",
    "Local",
    "Persistence",
    "Uniform",
    "UpdateMixing",
    "build_aggregation",
]
