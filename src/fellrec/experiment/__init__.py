"""From a composed configuration to the objects of a run. The only place where configuration meets classes."""

from fellrec.experiment.build import (
    Peers,
    Recommender,
    ServerShare,
    attach_server,
    build_backbone,
    build_batches,
    build_data,
    build_fabric,
    build_recommender,
    build_rule,
    cache_dir,
    copy_adapter,
    frozen_parameters,
    new_lead,
    over_ranks,
    recommender_key,
)
from fellrec.experiment.federation import build_loop, build_server, connect, new_state

__all__ = [
    "Peers",
    "Recommender",
    "ServerShare",
    "attach_server",
    "build_backbone",
    "build_batches",
    "build_data",
    "build_fabric",
    "build_loop",
    "build_recommender",
    "build_rule",
    "build_server",
    "cache_dir",
    "connect",
    "copy_adapter",
    "frozen_parameters",
    "new_lead",
    "new_state",
    "over_ranks",
    "recommender_key",
]
