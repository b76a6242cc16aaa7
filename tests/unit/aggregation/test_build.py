import inspect
from dataclasses import fields

import pytest
import torch
from omegaconf import OmegaConf

from fellrec.aggregation import AggregationCallback, FedAvg, FELLRec
from fellrec.config.compose import compose
from fellrec.config.instantiate import instantiate
from fellrec.config.paths import conf_dir, group_choices
from fellrec.config.registry import CHOICES, defaults_of
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_rule
from fellrec.experiment.names import rule_name

RULES = group_choices()["aggregation"]


class Mine(AggregationCallback):
    def __init__(self, needed: int, alpha: float = 0.1):
        self.needed, self.alpha = needed, alpha

    def mixing_matrix(self, updates, round_index):
        return torch.eye(len(updates.clients))


class Hotter(FELLRec):
    """A rule of a user that has FELLRec's settings."""


@pytest.fixture(autouse=True)
def my_package(monkeypatch):
    module = type(inspect)("my_package")
    module.MyRule, module.Hotter, module.not_a_rule = Mine, Hotter, dict
    monkeypatch.setitem(__import__("sys").modules, "my_package", module)


def build(cfg):
    return instantiate(cfg, "aggregation", of=AggregationCallback)


@pytest.mark.parametrize("name", RULES)
def test_every_choice_names_the_rule_of_its_name_and_its_settings(name):
    """Read without Hydra, which would take seconds for all of them; composed are some below."""
    choice = OmegaConf.load(conf_dir() / "aggregation" / f"{name}.yaml")
    rule = build({"_target_": choice["_target_"]})
    assert rule.name == name
    settings = CHOICES["aggregation"][choice["_target_"]]
    assert list(choice.get("defaults", [])) == [settings.__name__] * bool(fields(settings))
    assert vars(build({"_target_": choice["_target_"], **defaults_of(settings)})) == vars(rule)


@pytest.mark.parametrize("name", ["fedavg", "fellrec", "fedprox", "fedex_lora"])
def test_a_choice_builds_its_rule_with_the_defaults_of_its_class(name):
    """With LoRA, which some rules need."""
    rule = build_rule(compose([f"aggregation={name}", "adapter=lora"]))
    assert rule.name == name
    assert vars(rule) == vars(type(rule)())


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "persistence"])
def test_a_setting_of_another_rule_is_unknown(name):
    with pytest.raises(ConfigError, match=r"unknown setting 'aggregation.alpha'; choose from: aggregation\."):
        compose([f"aggregation={name}", "aggregation.alpha=0.3"])


def test_a_rule_of_ones_own_gets_what_is_given_and_no_defaults_of_another():
    config = compose(["aggregation._target_=my_package.MyRule", "+aggregation.needed=3"])
    assert dict(config.aggregation) == {"_target_": "my_package.MyRule", "needed": 3}
    rule = build_rule(config)
    assert (type(rule), rule.needed, rule.alpha) == (Mine, 3, 0.1)


def test_a_rule_of_ones_own_gets_a_setting_that_is_given_for_it():
    config = compose(["aggregation._target_=my_package.MyRule", "+aggregation.needed=3", "aggregation.alpha=0.7"])
    assert build_rule(config).alpha == 0.7


def test_a_rule_of_ones_own_may_have_the_settings_of_a_rule_of_the_package():
    rule = build_rule(compose(["aggregation._target_=my_package.Hotter", "aggregation.temperature=2"]))
    assert (type(rule), rule.temperature, rule.alpha) == (Hotter, 2, FELLRec().alpha)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"_target_": "fellrec.aggregation.FedAvgg"}, "_target_=fellrec.aggregation.FedAvgg cannot be imported"),
        ({"_target_": "no_such_package.Rule"}, "No module named 'no_such_package'"),
        ({"_target_": "Rule"}, "cannot be imported"),
        ({}, "aggregation needs a _target_: the name of a class"),
        ({"_target_": "my_package.not_a_rule"}, "not_a_rule is not a subclass of AggregationCallback"),
        ({"_target_": "fellrec.aggregation.AggregationCallback"}, "is not a subclass"),
        (
            {"_target_": "fellrec.aggregation.FELLRec", "alhpa": 1},
            "unknown setting 'aggregation.alhpa'; choose from: aggregation.alpha,",
        ),
        ({"_target_": "fellrec.aggregation.FedAvg", "momentum": 1}, "aggregation has no setting 'momentum'"),
        ({"_target_": "fellrec.aggregation.FELLRec", "alpha": -1}, "aggregation.alpha=-1 is not allowed"),
        ({"_target_": "my_package.MyRule"}, r"aggregation.needed needs a value: give \+aggregation.needed=…"),
    ],
)
def test_bad_configurations_are_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=lora_mixed"], "adapter=lora_mixed is not allowed, use adapter=lora, or aggregation=fedalt"),
        (["aggregation=hetlora", "adapter=lora", "adapter.rank=[8,4]"], "has 2 values, and there are 5 clients"),
        (
            ["aggregation=trimmed_mean", "aggregation.byzantine=3"],
            "trimmed_mean with byzantine=3 needs at least 7 clients",
        ),
    ],
)
def test_rules_refuse_other_settings(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_rule(compose(overrides))


def test_a_module_that_cannot_be_imported_says_what_it_raised(tmp_path, monkeypatch):
    (tmp_path / "my_broken_rules.py").write_text("class Mean:\n    raise TypeError('no way')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"my_broken_rules.Mean cannot be imported: its module raised TypeError: no way$"
    ):
        build({"_target_": "my_broken_rules.Mean"})


def test_fedavg_from_a_plain_mapping():
    assert isinstance(build({"_target_": "fellrec.aggregation.FedAvg"}), FedAvg)


@pytest.mark.parametrize("name", ["fedex_lora", "median", "fellrec"])
def test_a_run_is_called_after_the_choice(name):
    assert rule_name(compose([f"aggregation={name}"])) == name
    assert rule_name(compose(["aggregation._target_=my_package.Hotter"])) == "hotter"
