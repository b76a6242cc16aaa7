"""What a configuration names is checked before anything is made of it."""

from __future__ import annotations

import pytest

from fellrec.cli.compare import compare
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.classes import check_classes, check_transforms
from fellrec.experiment.run import build

PROGRESS = "fellrec.callbacks.progress.RoundProgress"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"+callbacks.mine={{_target_: {PROGRESS}, titel: x}}", "unknown setting 'callbacks.mine.titel'; .*title"),
        ("exchange.transforms=[my_transform.Top]", "exchange.transforms=my_transform.Top is not allowed: settings"),
        (
            "exchange.transforms=[{_target_: fellrec.aggregation.FedAvg}]",
            "exchange.transforms._target_=fellrec.aggregation.FedAvg is not a subclass of Transform",
        ),
        (
            "exchange.transforms=[{_target_: fellrec.federated.exchange.Transform, kep: 0.2}]",
            "not a subclass of Transform",
        ),
    ],
)
def test_a_class_or_setting_that_cannot_be_is_refused_before_data_are_read(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_classes(compose([override]))


@pytest.mark.parametrize("rule", ["local", "centralized"])
def test_transforms_are_refused_where_nothing_is_exchanged(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; a comparison with other rules is told of it in one line."""
    monkeypatch.setattr("fellrec.experiment.build.build_data", lambda config: pytest.fail("data are read"))
    config = compose([f"aggregation={rule}", "exchange.transforms=[clip]"])
    message = f"exchange.transforms has no effect with aggregation={rule}, where no update leaves a client; use "
    with pytest.raises(ConfigError, match=message):
        build(config)
    with pytest.raises(ConfigError, match=message):
        compare([config])


def test_a_comparison_with_transforms_may_have_rules_without_exchange(caplog: pytest.LogCaptureFixture) -> None:
    names = ("local", "fedavg", "centralized", "ditto")
    check_transforms([compose([f"aggregation={name}", "exchange.transforms=[clip]"]) for name in names])
    (message,) = caplog.messages
    assert "no effect with aggregation=local, aggregation=centralized, where" in message
    check_transforms([compose(["aggregation=local"])])
    check_transforms([compose(["aggregation=fedavg", "exchange.transforms=[clip]"])])
    assert len(caplog.messages) == 1


def test_transforms_are_refused_for_pfedme_which_sends_another_model() -> None:
    with pytest.raises(ConfigError, match="aggregation pfedme does not work with transformed updates: exchange.transf"):
        check_classes(compose(["aggregation=pfedme", "exchange.transforms=[clip]"]))
