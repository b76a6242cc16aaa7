"""Objective and ranker of a configuration; in a federation of data sets, those of every member."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from fellrec.config.instantiate import instantiate
from fellrec.config.members import about_member, member_configs
from fellrec.data.guards import check_prompts
from fellrec.data.prepared import PreparedData
from fellrec.errors import FellrecError
from fellrec.models.backbone import Backbone
from fellrec.models.module import Objective, Ranker
from fellrec.models.objectives.members import MembersObjective
from fellrec.rankers.members import MembersRanker

T = TypeVar("T")


def of_members(config: DictConfig, make: Callable[[DictConfig, str], T]) -> dict[str, T]:
    """What is made for each member of a federation, by its name; an error says which member it is about.

    Args:
        config: The configuration of the federation.
        make: Called with the configuration of a run on a member's data alone, and the member's name.
    """
    found = {}
    for name, own in member_configs(config).items():
        try:
            found[name] = make(own, name)
        except FellrecError as error:
            raise type(error)(about_member(name, str(error))) from error
    return found


def build_objective(config: DictConfig, backbone: Backbone, data: PreparedData) -> Objective:
    """The local objective.

    Raises:
        ConfigError: If settings do not fit together, or the data.
    """
    if data.members:
        parts = of_members(config, lambda own, name: build_objective(own, backbone, data.members[name]))
        return MembersObjective(list(parts.values()), data.places)
    objective: Objective = instantiate(
        config.objective,
        "objective",
        {"item_counts": _item_counts(data), "is_causal": backbone.arch.is_causal},
        of=Objective,
        tokenizer=backbone.tokenizer,
        catalogue=data.catalogue,
        max_history=data.max_history,
    )
    return objective


def check_all_prompts(objective: Objective, data: PreparedData) -> None:
    """Check the prompts of every member's objective."""
    if not isinstance(objective, MembersObjective):
        check_prompts(objective, data)
        return
    for part, own in zip(objective.objectives, data.members.values(), strict=True):
        check_prompts(part, own)


def _item_counts(data: PreparedData) -> Tensor:
    """How often each item was used by the public users; without any, by all clients' users, centrally.

    Training interactions only.
    """
    public = np.flatnonzero(data.client_of_user < 0)
    rows = data.train.take(public) if len(public) else data.train
    return torch.from_numpy(np.bincount(rows.values, minlength=len(data.catalogue)))


def build_ranker(config: DictConfig, objective: Objective, data: PreparedData) -> Ranker:
    """A ranker may take the training interactions of all clients, too; `README` says what that stands for."""
    if isinstance(objective, MembersObjective):
        objectives = dict(zip(data.members, objective.objectives, strict=True))
        parts = of_members(config, lambda own, name: build_ranker(own, objectives[name], data.members[name]))
        return MembersRanker.of(list(parts.values()), data.places)
    ranker: Ranker = instantiate(config.ranker, "ranker", {"train": data.train}, of=Ranker, objective=objective)
    return ranker
