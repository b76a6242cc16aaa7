"""Settings: one home each. A dataclass has the default, the range and the description, and Hydra reaches all of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from fellrec.config.compose import _composed_by_hydra, _hydra, compose
from fellrec.config.describe import settings_of
from fellrec.config.instantiate import as_dict, import_target, settings, settings_class
from fellrec.config.overrides import parse
from fellrec.config.paths import conf_dir
from fellrec.config.registry import CHOICES, GROUPS, defaults_of, known_by, own_settings
from fellrec.config.stored import read_config, read_settings, to_yaml
from fellrec.cut.settings import Packing
from fellrec.data.readers.synthetic import (
    _ADJECTIVES,
    _FILM_TITLES,
    _NOUNS_OF_GENRE,
    _PRESETS,
    _SUBJECTS,
    _VIDEOS_PER_TOPIC,
)
from fellrec.data.settings import MOST_ITEMS, SyntheticSettings
from fellrec.data.table_settings import ColumnSettings
from fellrec.errors import ConfigError
from fellrec.federated.settings import TrainerSettings
from fellrec.functional.nested import flatten
from fellrec.functional.packing import PACKINGS
from fellrec.functional.ranges import ranges
from fellrec.launch.settings import LauncherSettings
from fellrec.models.remote import PARTS
from fellrec.models.settings import PARTS as NAMES_OF_PARTS
from fellrec.models.settings import PretrainSettings
from fellrec.rankers.reference import _FITS
from fellrec.rankers.settings import PRETRAINED, SHOWN

KINDS = dict.fromkeys([*GROUPS.values(), *(kind for kinds in CHOICES.values() for kind in kinds.values())])
KINDS |= dict.fromkeys([ColumnSettings, PretrainSettings])
FILES = sorted(path for path in conf_dir().rglob("*.yaml") if path.name != "config.yaml")


def choices() -> Iterator[tuple[str, str, type]]:
    """Key, ``_target_`` or name, dataclass."""
    for key, kinds in CHOICES.items():
        for name, kind in kinds.items():
            yield key, name, kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_description_below_it(kind: type) -> None:
    found = settings_of(kind, "")
    assert all(setting.text for setting in found)
    assert {setting.key.partition(".")[0] for setting in found} == {field.name for field in fields(kind)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_defaults_are_in_their_own_range(kind: type) -> None:
    values = {field.name: "x" for field in fields(kind) if field.default is field.default_factory is MISSING}
    made = kind(**values)
    for name, allowed in ranges(kind).items():
        assert allowed.accepts(getattr(made, name)), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_numbers_and_words_have_a_range(kind: type) -> None:
    """Text, paths and SLURM's own values are checked by those who read them."""
    free = {name for name, hint in get_type_hints(kind).items() if hint in (str, str | None)}
    free |= {"target_modules", "time", "plugins", "expected", "pretrain", "columns"}
    assert {field.name for field in fields(kind)} - free <= ranges(kind).keys()


@pytest.mark.parametrize(("key", "name", "kind"), choices())
def test_a_class_takes_the_settings_that_are_registered_for_it(key: str, name: str, kind: type) -> None:
    if known_by(key) == "_target_":
        target = import_target(name, key)
        assert settings_class(target) is kind or issubclass(target, kind)


@pytest.mark.parametrize("key", [*filter(None, GROUPS)])
def test_every_setting_of_a_group_can_be_overridden(key: str) -> None:
    """Without a plus: a key that Hydra does not know is refused. Setting all to their own value changes nothing."""
    before = compose([])
    plain = own_settings(as_dict(before[key]), key)
    assert plain.keys() == {field.name for field in fields(GROUPS[key])}
    overrides = [f"{key}.{name}={_as_override(value)}" for name, value in plain.items()]
    assert as_dict(compose(overrides)) == as_dict(before)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_repeat_no_default(path: Path) -> None:
    """A value in a file is a choice: it differs from the default of the dataclass, or is taken from another group."""
    config = OmegaConf.load(path)
    group = path.parent.name
    names = [str(item).split("@") for item in config.get("defaults", []) if isinstance(item, str)]
    by_name = {kind.__name__: kind for kind in KINDS}
    for name, *package in names:
        if name not in by_name:
            continue
        node = config.get(package[0], {}) if package else config
        values = OmegaConf.to_container(node, resolve=False)
        assert isinstance(values, dict)
        defaults = defaults_of(by_name[name])
        same = [key for key, value in values.items() if key in defaults and value == defaults[key]]
        assert not same, group


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"num_rounds": True}, "a whole number of at least 1"),
        ({"num_rounds": 1.0}, "a whole number of at least 1"),
        ({"max_local_steps": 0}, "a whole number of at least 1, or null"),
        ({"learning_rate": float("nan")}, "a number above 0"),
        ({"learning_rate": "1"}, "a number above 0"),
        ({"learning_rate_decay": "step"}, "none, linear or cosine"),
        ({"reset_optimizer": 1}, "true or false"),
        ({"cutoffs": 5}, r"a list of whole numbers of at least 1, each once, such as \[5,10\]"),
        ({"devices": "all"}, "a whole number of at least 1, or auto"),
        ({"precision": "16-true"}, "32-true, bf16-mixed, bf16-true, 16-mixed or auto"),
    ],
)
def test_what_is_out_of_range_is_refused_where_a_dataclass_is_made(value: dict[str, Any], text: str) -> None:
    (name,) = value
    with pytest.raises(ConfigError, match=rf"^trainer\.{name}=.* is not allowed: {text}"):
        TrainerSettings(**value)


def test_a_dataclass_is_made_from_a_node_and_names_what_it_does_not_know() -> None:
    assert settings(TrainerSettings, compose(["trainer.num_rounds=3"]).trainer, "trainer").num_rounds == 3
    with pytest.raises(ConfigError, match=r"unknown setting 'launcher.node'; choose from: launcher.nodes"):
        settings(LauncherSettings, {"node": 2}, "launcher")


def test_names_that_are_written_twice_are_the_same() -> None:
    """What has no PyTorch cannot import them from where they are used."""
    assert get_args(Packing) == PACKINGS
    assert NAMES_OF_PARTS == PARTS
    assert (*_FITS, PRETRAINED) == SHOWN
    genre_films = len(_ADJECTIVES) * len(" ".join(_NOUNS_OF_GENRE.values()).split())
    videos = len(_SUBJECTS) * _VIDEOS_PER_TOPIC
    assert {"films": len(_FILM_TITLES), "genre_films": genre_films, "micro_lens_shaped": videos} == MOST_ITEMS
    assert get_args(get_type_hints(SyntheticSettings)["preset"]) == (*_PRESETS,)


def test_composing_and_checking_needs_no_pytorch() -> None:
    code = (
        "import sys; from fellrec.config.compose import compose; from fellrec.config.sweep import expand\n"
        "compose(['backbone=sasrec']); expand(['aggregation=fedavg,fellrec', 'aggregation.alpha=0.3'])\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'pandas', 'sklearn', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_rule_cannot_work_with_is_refused_without_pytorch() -> None:
    code = (
        "import sys; from fellrec.cli.main import main\n"
        "for words in (['train'], ['train', '-m'], ['compare'], ['plan'], ['submit']):\n"
        "    try: main([*words, 'aggregation=afl', 'participation.rate=0.5'])\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] * 5 + ["[]"]
    message = "aggregation afl needs every client in every round: participation.rate=0.5 is not allowed, leave it at 1"
    assert [line.partition(": ")[2] for line in done.stderr.splitlines()] == [message] * 5


def test_a_runs_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = compose(["aggregation=fedavg", "seed=3"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert as_dict(read_config(tmp_path)) == as_dict(config)


@pytest.mark.parametrize("text", ["seed: 0\n", "format: 0\nseed: 0\n"])
def test_a_run_of_another_version_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"has format \w+, this version of fellrec reads format 1"):
        read_config(tmp_path)


def test_a_folder_of_ones_own_can_have_choices(tmp_path: Path) -> None:
    """A choice outside the package, with a class of its own or with another choice's settings."""
    (tmp_path / "aggregation").mkdir()
    (tmp_path / "aggregation" / "warm.yaml").write_text("defaults:\n  - fellrec\nalpha: 0.1\n")
    config = compose([f"hydra.searchpath=[file://{tmp_path}]", "aggregation=warm", "aggregation.beta=2"])
    assert (config.aggregation.alpha, config.aggregation.beta) == (0.1, 2)


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "seed=1 trainer.cutoffs=[5,10] seed=2",
        "aggregation.mu=1 aggregation=fedprox backbone=sasrec trainer.learning_rate=1e-3",
        "adapter.rank=[4,8] adapter=lora launcher.environment={A:b} run_dir=${seed}",
        "callbacks.progress=null tracking.uri='x=y' ++seed=4 +callbacks.mine={_target_:a.B}",
        "experiment=ml_1m_small data.root=x trainer.num_rounds=7",
    ],
)
def test_values_set_in_a_copy_are_what_hydra_composes(overrides: str) -> None:
    """A configuration of the same choices is composed once; what is set afterwards does not change it."""
    given = overrides.split()
    expected = _composed_by_hydra(parse(given), given)
    for _ in range(2):
        found = _hydra(given)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)
        found.seed = 99
        found.trainer.cutoffs = [1]


def _as_override(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_as_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_as_override(inner)}" for name, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_nested_settings_are_dataclasses_too() -> None:
    nested = {name for kind in KINDS for name, hint in get_type_hints(kind).items() if is_dataclass(hint)}
    assert nested == {"columns", "pretrain"}
    assert "backbone.pretrain.text_weight" in flatten(as_dict(compose([])))


@pytest.mark.parametrize(("before", "now"), [("file_order", "file"), ("random", "shuffle")])
def test_a_run_made_before_a_setting_was_renamed_is_read(tmp_path: Path, before: str, now: str) -> None:
    """Also the members of a federation; a setting that is newer than the run has its default."""
    members = [f"data.member.{name}.root=x" for name in ("games", "toys")]
    config = compose(["data=federation", "data.members=[games,toys]", *members])
    lines = [line for line in to_yaml(config).splitlines(keepends=True) if "on_missing_rating" not in line]
    text = "".join(lines).replace("ties: file\n", f"tied_times: {before}\n")
    assert text.count("tied_times") == 2
    (tmp_path / "config.yaml").write_text(text)
    member = read_config(tmp_path).data.member
    assert [(member[name].ties, member[name].on_missing_rating) for name in ("games", "toys")] == [(now, "error")] * 2
    assert "tied_times" not in member.games
    assert read_settings(tmp_path)["data.member.toys.ties"] == now
