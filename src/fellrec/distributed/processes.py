"""The processes of one command: who started them, how many there are, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from fellrec.distributed.channel import Channel
from fellrec.errors import ConfigError

_GRACE_SECONDS = 1.0
"""How long the message that a process has ended may take to arrive."""
_PATIENCE_SECONDS = 20.0
"""How long the processes that this one started may take to end after it is done."""

_PROCESSES_PER_CORE, _LEAST_ALLOWED = 4, 8
"""Limits of the processes of one node without GPUs; each needs about 1 GB."""


def cluster_environment() -> ClusterEnvironment:
    """The cluster environment of torchrun, srun, jsrun (LSF) or mpirun, whichever started this process.

    If none of them did, it is Lightning's own, which starts the other processes. A batch script of SLURM without srun
    counts as such, and so does a single task of srun, such as a shell.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # also in an allocation of salloc, unlike Lightning
        _allow_ntasks()
        return SLURMEnvironment()
    for environment in (LSFEnvironment, MPIEnvironment):
        if environment.detect():
            return environment()
    return LightningEnvironment()


def external_processes() -> int | None:
    """How many processes torchrun, srun, jsrun (LSF) or mpirun started; ``None`` if none of them did."""
    environment = cluster_environment()
    return None if isinstance(environment, LightningEnvironment) else int(environment.world_size())


def check_cores(devices: int) -> None:
    """Check that processes which share the cores of this node are not too many for its cores and memory.

    Raises:
        ConfigError: If they are.
    """
    cores = os.cpu_count() or 1
    most = max(_LEAST_ALLOWED, _PROCESSES_PER_CORE * cores)
    if devices > most:
        raise ConfigError(
            f"trainer.devices={devices} is not allowed on the CPU: at most {most} processes on this node, which has "
            f"{cores} cores"
        )


def launched_devices(devices: int | str, num_nodes: int) -> tuple[int | str, int]:
    """Devices per node and nodes for Fabric.

    ``auto`` is as many processes as were started; if none were, it is left to Fabric: all GPUs, or one process.

    Raises:
        ConfigError: If as many processes as the settings need were not started; says how to start them.
    """
    started = external_processes()
    settings = f"trainer.devices={devices} × trainer.num_nodes={num_nodes}"
    if started is None:
        if num_nodes > 1 and "NODE_RANK" not in os.environ:
            raise ConfigError(
                f"{settings} needs processes on {num_nodes} nodes: start them by srun, or on each node by "
                f"torchrun --nnodes {num_nodes} --nproc-per-node {devices} -m fellrec train …"
            )
        return devices, num_nodes
    if devices == "auto":
        if started % num_nodes:
            raise ConfigError(f"trainer.num_nodes={num_nodes} does not divide the {started} processes")
        return started // num_nodes, num_nodes
    if started != int(devices) * num_nodes:
        raise ConfigError(
            f"{settings} needs {int(devices) * num_nodes} processes, and {started} were started; "
            f"start {int(devices) * num_nodes}, or set trainer.devices=auto"
        )
    return int(devices), num_nodes


def _allow_ntasks() -> None:
    """Lightning's SLURM environment refuses ``srun --ntasks`` unless it knows the tasks per node."""
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1")))
        os.environ["SLURM_NTASKS_PER_NODE"] = str(int(os.environ["SLURM_STEP_NUM_TASKS"]) // nodes)


@contextmanager
def children_of(launcher: Any) -> Iterator[None]:
    """While this lasts, the processes that Fabric started run; they are ended if they do not end after it.

    Fabric's observer kills all processes a few seconds after one has failed, before they could report why. It watches
    the launcher's list of processes, so it ends when the list is empty.
    """
    children: list[subprocess.Popen[bytes]] = list(getattr(launcher, "procs", ()))
    if children:
        launcher.procs.clear()
    try:
        yield
    finally:
        for child in children:
            try:
                child.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def leave_signals_to_the_coordinator() -> None:
    """Ctrl-C and a scheduler's signals reach all processes; the coordinator decides, and stops the others."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def reporting_lost_processes(channel: Channel) -> Iterator[None]:
    """While this lasts, SIGTERM is handled as before, unless another process has ended: then that is reported.

    torchrun ends all processes when one has ended, which would leave its user without a reason.
    """

    def on_signal(number: int, frame: Any) -> None:
        """Give the channel time to report a lost process; if there is none, handle the signal as before."""
        time.sleep(_GRACE_SECONDS)
        if not channel.gone:
            if not callable(before):
                raise SystemExit(128 + number)
            before(number, frame)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
