"""The aggregation callbacks, one rule per file; each is imported when it is used, so that settings need no PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fellrec.aggregation.settings import RULES

if TYPE_CHECKING:
    from fellrec.aggregation.afl import AFL
    from fellrec.aggregation.apfl import APFL
    from fellrec.aggregation.base import AggregationCallback
    from fellrec.aggregation.bulyan import Bulyan
    from fellrec.aggregation.centralized import Centralized
    from fellrec.aggregation.cfl import CFL
    from fellrec.aggregation.clipping import CenteredClipping, NormClipping
    from fellrec.aggregation.coordinatewise import CoordinateMedian, TrimmedMean
    from fellrec.aggregation.ditto import Ditto
    from fellrec.aggregation.fedalt import FedALT
    from fellrec.aggregation.fedamp import FedAMP
    from fellrec.aggregation.fedasync import FedAsync
    from fellrec.aggregation.fedavg import FedAvg
    from fellrec.aggregation.fedavgm import FedAvgM
    from fellrec.aggregation.fedbuff import FedBuff
    from fellrec.aggregation.fedfomo import FedFomo
    from fellrec.aggregation.fedfv import FedFV
    from fellrec.aggregation.fedheal import FedHEAL
    from fellrec.aggregation.fedmgda import FedMGDA
    from fellrec.aggregation.fednova import FedNova
    from fellrec.aggregation.fedopt import FedAdagrad, FedAdam, FedYogi
    from fellrec.aggregation.fedper import FedPer
    from fellrec.aggregation.fedprox import FedProx
    from fellrec.aggregation.fedrep import FedRep
    from fellrec.aggregation.fedrot_lora import FedRotLoRA
    from fellrec.aggregation.fellrec import FELLRec
    from fellrec.aggregation.fltrust import FLTrust
    from fellrec.aggregation.geometricmedian import GeometricMedian
    from fellrec.aggregation.hetlora import RBLA, HetLoRA
    from fellrec.aggregation.ifca import IFCA
    from fellrec.aggregation.krum import Krum, MultiKrum
    from fellrec.aggregation.local import Local
    from fellrec.aggregation.lora_base import FedExLoRA, FLoRA
    from fellrec.aggregation.lora_cores import RAVAN, FedSB
    from fellrec.aggregation.lora_fair import LoRAFAIR
    from fellrec.aggregation.lora_halves import FedSALoRA, FFALoRA, RoLoRA
    from fellrec.aggregation.lora_svd import FedSVD, FlexLoRA
    from fellrec.aggregation.persistence import Persistence
    from fellrec.aggregation.pfedme import PFedMe
    from fellrec.aggregation.qfedavg import QFedAvg
    from fellrec.aggregation.scaffold import Scaffold
    from fellrec.aggregation.term import TERM
    from fellrec.aggregation.uniform import Uniform
    from fellrec.aggregation.updatemixing import UpdateMixing

__all__ = [
    "AFL",
    "APFL",
    "AggregationCallback",
    "Bulyan",
    "CFL",
    "CenteredClipping",
    "Centralized",
    "CoordinateMedian",
    "Ditto",
    "FELLRec",
    "FFALoRA",
    "FLTrust",
    "FLoRA",
    "FedALT",
    "FedAMP",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedExLoRA",
    "FedFV",
    "FedFomo",
    "FedHEAL",
    "FedMGDA",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedRotLoRA",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FedYogi",
    "FlexLoRA",
    "GeometricMedian",
    "HetLoRA",
    "IFCA",
    "Krum",
    "LoRAFAIR",
    "Local",
    "MultiKrum",
    "NormClipping",
    "PFedMe",
    "Persistence",
    "QFedAvg",
    "RAVAN",
    "RBLA",
    "RoLoRA",
    "Scaffold",
    "TERM",
    "TrimmedMean",
    "Uniform",
    "UpdateMixing",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "AggregationCallback":
        return import_module(f"{__name__}.base").AggregationCallback
    return getattr(import_module(f"{__name__}.{RULES[name].about.module or name.lower()}"), name)
