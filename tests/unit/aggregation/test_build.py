import inspect
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import fellrec.aggregation
from fellrec.aggregation import AggregationCallback, FedAvg, FELLRec, build_aggregation
from fellrec.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf" / "aggregation"
FILES = sorted(CONF.glob("*.yaml"))


class Mine(AggregationCallback):
    def __init__(self, needed: int, alpha: float = 0.1):
        self.needed, self.alpha = needed, alpha

    def mixing_matrix(self, updates, round_index):
        return torch.eye(len(updates.clients))


@pytest.fixture
def my_package(monkeypatch):
    module = type(inspect)("my_package")
    module.MyRule, module.not_a_rule = Mine, dict
    monkeypatch.setitem(__import__("sys").modules, "my_package", module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_builds_the_rule_of_its_name_without_a_warning(path, caplog):
    with caplog.at_level(logging.WARNING):
        assert build_aggregation(OmegaConf.load(path)).name == path.stem
    assert not caplog.records


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_repeats_the_defaults_of_the_signature(path):
    values = dict(OmegaConf.load(path))
    rule = getattr(fellrec.aggregation, values.pop("_target_").rpartition(".")[2])
    defaults = {name: parameter.default for name, parameter in inspect.signature(rule).parameters.items()}
    assert {name: value for name, value in values.items() if value is not None} == defaults


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_takes_the_overrides_of_a_sweep(path, caplog):
    cfg = OmegaConf.load(path)
    OmegaConf.set_struct(cfg, True)  # as Hydra does: only keys that are there can be overridden
    cfg.alpha, cfg.beta, cfg.temperature = 0.3, 2.0, 0.1
    with caplog.at_level(logging.WARNING):
        rule = build_aggregation(cfg)
    if path.stem == "fellrec":
        assert (rule.alpha, rule.beta, rule.temperature) == (0.3, 2.0, 0.1)
        assert not caplog.records
    else:
        assert "has no setting alpha, beta, temperature: ignored" in caplog.text


def test_null_means_the_default():
    assert build_aggregation({"_target_": "fellrec.aggregation.FELLRec", "beta": None}).beta == FELLRec().beta


def test_a_rule_of_ones_own_is_one_line(my_package, caplog):
    cfg = OmegaConf.merge(OmegaConf.load(CONF / "fellrec.yaml"), {"_target_": "my_package.MyRule", "needed": 3})
    with caplog.at_level(logging.WARNING):
        rule = build_aggregation(cfg)
    assert (type(rule), rule.needed, rule.alpha) == (Mine, 3, 0.7)
    assert "beta, temperature, attention, heating, similarity, fidelity: ignored" in caplog.text


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"_target_": "fellrec.aggregation.FedAvgg"}, "FedAvgg', which cannot be imported"),
        ({"_target_": "no_such_package.Rule"}, "No module named 'no_such_package'"),
        ({"_target_": "Rule"}, "cannot be imported"),
        ({}, "_target_ is None"),
        ({"_target_": "my_package.not_a_rule"}, "no subclass of AggregationCallback"),
        ({"_target_": "fellrec.aggregation.AggregationCallback"}, "no subclass"),
        (
            {"_target_": "fellrec.aggregation.FELLRec", "alhpa": 1},
            "unknown aggregation setting 'alhpa'; choose from: alpha,",
        ),
        ({"_target_": "fellrec.aggregation.FedAvg", "momentum": 1}, "unknown aggregation setting 'momentum'"),
        ({"_target_": "fellrec.aggregation.FELLRec", "alpha": -1}, "aggregation.alpha is -1"),
        ({"_target_": "my_package.MyRule"}, "Mine needs a value for aggregation.needed"),
    ],
)
def test_bad_configurations_are_refused(my_package, cfg, message):
    with pytest.raises(ConfigError, match=message):
        build_aggregation(cfg)


def test_fedavg_from_a_plain_mapping():
    assert isinstance(build_aggregation({"_target_": "fellrec.aggregation.FedAvg"}), FedAvg)
