"""Members of ``data=federation``: each is composed as a run on its data alone, under ``data.member.NAME``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from fellrec.config.paths import group_choices
from fellrec.data.settings import MEMBER, FederationSettings
from fellrec.errors import ConfigError, unknown
from fellrec.functional.ranges import not_allowed, ranges

FEDERATION = "federation"
"""The choice of ``data`` that has members."""
OF_MEMBER = ("partition", "holdout")
"""Groups that a member has a node of its own for, beside the settings of ``data``."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OVERRIDE = re.compile(r"(?P<sign>\+{0,2}|~)data\.member\.(?P<name>[\w-]+)\.(?P<rest>.+)", re.DOTALL)
_KEY = re.compile(r"(?<![\w.])(data(?!\.member\.)|partition|holdout)(?=[.=])")


def is_federation(config: Mapping[str, Any] | DictConfig) -> bool:
    """Whether the data of a configuration are those of several members."""
    return "members" in config["data"]


def key_of_member(name: str, key: str) -> str:
    """Where a federation has a setting of a member.

    Example:
        >>> key_of_member("games", "data.max_users"), key_of_member("games", "partition")
        ('data.member.games.max_users', 'data.member.games.partition')
    """
    group, dot, rest = key.partition(".")
    return f"data.member.{name}{dot}{rest}" if group == "data" else f"data.member.{name}.{key}"


def about_member(name: str, text: str) -> str:
    """A message about a run on a member's data alone, with the keys that the federation has.

    Example:
        >>> about_member("games", "data.root=x is not a directory")
        'data.member.games.root=x is not a directory'
        >>> about_member("games", "no user is left")
        'data.member.games: no user is left'
    """
    named = _KEY.sub(lambda found: key_of_member(name, found[0]), text)
    return named if f"data.member.{name}" in named else f"data.member.{name}: {named}"


def alone(key: str) -> str:
    """The key that a setting of a member has in a run on its data alone; other keys as they are.

    Example:
        >>> alone("data.member.games.max_users"), alone("data.member.games.partition.column"), alone("seed")
        ('data.max_users', 'partition.column', 'seed')
    """
    found = _OVERRIDE.fullmatch(key)
    if not found:
        return key
    return found["sign"] + (found["rest"] if found["rest"].startswith(OF_MEMBER) else f"data.{found['rest']}")


def members_of(data: DictConfig) -> dict[str, str]:
    """The members of a federation by name, each with its choice of ``data``; empty if none are given.

    Raises:
        ConfigError: If they are not a list of choices or a mapping, or names clash, or a choice does not exist.
    """
    if OmegaConf.is_missing(data, "members"):
        return {}
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(data, ["members"]), resolve=True)
    given = plain["members"]
    if isinstance(given, list) and (twice := [name for name in given if given.count(name) > 1]):
        raise ConfigError(
            f"data.members has {twice[0]} twice: members need different names, such as "
            f"data.members={{first: {twice[0]}, second: {twice[0]}}}"
        )
    allowed = ranges(FederationSettings)["members"]
    if not allowed.accepts(given):
        raise ConfigError(not_allowed("data.members", given, allowed.text))
    choices = given if isinstance(given, dict) else {name: name for name in given}
    known = [choice for choice in group_choices()["data"] if choice != FEDERATION]
    for name, choice in choices.items():
        if choice not in known:
            raise ConfigError(unknown("data in data.members", choice, known))
        if not _NAME.fullmatch(name):
            raise ConfigError(f"data.members: the name {name!r} is not allowed: letters, digits, - and _")
    return choices


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the federation, and those of its members."""
    of_members = [text for text in overrides if _OVERRIDE.fullmatch(text)]
    return [text for text in overrides if text not in of_members], of_members


def _check_given_once(overrides: Sequence[str]) -> None:
    """Refuse a mapping of members that has a name twice: of two values of a key, Hydra keeps the last one.

    Raises:
        ConfigError: Naming it.
    """
    for text in overrides:
        key, _, value = text.partition("=")
        names = re.findall(r"[{,]\s*([^\s:,{}]+)\s*:", value) if key.lstrip("+") == "data.members" else []
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"data.members has the name {twice[0]} twice: members need different names")


def add_members(
    config: DictConfig, own: Sequence[str], of_members: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]
) -> None:
    """Add ``data.member.NAME`` of every member: the settings of its data, and its own partition and holdout.

    Args:
        config: The composed configuration of the federation; changed.
        own: Its overrides; those of partition and holdout are for all members.
        of_members: Overrides such as ``data.member.games.max_users=500`` and ``data.member.games.partition=random``.
        compose: Composes the configuration of a run on one data set, unchecked.

    Raises:
        ConfigError: If an override is about no member, or is not allowed for its member's data.
    """
    _check_given_once(own)
    choices = members_of(config.data)
    for text in of_members:
        name = _match(text)["name"]
        if name not in choices:
            raise ConfigError(unknown("member of data.members", name, choices))
        if _match(text)["rest"].startswith(("max_history=", "name=")):
            key = text.partition("=")[0].lstrip("+~")
            raise ConfigError(f"{key} is not allowed: data.max_history is for all members, data.members has the names")
    shared = [text for text in own if text.lstrip("+~").startswith((*OF_MEMBER, "hydra.searchpath"))]
    with open_dict(config.data):
        config.data.member = {
            name: _node(
                name,
                [
                    f"data={choice}",
                    *shared,
                    *(alone(text) for text in of_members if _match(text)["name"] == name),
                    f"data.name={name}",
                    f"data.max_history={config.data.max_history}",
                ],
                compose,
            )
            for name, choice in choices.items()
        }


def _match(text: str) -> re.Match[str]:
    found = _OVERRIDE.fullmatch(text)
    assert found is not None, "an override of a member"
    return found


def _node(name: str, overrides: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]) -> dict[str, Any]:
    """The settings of a member; what refers to a setting of ``data`` then refers to the member's."""
    try:
        config = compose(overrides)
    except ConfigError as error:
        raise ConfigError(about_member(name, str(error))) from error
    nodes = {group: OmegaConf.to_container(config[group], resolve=False) for group in ("data", *OF_MEMBER)}
    data = _referring(nodes.pop("data"), name)
    return {**data, **nodes}


def _referring(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        return {key: _referring(value, name) for key, value in node.items()}
    return node.replace("${data.", f"${{data.member.{name}.") if isinstance(node, str) else node


def member_configs(config: DictConfig) -> dict[str, DictConfig]:
    """For each member of a federation the configuration of the same run on its data alone; empty for one data set."""
    if not is_federation(config):
        return {}
    return {str(name): _config_of(config, str(name)) for name in config.data.member}


def _config_of(config: DictConfig, name: str) -> DictConfig:
    own = config.copy()
    node: Any = OmegaConf.to_container(config.data.member[name], resolve=True)
    template = OmegaConf.select(config, "objective.template", default=None)
    with open_dict(own):
        for group in OF_MEMBER:
            own[group] = node.pop(group)
        if config.data.domain != MEMBER:
            node["domain"] = config.data.domain
        own.data = node
        if isinstance(template, str) and template.startswith(f"{MEMBER}-"):
            own.objective.template = f"{node['domain']}{template.removeprefix(MEMBER)}"
    return own


def data_nodes(config: DictConfig) -> dict[str, DictConfig]:
    """The nodes with the settings of data sets by key: ``data``, or ``data.member.NAME`` of every member."""
    if not is_federation(config):
        return {"data": config.data}
    return {f"data.member.{name}": node for name, node in config.data.member.items()}


def federation_problems(config: DictConfig) -> list[str]:
    """What a federation of data sets cannot be combined with: objectives and backbones that know items by their ids."""
    fields = [OmegaConf.select(config, f"objective.{key}", default=None) for key in ("history_fields", "item_fields")]
    if not is_federation(config) or not any(field == ["item_id"] for field in fields):
        return []
    what = "backbone=sasrec" if config.backbone.get("name") == "sasrec" else "an objective on item ids"
    return [
        f"{what} is not allowed with data=federation: ids mean nothing to clients with another catalogue, so that the "
        "members would share no objective; use a text backbone (tiny or hf) with an objective on text"
    ]


def with_totals(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, plain values, with the number of clients of all members, and the largest rate of public users.

    Example:
        >>> two = {"partition": {"num_clients": 2}, "public_user_rate": 0.1}
        >>> data = {"members": ["a", "b"], "member": {"a": two, "b": two}}
        >>> with_totals({"partition": {"num_clients": 5}, "data": data})["partition"]
        {'num_clients': 4}
    """
    if not is_federation(plain):
        return dict(plain)
    members = list(plain["data"]["member"].values())
    counts = [member["partition"].get("num_clients") for member in members]
    total = sum(counts) if counts and all(isinstance(count, int) for count in counts) else None
    rate = max((member["public_user_rate"] for member in members), default=None)
    return {
        **plain,
        "partition": {**plain["partition"], "num_clients": total},
        "data": {**plain["data"], "public_user_rate": rate},
    }
