"""Runs of earlier versions have no samplers and no transforms in their configuration, and are read as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fellrec.config.compose import compose
from fellrec.config.instantiate import as_dict
from fellrec.config.stored import read_config, to_yaml
from fellrec.errors import ConfigError
from fellrec.state.run_folder import CONFIG


def test_a_configuration_without_what_is_newer_is_read_as_it_was(tmp_path: Path) -> None:
    config = compose(["participation.rate=0.5"])
    old: Any = OmegaConf.to_container(config, resolve=True)
    del old["exchange"]
    for name in ("sampler", "dropout", "slowdown", "over_selection", "step_seconds"):
        del old["participation"][name]
    (tmp_path / CONFIG).write_text(to_yaml(OmegaConf.create(old)))
    assert as_dict(read_config(tmp_path)) == as_dict(config)


def test_a_group_that_is_no_mapping_is_still_refused(tmp_path: Path) -> None:
    config = compose([])
    OmegaConf.update(config, "participation", 3, force_add=True)
    (tmp_path / CONFIG).write_text(to_yaml(config))
    with pytest.raises(ConfigError, match="participation=3 is not allowed"):
        read_config(tmp_path)


@pytest.mark.parametrize("choice", ["by_size", "power_of_choice", "trace"])
def test_choices_of_participation_have_samplers_and_the_settings_of_all(choice: str) -> None:
    config = compose([f"participation={choice}", *(["participation.sampler.path=t.csv"] if choice == "trace" else [])])
    assert (
        config.participation.sampler._target_.lower() == f"fellrec.federated.samplers.{choice.replace('_', '')}sampler"
    )
    assert (config.participation.quorum, config.participation.slowdown) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["participation=trace"], "participation.sampler.path needs a value: give participation.sampler.path=…"),
        (["participation=by_sise"], "unknown participation 'by_sise'; choose from: by_size"),
        (["participation.slowdown=0.5"], "participation.slowdown=0.5 is not allowed: a number of at least 1"),
        (["participation.slowdwon=2"], "unknown setting 'participation.slowdwon'; choose from: participation.slowdown"),
        (
            ["participation=power_of_choice", "participation.sampler.num_candidates=0"],
            "participation.sampler.num_candidates=0 is not allowed",
        ),
    ],
)
def test_bad_settings_of_participation_are_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert str(error.value).startswith(message)
