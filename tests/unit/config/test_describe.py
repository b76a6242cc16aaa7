"""What ``fellrec list`` says must be what the classes and the configuration do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from omegaconf import OmegaConf

import fellrec.aggregation as rules
from fellrec.aggregation.settings import RULES
from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.config.describe import choices
from fellrec.config.paths import conf_dir, group_choices
from fellrec.config.registry import CHOICES


def test_every_rule_is_a_choice_a_class_and_an_entry_of_the_catalogue() -> None:
    targets = {
        name: yaml.safe_load((conf_dir() / "aggregation" / f"{name}.yaml").read_text())["_target_"]
        for name in group_choices()["aggregation"]
    }
    assert targets == {kind.about.name: f"fellrec.aggregation.{name}" for name, kind in RULES.items()}
    assert sorted(rules.__all__) == sorted(["AggregationCallback", *RULES])
    for name, kind in RULES.items():
        rule = getattr(rules, name)
        assert issubclass(rule, kind)
        assert rule.own_about is kind.about
        assert rule.sees == kind.about.sees


def test_every_setting_of_every_choice_has_a_description_and_a_default() -> None:
    for key, kinds in CHOICES.items():
        group = key.partition(".")[0]
        described = {s.key: s for choice in choices(group) for s in choice.settings}
        for kind in set(kinds.values()):
            for field in fields(kind):
                assert described[f"{key}.{field.name}"].text, f"{kind.__name__}.{field.name}"


def test_the_list_has_the_values_that_a_choice_sets() -> None:
    """As composed, beside the settings that all choices of the group have."""
    for choice in choices("participation"):
        needed = ["participation.sampler.path=t.csv"] if choice.name == "trace" else []
        config = compose([f"participation={choice.name}", *needed])
        shown = {setting.key: setting.default for setting in choice.settings}
        expected = {key: OmegaConf.select(config, key) for key in shown}
        assert {**shown, **({"participation.sampler.path": "t.csv"} if needed else {})} == expected
        assert {"participation.rate", "participation.dropout", "participation.quorum"} <= shown.keys()
        assert choice.summary


def test_the_list_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "aggregation", "fedprox"])
    assert (
        capsys.readouterr().out
        == inspect.cleandoc("""
        aggregation=fedprox: FedAvg; clients add μ/2 ‖v − w‖², w the received adapter, to their loss
          family: average
          paper: Li et al., MLSys 2020, arXiv:1812.06127
          sees: sums
          extra cost: none
          aggregation.mu=0.01 [a number of at least 0] μ, weight of the proximal term; 0 is FedAvg. The paper searches 0.001 to 1.
          aggregation.weights="samples" [samples or equal] How much clients count in the mean.
    """)
        + "\n"
    )


def test_the_list_takes_what_an_override_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "aggregation", "fedprox", "ditto"])
    expected = capsys.readouterr().out
    main(["list", "aggregation=fedprox,ditto"])
    assert capsys.readouterr().out == expected


def test_the_list_as_json_has_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    for group, names in group_choices().items():
        main(["list", group, "--format", "json"])
        assert [choice["name"] for choice in json.loads(capsys.readouterr().out)] == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agregation"], "unknown group 'agregation'; choose from: aggregation,"),
        (["aggregation=fedporx"], "unknown aggregation 'fedporx'; choose from: fedprox,"),
        (["aggregation", "fedporx"], "unknown aggregation 'fedporx'; choose from: fedprox,"),
    ],
)
def test_unknown_names_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["list", *words])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_the_list_needs_no_pytorch() -> None:
    code = "import sys; from fellrec.cli.main import main\nmain(['list', 'aggregation'])\n"
    code += "sys.exit(bool({'torch', 'lightning', 'transformers', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
