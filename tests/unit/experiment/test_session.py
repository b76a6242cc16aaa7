"""How many processes a run is to have, and what is said if there are others."""

from __future__ import annotations

import pytest

from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment import over_ranks
from fellrec.experiment.roles import Place, find_place
from fellrec.experiment.session import check_world, num_processes, processes_to_start

THREE = Place(1, 3, "env://")


@pytest.fixture(autouse=True)
def nobody_started_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([])
    assert check_world(config, None) == 1
    assert processes_to_start(config) == 0
    assert not over_ranks(config)


def test_the_other_processes_of_one_machine_are_started_unless_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["trainer.devices=3"])
    assert processes_to_start(config) == 2
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert find_place() == Place(1, 3, "tcp://127.0.0.1:29500")
    assert processes_to_start(config) == 0
    assert check_world(config, find_place()) == 3


def test_srun_tells_the_place_and_a_batch_script_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_JOB_ID": "1234567"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert find_place() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert find_place() == Place(2, 4, "tcp://a1:19567")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert find_place() == Place(2, 4, "tcp://10.0.0.1:29500")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert find_place() is None, "a shell that srun started"


def test_several_nodes_must_be_started_by_somebody() -> None:
    config = compose(["trainer.devices=2", "trainer.num_nodes=2"])
    assert processes_to_start(config) == 0
    with pytest.raises(ConfigError, match=r"needs 4 processes, and this is one: .* srun, or by torchrun --nnodes 2"):
        check_world(config, None)


@pytest.mark.parametrize("overrides", [[], ["trainer.devices=2"], ["trainer.devices=2", "trainer.num_nodes=2"]])
def test_another_number_of_processes_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"needs \d processes, and torchrun or srun started 3; start \d, or set"):
        check_world(compose(overrides), THREE)


def test_auto_is_as_many_as_there_are() -> None:
    config = compose(["trainer.devices=auto", "trainer.accelerator=cpu"])
    assert num_processes(config, THREE) == check_world(config, THREE) == 3
    assert num_processes(config, None) == 1


def test_groups_must_be_full() -> None:
    with pytest.raises(ConfigError, match="devices_per_client=2 does not divide the 3 processes"):
        check_world(compose(["trainer.devices=3", "trainer.devices_per_client=2"]), THREE)


@pytest.mark.parametrize("transport", ["inprocess", "distributed"])
def test_the_executed_cut_has_processes_of_its_own(transport: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.devices=2 is not allowed with split.transport="):
        compose(["trainer.devices=2", f"split.transport={transport}"])


@pytest.mark.parametrize("value", ["0", "1.5", "many"])
def test_devices_are_a_number_or_auto(value: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.devices=.* is not allowed: a whole number of at least 1, or auto"):
        compose([f"trainer.devices={value}"])
