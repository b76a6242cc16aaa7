"""Which dataclass has the settings of a group or choice, and its defaults as nodes that Hydra composes.

A file in ``conf/`` names the dataclass in its defaults list: ``defaults: [TrainerSettings]``. A class of the package
that a ``_target_`` names takes the same settings; what a user's own class takes is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore

from fellrec.aggregation.settings import RULES
from fellrec.config.members import FEDERATION, OF_MEMBER, key_of_member
from fellrec.cut.settings import SplitSettings
from fellrec.data.settings import (
    AtomicSettings,
    AttributeSettings,
    DataSettings,
    DirichletSettings,
    FederationSettings,
    FilesSettings,
    GivenSplitSettings,
    GlobalTimeSettings,
    KMeansSettings,
    LeaveOneOutSettings,
    PerUserSettings,
    RandomSettings,
    SyntheticSettings,
)
from fellrec.data.table_settings import AmazonSettings, TableDataSettings, TableSettings
from fellrec.errors import unknown
from fellrec.federated.privacy_settings import PrivacySettings
from fellrec.federated.settings import (
    BySizeSamplerSettings,
    ExchangeSettings,
    ParticipationSettings,
    PoisonSettings,
    PoissonSamplerSettings,
    PowerOfChoiceSamplerSettings,
    TraceSamplerSettings,
    TrainerSettings,
    UniformSamplerSettings,
)
from fellrec.functional.ranges import Line, Seed, check
from fellrec.launch.settings import LauncherSettings
from fellrec.models.settings import (
    FullSettings,
    GenerativeSettings,
    HfSettings,
    LoraHeadsSettings,
    LoraMixedSettings,
    LoraSBSettings,
    LoraSettings,
    RetrievalSettings,
    SasrecSettings,
    TinySettings,
)
from fellrec.rankers.settings import ConstrainedSettings, GroundingSettings, LikelihoodSettings, ReferenceSettings
from fellrec.tracking.settings import TrackingSettings


@dataclass(frozen=True)
class RunSettings:
    """Settings that are in no group."""

    seed: Seed = 0
    """Of batch order, dropout and LoRA initialisation; the data, the partition and the backbone have their own."""
    run_dir: Line | None = None
    """Where the run is written; null: runs/<time>-<data>-<rule>."""
    resume: Line | None = None
    """A run directory: resume the run where it stopped."""
    cache_dir: Line | None = None
    """Prepared data and pretrained tiny backbones; null: .cache/fellrec at home."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "")


GROUPS: Mapping[str, type] = {
    "": RunSettings,
    "data": DataSettings,
    "split": SplitSettings,
    "participation": ParticipationSettings,
    "exchange": ExchangeSettings,
    "privacy": PrivacySettings,
    "poison": PoisonSettings,
    "trainer": TrainerSettings,
    "references": ReferenceSettings,
    "tracking": TrackingSettings,
    "launcher": LauncherSettings,
}
"""Groups whose settings are the same for every choice."""

OF_CHOICE: Mapping[tuple[str, str], type] = {
    ("data", FEDERATION): FederationSettings,
    ("data", "table"): TableDataSettings,
}
"""Choices whose settings of the group are others than those of `GROUPS`."""

_READERS, _SAMPLERS = "fellrec.data.readers", "fellrec.federated.samplers"
CHOICES: Mapping[str, Mapping[str, type]] = {
    "data.reader": {
        f"{_READERS}.AmazonReader": AmazonSettings,
        f"{_READERS}.AtomicReader": AtomicSettings,
        f"{_READERS}.MicroLensReader": FilesSettings,
        f"{_READERS}.MovieLens100KReader": FilesSettings,
        f"{_READERS}.MovieLens1MReader": FilesSettings,
        f"{_READERS}.MovieLensCsvReader": FilesSettings,
        f"{_READERS}.SyntheticReader": SyntheticSettings,
        f"{_READERS}.TableReader": TableSettings,
    },
    "holdout": {
        "fellrec.data.holdout.GivenSplit": GivenSplitSettings,
        "fellrec.data.holdout.GlobalTime": GlobalTimeSettings,
        "fellrec.data.holdout.LeaveOneOut": LeaveOneOutSettings,
    },
    "partition": {
        "fellrec.data.partition.AttributePartition": AttributeSettings,
        "fellrec.data.partition.DirichletPartition": DirichletSettings,
        "fellrec.data.partition.KMeansPartition": KMeansSettings,
        "fellrec.data.partition.PerUserPartition": PerUserSettings,
        "fellrec.data.partition.RandomPartition": RandomSettings,
    },
    "objective": {
        "fellrec.models.objectives.generative.GenerativeObjective": GenerativeSettings,
        "fellrec.models.objectives.retrieval.RetrievalObjective": RetrievalSettings,
    },
    "backbone": {"hf": HfSettings, "sasrec": SasrecSettings, "tiny": TinySettings},
    "adapter": {
        "fellrec.models.adapters.FullAdapter": FullSettings,
        "fellrec.models.adapters.LoraAdapter": LoraSettings,
        "fellrec.models.core_adapters.LoraHeadsAdapter": LoraHeadsSettings,
        "fellrec.models.core_adapters.LoraSBAdapter": LoraSBSettings,
        "fellrec.models.mixed_lora.LoraMixedAdapter": LoraMixedSettings,
    },
    "participation.sampler": {
        f"{_SAMPLERS}.BySizeSampler": BySizeSamplerSettings,
        f"{_SAMPLERS}.PoissonSampler": PoissonSamplerSettings,
        f"{_SAMPLERS}.PowerOfChoiceSampler": PowerOfChoiceSamplerSettings,
        f"{_SAMPLERS}.TraceSampler": TraceSamplerSettings,
        f"{_SAMPLERS}.UniformSampler": UniformSamplerSettings,
    },
    "ranker": {
        "fellrec.rankers.constrained.ConstrainedRanker": ConstrainedSettings,
        "fellrec.rankers.grounding.GroundingRanker": GroundingSettings,
        "fellrec.rankers.likelihood.LikelihoodRanker": LikelihoodSettings,
    },
    "aggregation": {f"fellrec.aggregation.{name}": kind for name, kind in RULES.items()},
}
"""Groups whose choices have settings of their own, by ``_target_``, or for a backbone by its name."""

NEWER: Mapping[str, Mapping[str, Any]] = {
    "exchange": {},
    "privacy": {},
    "poison": {},
    "participation.sampler": {"_target_": f"{_SAMPLERS}.UniformSampler"},
}
"""Groups and choices that runs of earlier versions do not have in their configuration, with what these runs did."""

RENAMED: Mapping[str, tuple[str, Mapping[Any, Any]]] = {
    "data.tied_times": ("data.ties", {"file_order": "file", "random": "shuffle"}),
}
"""Settings that runs of earlier versions have under another name: the name now, and the values now by the old ones."""


@dataclass(frozen=True)
class Part:
    """The settings of a composed configuration that one dataclass has.

    Attributes:
        key: Where they are, such as ``data.reader``; empty for those in no group.
        kind: The dataclass.
        values: The settings.
        member: Of a federation, that they belong to; empty for the run.
    """

    key: str
    kind: type
    values: Mapping[str, Any]
    member: str = ""

    def dotted(self, name: str) -> str:
        """The key of one of the settings."""
        return f"{self.key}.{name}" if self.key else name


def own_settings(node: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The settings of a group, plain values, without those of a choice in it, such as ``data.reader``.

    Example:
        >>> own_settings({"rate": 0.5, "sampler": {"_target_": "a.B"}}, "participation")
        {'rate': 0.5}
    """
    return {name: value for name, value in node.items() if f"{group}.{name}" not in CHOICES}


def known_by(key: str) -> str:
    """The setting that tells a choice of ``CHOICES[key]`` from the others."""
    return "name" if key == "backbone" else "_target_"


def parts(config: Mapping[str, Any]) -> Iterator[Part]:
    """The parts of a configuration, plain values, whose settings are known; a group may be absent.

    Example:
        >>> [(part.key, part.values) for part in parts({"split": {"head_layers": 2}, "seed": 0})]
        [('', {'seed': 0}), ('split', {'head_layers': 2})]
    """
    yield Part("", RunSettings, {name: value for name, value in config.items() if not isinstance(value, Mapping)})
    for group, kind in GROUPS.items():
        if group and group in config:
            own = kind_of_data(config[group]) if group == "data" else kind
            yield Part(group, own, own_settings(config[group], group))
    for key, kinds in CHOICES.items():
        node = config
        for name in key.split("."):
            node = node.get(name) or {}
        if kind_of_choice := kinds.get(str(node.get(known_by(key)))):
            yield Part(key, kind_of_choice, {name: value for name, value in node.items() if name != known_by(key)})
    for name, member in (config["data"].get("member") or {}).items() if "data" in config else ():
        for part in parts(_alone(member)):
            if part.key:
                yield replace(part, key=key_of_member(name, part.key), member=name)


def kind_of_data(data: Mapping[str, Any]) -> type:
    """The dataclass of the settings of ``data``, by what they have."""
    if "members" in data:
        return FederationSettings
    return TableDataSettings if "path" in data else DataSettings


def _alone(member: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a run on a member's data alone, as far as they belong to the member."""
    data = {name: value for name, value in member.items() if name not in OF_MEMBER}
    return {"data": data, **{group: member[group] for group in OF_MEMBER if group in member}}


def wrong_groups(config: Mapping[str, Any]) -> list[str]:
    """What a configuration, plain values, has in place of groups: one line for each that is not settings, or unknown.

    ``launcher`` may be absent: it does not affect results.
    """
    known = {"callbacks", *filter(None, GROUPS), *(key.partition(".")[0] for key in CHOICES)}
    strange = [name for name, node in config.items() if name not in known and isinstance(node, Mapping)]
    wrong = [unknown("setting", name, known) for name in strange]
    data = config.get("data")
    has_members = isinstance(data, Mapping) and "members" in data
    needed = ["callbacks", *(group for group in GROUPS if group not in ("", "launcher")), *CHOICES]
    if has_members:
        needed.remove("data.reader")
        needed.append("data.member")
    for key in needed:
        if not isinstance(node := _node(config, key), Mapping):
            wrong.append(f"{key}={node} is not allowed: settings, such as those of {key}=… in --help")
    members = _node(config, "data.member") if has_members else None
    for name, member in members.items() if isinstance(members, Mapping) else ():
        for key in ("data", "data.reader", *OF_MEMBER):
            own = _node(_alone(member), key) if isinstance(member, Mapping) else None
            if not isinstance(own, Mapping):
                wrong.append(f"{key_of_member(name, key)}={own} is not allowed: settings, as of {key}=… in --help")
    callbacks = config.get("callbacks")
    for name, node in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if node is not None and not isinstance(node, Mapping):
            wrong.append(f"callbacks.{name}={node} is not allowed: {{_target_: module.Class}}, or null")
    return wrong


def _node(config: Mapping[str, Any], key: str) -> Any:
    """What is under a dotted key; ``None`` for nothing."""
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def register() -> None:
    """Give Hydra the defaults of all dataclasses, each as a choice with the dataclass's name in its group."""
    store = ConfigStore.instance()
    for group, kind in GROUPS.items():
        store.store(name=kind.__name__, node=defaults_of(kind), group=group or None)
    for (group, _), kind in OF_CHOICE.items():
        store.store(name=kind.__name__, node=defaults_of(kind), group=group)
    for key, kinds in CHOICES.items():
        for kind in kinds.values():
            group = key.partition(".")[0]
            store.store(name=kind.__name__, node={known_by(key): "???", **defaults_of(kind)}, group=group)


def defaults_of(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass as plain values; ``???`` for a field without one.

    Example:
        >>> defaults_of(AttributeSettings)
        {'column': '???', 'on_missing': 'error', 'num_clients': None}
    """
    return {field.name: plain_default(field.default, field.default_factory) for field in fields(kind)}


def plain_default(default: Any, factory: Any) -> Any:
    """The default of a dataclass's field as a plain value; ``???`` if it has none."""
    value = factory() if factory is not MISSING else default
    if value is MISSING:
        return "???"
    if is_dataclass(value):
        return defaults_of(type(value))
    return list(value) if isinstance(value, tuple) else value
