"""What ``fellrec list`` says must be what the classes and the configuration do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from omegaconf import OmegaConf

import fellrec.aggregation as rules
from fellrec.aggregation.settings import RULES
from fellrec.aggregation.settings.about import Family
from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.config.describe import choices, settings_of
from fellrec.config.paths import conf_dir, group_choices
from fellrec.config.registry import CHOICES
from fellrec.federated.settings import METRICS
from fellrec.functional.balance import STATISTICS
from fellrec.report.tables import NAMES, display_name


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
            for setting in settings_of(kind, key):
                if not setting.key.startswith("data.reader.columns."):  # they are data.columns
                    assert described[setting.key].text, setting.key
    data = choices("data")
    assert len({choice.summary for choice in data}) == len(data)
    assert all(s.text for group in group_choices() for choice in choices(group) for s in choice.settings)


def test_settings_within_a_setting_have_their_own_range_and_description() -> None:
    (tiny,) = [choice for choice in choices("backbone") if choice.name == "tiny"]
    found = {setting.key: setting for setting in tiny.settings}
    assert found["backbone.pretrain.steps"].default == compose([]).backbone.pretrain.steps
    assert found["backbone.pretrain.steps"].allowed == "a whole number of at least 1"
    assert "backbone.pretrain" not in found


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
          in tables: FedProx
          family: average
          paper: Li et al., MLSys 2020, arXiv:1812.06127
          sees: sums
          extra cost: none
          aggregation.mu=0.01 [a number of at least 0] μ, weight of the proximal term; 0 is FedAvg. The paper searches 0.001 to 1.
          aggregation.weights="samples" [samples or equal] How much clients count in the mean.
    """)
        + "\n"
    )


def test_the_list_of_all_rules_is_short_and_has_everything_but_the_descriptions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["list", "aggregation"])
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100
    for choice in choices("aggregation"):
        assert f"{choice.name}: {choice.summary}" in text or (
            f"{choice.name} ({choice.facts['in tables']}): {choice.summary}" in text
        )
        assert f"{choice.facts['paper']} · sees {choice.facts['sees']}" in text
        assert choice.facts["extra cost"] == "none" or f" · extra cost: {choice.facts['extra cost']}" in text
        own = text.partition(choice.summary)[2]
        for setting in choice.settings:
            assert f"{setting.key.rpartition('.')[2]}={json.dumps(setting.default)}" in own[:900], choice.name
    families = [line for line in lines if line.isupper() and not line.startswith(" ")]
    assert families == [f.upper() for f in get_args(Family)]
    for line, expected in {
        '  mu=0.01 [≥ 0] · weights="samples" [samples or equal]': "fedprox",
        '  epsilon=0.1 [0, 1] · server_learning_rate=1.0 [> 0] · step_length="mean_norm" [mean_norm or fixed]': "fedmgda",
    }.items():
        before = lines[: lines.index(line)]
        assert next(text for text in reversed(before) if not text.startswith(" ")).startswith(expected)


def test_all_of_every_rule_is_printed_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "aggregation", "--all"])
    everything = capsys.readouterr().out
    for name in ("fedprox", "krum"):
        main(["list", "aggregation", name])
        assert capsys.readouterr().out.strip() in everything
    assert everything.count("  paper: ") == len(RULES)


def test_every_rule_has_a_name_of_its_own_in_tables_and_figures() -> None:
    assert [kind.about.title.strip() for kind in RULES.values() if not kind.about.title.strip()] == []
    assert len({title.lower() for title in NAMES.values()}) == len(NAMES), "rules and reference rankers"
    for kind in RULES.values():
        assert display_name(f"{kind.about.name} mu=0.1") == f"{kind.about.title} mu=0.1"


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


def test_rules_presets_and_plurals_are_names_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for name, group in (("rules", "aggregation"), ("backbones", "backbone"), ("data", "data")):
        main(["list", name, "--format", "json"])
        assert [item["name"] for item in json.loads(capsys.readouterr().out)] == list(group_choices()[group])
    main(["list", "presets"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("experiment=")]
    assert len(lines) == len(group_choices()["experiment"]) >= 5
    assert all(line.partition(": ")[2] for line in lines), "a line about each"


def test_the_list_of_metrics_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "metrics", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["metrics"]) == METRICS
    assert set(found["figures"]) == {"mean", "pooled", *STATISTICS}


@pytest.mark.parametrize("name", ["trainer", "aggregation=fedprox", "backbone=hf", "participation=trace"])
def test_show_has_default_range_and_text_of_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", name])
    shown = capsys.readouterr().out
    group, _, choice = name.partition("=")
    (expected,) = [item for item in choices(group) if item.name == (choice or "default")]
    blocks = {block.splitlines()[0]: " ".join(block.split()) for block in shown.split("\n\n")[1:]}
    for setting in expected.settings:
        default = "needed" if setting.default == "???" else json.dumps(setting.default, ensure_ascii=False)
        text = f"{setting.key} default: {default} allowed: {setting.allowed or 'any value'} {setting.text}"
        assert blocks[setting.key] == " ".join(text.split())


def test_show_names_the_default_choice_and_what_a_preset_sets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "backbone"])
    shown = capsys.readouterr().out
    assert shown.startswith("backbone=tiny:")
    assert "other choices: hf, " in shown
    main(["show", "experiment=overfit_one_client"])
    shown = capsys.readouterr().out
    assert 'aggregation\n  value:   "local"' in shown
    assert "partition.num_clients\n  value:   1" in shown
    for wrong, told in (("presets", "give one, experiment="), ("trainr", "choose from: trainer")):
        with pytest.raises(SystemExit):
            main(["show", wrong])
        assert told in capsys.readouterr().err
