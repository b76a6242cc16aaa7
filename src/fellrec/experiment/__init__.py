"""From a composed configuration to the objects of a run. The only room where configuration meets classes."""

from fellrec.experiment.build import (
    Recommender,
    ServerPart,
    build_backbone,
    build_batches,
    build_data,
    build_fabric,
    build_recommender,
    build_rule,
    cache_dir,
    log_notes,
    recommender_key,
)
from fellrec.experiment.federation import Federation, build_federation, build_loop

__all__ = [
    "Federation",
    "Recommender",
    "ServerPart",
    "build_backbone",
    "build_batches",
    "build_data",
    "build_fabric",
    "build_federation",
    "build_loop",
    "build_recommender",
    "build_rule",
    "cache_dir",
    "log_notes",
    "recommender_key",
]
