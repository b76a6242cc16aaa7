"""Settings of a federation: each member is composed as a run on its data alone; mistakes name the member's setting."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fellrec.config.compose import compose
from fellrec.config.describe import choices
from fellrec.config.members import member_configs
from fellrec.config.stored import moved, read_config, to_yaml
from fellrec.config.sweep import expand
from fellrec.errors import ConfigError, FellrecError
from fellrec.experiment.build import build_data, build_rule
from fellrec.experiment.classes import check_classes

TWO = ["data=federation", "data.members=[ml_1m,games]", "data.member.ml_1m.root=/a", "data.member.games.root=/b"]
MADE = ["data=federation", "data.members={a: synthetic, b: micro_lens_shaped}"]


def test_a_member_is_configured_as_a_run_on_its_data_alone() -> None:
    """Partition and holdout of all, of one, and the settings of its own data; the prompt is that of its domain."""
    of_one = ["data.member.games.max_users=50", "data.member.games.partition=random", "data.member.games.core=3"]
    config = compose([*TWO, *of_one, "partition.num_clients=2", "objective=generative", "holdout.min_length=4"])
    members = member_configs(config)
    alone = {
        "ml_1m": ["data=ml_1m", "data.root=/a"],
        "games": ["data=games", "data.root=/b", "data.max_users=50", "data.core=3", "partition=random"],
    }
    for name, overrides in alone.items():
        expected = compose([*overrides, "partition.num_clients=2", "objective=generative", "holdout.min_length=4"])
        for group in ("data", "partition", "holdout", "objective", "trainer", "backbone", "aggregation"):
            found, wanted = (OmegaConf.to_container(each[group], resolve=True) for each in (members[name], expected))
            assert found == wanted, (name, group)
    assert config.objective.template == "member-1"
    own = compose([*TWO, "objective=generative", "data.domain=video"])
    assert {each.objective.template for each in member_configs(own).values()} == {"video-1"}


def test_names_may_differ_from_choices_and_ids_may_be_equal() -> None:
    config = compose(["data=federation", "data.members={books: atomic, toys: atomic}", *_roots("books", "toys")])
    assert [node.name for node in config.data.member.values()] == ["books", "toys"]


def _roots(*names: str) -> list[str]:
    return [f"data.member.{name}.root=/tmp" for name in names]


def test_a_sweep_over_a_setting_of_a_member() -> None:
    runs = expand([*TWO, "data.member.games.partition.num_clients=1,2"])
    counts = [compose(run).data.member.games.partition.num_clients for run in runs]
    assert counts == [1, 2]


def test_rules_see_the_clients_of_all_members() -> None:
    """Krum needs at least 3 clients: two members with two each have enough, with one each they have not."""
    least = ["aggregation=krum", "aggregation.byzantine=0"]
    build_rule(compose([*MADE, "partition.num_clients=2", *least]))
    with pytest.raises(ConfigError, match=r"needs at least 3 clients in a round: partition.num_clients=2"):
        build_rule(compose([*MADE, "partition.num_clients=1", *least]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=federation"], "data.members needs a value: give data.members="),
        (["data=federation", "data.members=[]"], "data.members=[] is not allowed: a list of different choices"),
        (["data=federation", "data.members=[games,games]"], "data.members has games twice: members need different na"),
        (
            ["data=federation", "data.members={a: games, a: toys}"],
            "data.members has the name a twice: members need diff",
        ),
        (["data=federation", "data.members=[games,toyz]"], "unknown data in data.members 'toyz'; choose from: toys, "),
        (["data=federation", "data.members=[federation]"], "unknown data in data.members 'federation'; choose from: "),
        (["data=federation", "data.members={a/b: games}"], "data.members: the name 'a/b' is not allowed"),
        (["data=federation", "data.members=[games]"], "data.member.games.root needs a value: give data.member.games.r"),
        ([*TWO, "data.member.toys.root=/c"], "unknown member of data.members 'toys'; choose from: games, ml_1m"),
        ([*TWO, "data.member.games.max_users=0"], "data.member.games.max_users=0 is not allowed: a whole number of at"),
        ([*TWO, "data.member.games.max_user=9"], "unknown setting 'data.member.games.max_user'; choose from: data.mem"),
        ([*TWO, "data.member.games.partition=knn"], "data.member.games: unknown partition 'knn'; choose from: "),
        (
            [*TWO, "data.member.games.partition.num_clients=0"],
            "data.member.games.partition.num_clients=0 is not allowed: a whole number of at least 1",
        ),
        (
            [*TWO, "data.member.games.max_history=5"],
            "data.member.games.max_history is not allowed: data.max_history is",
        ),
        ([*TWO, "backbone=sasrec"], "backbone=sasrec is not allowed with data=federation: ids mean nothing to clients"),
        ([*TWO, "objective=items"], "an objective on item ids is not allowed with data=federation: ids mean nothing"),
        (["data=games", "data.root=/b", "data.member.games.core=1"], "unknown setting 'data.member.games.core'"),
    ],
)
def test_mistakes_name_the_member_and_are_found_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.member.a.min_user_interactions=1000"], "data.member.a.min_user_interactions=1000 leaves no interactio"),
        (["data.member.b.partition.num_clients=100000"], "data.member.b.partition.num_clients=100000 must be at most"),
        (["data.member.b.public_user_rate=0.9999"], "data.member.b"),
        (["trainer.cutoffs=[10,401]"], "data.member.a: trainer.cutoffs=[10, 401]: invalid cutoff 401"),
    ],
)
def test_data_without_users_or_items_names_the_member(overrides: list[str], message: str, cache: Path) -> None:
    small = [
        "data.member.a.reader.num_users=60",
        "data.member.b.reader.num_users=60",
        "data.member.b.reader.num_items=99",
    ]
    with pytest.raises(FellrecError) as caught:
        build_data(compose([*MADE, *small, *overrides, f"cache_dir={cache}"]))
    assert message in str(caught.value)


def test_classes_of_members_are_checked_too() -> None:
    config = compose([*MADE, "data.member.b.reader._target_=fellrec.data.readers.Nothing"])
    with pytest.raises(ConfigError, match=r"data.member.b.reader._target_=fellrec.data.readers.Nothing cannot be impo"):
        check_classes(config)


def test_a_stored_federation_is_read_and_its_files_may_move(tmp_path: Path) -> None:
    config = compose([*TWO, "partition.num_clients=2"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    stored = read_config(tmp_path)
    assert OmegaConf.to_container(stored.data.member) == OmegaConf.to_container(config.data.member, resolve=True)
    new = moved(stored, [f"data.member.games.root={tmp_path}"])
    assert new.data.member.games.root == new.data.member.games.reader.root == str(tmp_path)
    assert new.data.member.ml_1m.reader.root == "/a"
    with pytest.raises(ConfigError, match="a run keeps its own configuration"):
        moved(stored, ["data.member.games.max_users=5"])
    del stored.data.member.games.reader
    (tmp_path / "config.yaml").write_text(f"format: 1\n{OmegaConf.to_yaml(stored)}")
    with pytest.raises(ConfigError, match=r"data.member.games.reader=None is not allowed"):
        read_config(tmp_path)


def test_the_choice_is_described() -> None:
    (found,) = [choice for choice in choices("data") if choice.name == "federation"]
    assert found.summary.startswith("Several data sets, each the data of one client or of several")
    assert {setting.key for setting in found.settings} >= {"data.members", "data.member", "data.max_history"}
