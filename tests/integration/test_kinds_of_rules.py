"""A rule of each kind in real runs: through the cut, over processes and resumed, the bits are those of one plain run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_tensors import all_tensors, assert_same, own_tensors
from torch import Tensor

import fellrec.aggregation
from fellrec.aggregation.settings import RULES
from fellrec.config.compose import compose
from fellrec.experiment.build import Recommender, build_data, build_recommender, recommender_key
from fellrec.experiment.federation import Federation, build_federation
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.loop import FederatedLoop

from .processes import FELLREC, Processes, alone, assert_same_run

KINDS = {
    "fellrec": "a matrix",
    "persistence": "a matrix that depends on earlier rounds",
    "fedprox": "weights of updates, and a local term",
    "fedadam": "one model with state",
    "ditto": "personal models",
    "apfl": "a second model that is trained beside the adapter",
    "fedper": "personal parameters",
    "scaffold": "tensors of the clients",
    "rolora": "halves of LoRA in turn",
    "fedex_lora": "a changed base",
}
"""Rule → what it stands for."""
WITH_CUT = {
    **KINDS,
    "fltrust": "a training of the server",
    "fed_sb": "small matrices between frozen factors",
    "ravan": "several of them, with factors",
    "fedalt": "a router, and the others' LoRA",
}
"""Those that are checked in one process."""
ADAPTERS = {"fed_sb": "lora_sb", "ravan": "lora_heads", "fedalt": "lora_mixed"}
"""Rules with an adapter other than LoRA."""
HOW = ["adapter=lora", "backbone.num_layers=4", "participation.rate=0.7", "trainer.num_rounds=3"]


@pytest.fixture(scope="module")
def federation_of(tiny_overrides: list[str]) -> Callable[..., Federation]:
    """Makes the federation of some overrides in one of several models, each of which is loaded once."""
    loaded: dict[tuple[str, str], Recommender] = {}

    def make(model: str, *overrides: str) -> Federation:
        config = compose([*tiny_overrides, *HOW, *overrides])
        key = model, recommender_key(config)
        if key not in loaded:
            loaded[key] = build_recommender(config, build_data(config))
        return build_federation(config, loaded[key])

    return make


def state_of(loop: FederatedLoop) -> dict[str, Tensor]:
    base = {
        f"base {n} {key}": t for n, change in enumerate(loop.population.base) for key, t in change.tensors().items()
    }
    return {**all_tensors(loop), **own_tensors(loop), **base}


@pytest.mark.parametrize("name", WITH_CUT)
def test_the_cut_and_a_resume_change_no_bit(
    name: str, federation_of: Callable[..., Federation], tmp_path: Path
) -> None:
    """The resumed run has a model of its own, as in another process."""
    how = [f"aggregation={name}", *([f"adapter={ADAPTERS[name]}", "adapter.rank=4"] if name in ADAPTERS else [])]
    whole = federation_of("first", *how).loop()
    whole.run()
    first = federation_of("first", *how)
    loop = first.loop()
    loop.validate(-1)
    loop.run_round(0)
    CheckpointFolder(tmp_path).save(first.persisted, 1)
    second = federation_of("second", *how)
    CheckpointFolder(tmp_path).load(second.persisted)
    resumed = second.loop()
    resumed.run()
    assert_same(state_of(whole), state_of(resumed))
    class_name = next(key for key, kind in RULES.items() if kind.about.name == name)
    if not getattr(fellrec.aggregation, class_name).limits.whole_model:
        cut = federation_of("cut", *how, "split.transport=inprocess").loop()
        cut.run()
        assert_same(state_of(whole), state_of(cut))


@pytest.mark.parametrize("devices", [2])  # three are in test_pool.py, for fewer rules
def test_processes_change_no_bit(devices: int, tiny_overrides: list[str], tmp_path: Path) -> None:
    """One command for all kinds: processes take seconds to start."""
    given = ["compare", *tiny_overrides, *HOW[:-1], f"aggregation={','.join(KINDS)}", "partition.num_clients=4"]
    given += ["trainer.timeout_seconds=100", "references.show=[]", "tracking.uri=null"]
    alone([*given, f"run_dir={tmp_path / 'one'}"])
    command = [*FELLREC, *given, f"run_dir={tmp_path / 'several'}", f"trainer.devices={devices}"]
    processes = Processes([command], tmp_path, are_one_run=False)
    try:
        assert processes.wait() == [0], processes.output()
    finally:
        processes.kill()
    for name in KINDS:
        assert_same_run(tmp_path / "several" / f"{name}-s0", tmp_path / "one" / f"{name}-s0")
