"""How many processes a run has, which launcher is detected, and what is refused."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from lightning import Fabric
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.plugins.environments import mpi as lightning_mpi

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.distributed.processes import external_processes, launched_devices
from fellrec.errors import ConfigError
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.session import check_processes

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "GROUP_RANK": "0",
    "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_NODELIST": "a[1-2]",
         "SLURM_NODELIST": "a[1-2]"}  # fmt: skip
"""What a batch script of SLURM finds, in a job with ``--nodes=2 --ntasks=4``."""
SRUN = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "2", "SLURM_NODEID": "1"}  # fmt: skip
"""What the third task finds that srun started there."""


@pytest.fixture(autouse=True)
def started_by_nothing() -> Iterator[None]:
    """No launcher's variables; those that are set in a test, or by a cluster environment, are gone after it."""
    before = dict(os.environ)
    known = (
        "SLURM_",
        "TORCHELASTIC_",
        "LSB_",
        "JSM_",
        "MASTER_",
        "RANK",
        "LOCAL_",
        "WORLD_SIZE",
        "GROUP_RANK",
        "NODE_RANK",
    )
    for name in [name for name in os.environ if name.startswith(known)]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def fabric_of(*overrides: str) -> Fabric:
    return build_fabric(compose(["trainer.accelerator=cpu", *overrides]))


def environment_of(fabric: Fabric) -> ClusterEnvironment:
    """What tells Fabric its place among the processes."""
    found: ClusterEnvironment = fabric.strategy.cluster_environment  # type: ignore[attr-defined]
    return found


def test_without_a_launcher_fabric_starts_the_processes() -> None:
    assert external_processes() is None
    assert fabric_of().world_size == 1
    assert fabric_of("trainer.devices=auto").world_size == 1
    fabric = fabric_of("trainer.devices=3")
    assert isinstance(environment_of(fabric), LightningEnvironment)
    assert not environment_of(fabric).creates_processes_externally
    assert (fabric.world_size, fabric.global_rank) == (3, 0)


def test_torchrun_is_detected() -> None:
    os.environ |= TORCHRUN
    assert external_processes() == 3
    for devices in ("3", "auto"):
        fabric = fabric_of(f"trainer.devices={devices}")
        assert isinstance(environment_of(fabric), TorchElasticEnvironment)
        assert (fabric.world_size, fabric.global_rank, fabric.local_rank) == (3, 1, 1)


@pytest.mark.parametrize("job_name", ["sweep", "interactive"], ids=["sbatch", "salloc"])
@pytest.mark.parametrize("per_node", [{}, {"SLURM_NTASKS_PER_NODE": "2"}], ids=["ntasks", "ntasks-per-node"])
def test_srun_is_detected(job_name: str, per_node: dict[str, str]) -> None:
    os.environ |= SRUN | per_node | {"SLURM_JOB_NAME": job_name}
    assert external_processes() == 4
    fabric = fabric_of("trainer.devices=2", "trainer.num_nodes=2")
    environment = environment_of(fabric)
    assert isinstance(environment, SLURMEnvironment)
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank) == (4, 2, 0, 1)
    assert (environment.main_address, environment.main_port) == ("a1", 19567)
    environment.validate_settings(num_devices=2, num_nodes=2)


@pytest.mark.parametrize(
    "variables",
    [BATCH, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}],
    ids=["batch script", "shell that srun started"],
)
@pytest.mark.parametrize("devices", ["1", "2", "auto"])
def test_a_job_of_slurm_without_srun_counts_as_one_process(variables: dict[str, str], devices: str) -> None:
    os.environ |= variables
    assert external_processes() is None
    fabric = fabric_of(f"trainer.devices={devices}")
    assert fabric.world_size == (2 if devices == "2" else 1)
    assert fabric.global_rank == 0
    if devices == "2":
        assert isinstance(environment_of(fabric), LightningEnvironment)


def test_jsrun_of_lsf_is_detected(tmp_path: Path) -> None:
    """The launch node comes first in the list of hosts and runs no process."""
    (tmp_path / "hosts").write_text(f"launch\nfirst\n{socket.gethostname()}\n")
    os.environ |= {
        "LSB_JOBID": "1234567", "LSB_DJOB_RANKFILE": str(tmp_path / "hosts"), "JSM_NAMESPACE_RANK": "1",
        "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_LOCAL_SIZE": "1",
    }  # fmt: skip
    assert external_processes() == 2
    fabric = fabric_of("trainer.devices=1", "trainer.num_nodes=2")
    environment = environment_of(fabric)
    assert isinstance(environment, LSFEnvironment)
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank) == (2, 1, 0, 1)
    assert (environment.main_address, environment.main_port) == ("first", 10567)


class OneHost:
    """A communicator of MPI with three processes on this host, of which this is the last."""

    def Get_size(self) -> int:
        return 3

    def Get_rank(self) -> int:
        return 2

    def gather(self, value: str, root: int) -> None:
        return None

    def bcast(self, value: object, root: int) -> object:
        return [socket.gethostname()] if isinstance(value, list) else value

    def Split(self, color: int) -> OneHost:
        return self


def test_mpirun_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning asks mpi4py, which need not be installed here: a stand-in has what Lightning calls."""
    package, module = ModuleType("mpi4py"), ModuleType("mpi4py.MPI")
    package.MPI, module.COMM_WORLD = module, OneHost()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)
    monkeypatch.setattr(lightning_mpi, "_MPI4PY_AVAILABLE", True)
    assert external_processes() == 3
    fabric = fabric_of("trainer.devices=3")
    assert isinstance(environment_of(fabric), MPIEnvironment)
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank) == (3, 2, 2, 0)


def test_a_cluster_environment_of_the_configuration_is_used() -> None:
    os.environ |= TORCHRUN | {"LOCAL_RANK": "1"}
    target = "lightning.fabric.plugins.environments.LightningEnvironment"
    fabric = fabric_of("trainer.devices=3", f"trainer.plugins=[{{_target_:{target}}}]")
    assert isinstance(environment_of(fabric), LightningEnvironment)


def test_several_nodes_need_a_launcher() -> None:
    with pytest.raises(ConfigError, match=r"needs processes on 2 nodes: start them by srun, or .* torchrun --nnodes 2"):
        launched_devices(2, 2)
    os.environ["NODE_RANK"] = "1"
    assert launched_devices(2, 2) == (2, 2), "the command is run on each node"


@pytest.mark.parametrize(("devices", "num_nodes", "needed"), [(1, 1, 1), (2, 1, 2), (2, 2, 4)])
def test_another_number_of_processes_is_refused(devices: int, num_nodes: int, needed: int) -> None:
    os.environ |= TORCHRUN
    expected = rf"needs {needed} processes, and 3 were started; start {needed}, or set trainer.devices=auto"
    with pytest.raises(ConfigError, match=expected):
        launched_devices(devices, num_nodes)


def test_auto_is_as_many_as_were_started() -> None:
    os.environ |= TORCHRUN
    assert launched_devices("auto", 1) == (3, 1)
    assert launched_devices("auto", 3) == (1, 3)
    with pytest.raises(ConfigError, match="trainer.num_nodes=2 does not divide the 3 processes"):
        launched_devices("auto", 2)


@pytest.mark.parametrize(
    ("overrides", "num_processes", "problem"),
    [
        (["trainer.devices_per_client=2"], 3, "devices_per_client=2 does not divide the 3 processes"),
        (["split.transport=inprocess"], 2, "split.transport=inprocess needs one process, not 2"),
        (["split.transport=distributed"], 1, "set trainer.devices=3, or trainer.devices=auto if torchrun"),
        (["split.transport=distributed", "trainer.devices_per_client=2"], 4, "needs split.transport=none"),
    ],
)
def test_numbers_of_processes_that_the_settings_cannot_use(
    overrides: list[str], num_processes: int, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_processes(compose(overrides), num_processes)


@pytest.mark.parametrize(
    "overrides",
    [["trainer.devices=2", "split.transport=inprocess"], ["split.transport=distributed"]],
)
def test_the_command_refuses_them_before_it_loads_anything(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(
            [
                "train",
                "trainer.accelerator=cpu",
                *overrides,
                f"run_dir={tmp_path / 'run'}",
                f"cache_dir={tmp_path / 'cache'}",
            ]
        )
    assert capsys.readouterr().err.startswith("fellrec train: split.transport=")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "1.5", "many"])
def test_devices_are_a_number_or_auto(value: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.devices"):
        compose([f"trainer.devices={value}"])
