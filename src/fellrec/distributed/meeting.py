"""How the processes of a run find each other: on the loopback interface, or on the address that is named for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from fellrec.errors import SplitError

_LOOPBACK = "127.0.0.1"
_INTERFACE = "GLOO_SOCKET_IFNAME"
_WATCH_SECONDS = 0.2


class MeetingStrategy(DDPStrategy):
    """Lightning's strategy for processes, with a store that listens on one address only.

    The store of ``torch.distributed`` listens on all interfaces. Where torchrun has one, that is used instead.
    """

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            assert self.cluster_environment is not None
            self._launcher = WatchingLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _setup_distributed(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        self._set_world_ranks()
        is_local = is_one_machine(environment, self.num_nodes)
        if is_local:
            use_loopback()
        if not dist.is_initialized() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            host = _LOOPBACK if is_local else environment.main_address
            rank, size = environment.global_rank(), environment.world_size()
            store = _store(host, environment.main_port, rank, size, timeout=self._timeout)
            backend = self._get_process_group_backend()
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=self._timeout)
        super()._setup_distributed()


class WatchingLauncher(_SubprocessScriptLauncher):
    """Fabric's launcher; a process that ends before all are connected ends the run with one message.

    Fabric's own observer kills all processes some seconds later and says nothing.
    """

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        threading.Thread(target=_watch, args=(self.procs,), daemon=True, name="watch").start()


def _watch(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Look at the processes until the list is emptied: they are connected, and the channel sees who ends."""
    while children:
        for number, child in enumerate(list(children), start=1):
            if status := child.poll():
                how = f"signal {-status}" if status < 0 else f"status {status}"
                sys.stderr.write(f"fellrec: process {number} ended before all processes were connected ({how})\n")
                for other in list(children):
                    other.kill()
                sys.stderr.flush()
                os._exit(1)
        time.sleep(_WATCH_SECONDS)


def is_one_machine(environment: ClusterEnvironment, num_nodes: int) -> bool:
    """Whether all processes of a run are on this machine, as far as the environment tells."""
    if isinstance(environment, LightningEnvironment):
        return num_nodes == 1
    if isinstance(environment, TorchElasticEnvironment):
        return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if isinstance(environment, SLURMEnvironment):
        return os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1"
    return False


def use_loopback() -> None:
    """Let gloo listen on the loopback interface, unless another one is named."""
    names = [name for _, name in socket.if_nameindex() if name.rstrip("0123456789") == "lo"]
    if names:
        os.environ.setdefault(_INTERFACE, names[0])


def _store(host: str, port: int, rank: int, size: int, **arguments: Any) -> dist.Store:
    """The store of the first process, or this process's connection to it.

    Raises:
        SplitError: If the first process cannot listen there.
    """
    if rank:
        return dist.TCPStore(host, port, size, is_master=False, **arguments)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(size)
    except OSError as error:
        listening.close()
        raise SplitError(
            f"process 0 cannot listen on MASTER_ADDR={host}, MASTER_PORT={port}: {error.strerror}; "
            "name an address of its machine and a free port"
        ) from error
    return dist.TCPStore(host, port, size, is_master=True, master_listen_fd=listening.detach(), **arguments)
