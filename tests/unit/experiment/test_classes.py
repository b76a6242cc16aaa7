"""What a configuration names is checked before anything is made of it."""

from __future__ import annotations

import pytest

from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.classes import check_classes

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
