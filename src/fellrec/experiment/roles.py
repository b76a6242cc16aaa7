"""``split.transport=distributed``: what each process of a run is, and how they agree before anything is trained."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from fellrec.config.instantiate import as_dict
from fellrec.cut.messages import PROTOCOL_VERSION, Hello, Message, Ready
from fellrec.cut.processes import LEAD, SERVER, Worker, serve
from fellrec.data.prepared import PreparedData
from fellrec.distributed.channel import ToServer, Wire, role_name
from fellrec.errors import ConfigError, FellrecError, SplitError
from fellrec.experiment import (
    Recommender,
    attach_server,
    build_data,
    build_fabric,
    build_loop,
    build_recommender,
    build_server,
    connect,
    new_lead,
)
from fellrec.functional.nested import flatten
from fellrec.models.backbone import DTYPES
from fellrec.models.partial import fingerprint, load_share
from fellrec.models.split import SplitModel

_GRACE_SECONDS = 1.0
"""How long news of a process that is gone may take to arrive."""
_AGREED = ("seed", "split", "backbone", "adapter", "aggregation", "trainer", "participation")
"""Configuration that all processes must share."""


@dataclass(frozen=True)
class Place:
    """This process among those of the run.

    Attributes:
        rank: From 0.
        world_size: Processes.
        init_method: Where they meet.
    """

    rank: int
    world_size: int
    init_method: str

    @classmethod
    def from_environment(cls) -> Place:
        """What torchrun or srun say.

        Raises:
            ConfigError: If neither started this process, or there are too few.
        """
        place = find_place()
        if place is None:
            raise ConfigError(
                "split.transport=distributed needs one process for the server and at least one for clients: "
                "torchrun --nproc-per-node 3 -m fellrec train …, or srun; split.transport=inprocess needs one process"
            )
        if place.world_size < 2:
            raise ConfigError(
                "split.transport=distributed needs at least 2 processes (a server and a client), there is "
                f"{place.world_size}"
            )
        return place


def find_place() -> Place | None:
    """This process among those that torchrun or srun started; ``None`` if neither did, as in a batch script."""
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
        where = f"tcp://{environment.main_address}:{environment.main_port}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            where = "env://"  # torchrun's agent holds the port already
        return Place(environment.global_rank(), environment.world_size(), where)
    world_size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world_size == 1:
        return None
    # Not Lightning's SLURMEnvironment(), which refuses srun --ntasks.
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    address = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    port = os.environ.get("MASTER_PORT") or 15000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])
    return Place(int(os.environ["SLURM_PROCID"]), world_size, f"tcp://{address}:{port}")


class Team:
    """The processes of one distributed run, from meeting to leaving.

    Args:
        config: The composed configuration, the same in every process.
        place: This process.
    """

    def __init__(self, config: DictConfig, place: Place) -> None:
        self.config = config
        self.place = place
        rank_zero_only.rank = 0 if place.rank == LEAD else place.rank + 1  # type: ignore[attr-defined]
        self.fabric = build_fabric(config)
        self.wire = Wire(
            place.rank, place.world_size, place.init_method, config.split.timeout_seconds, self.fabric.device
        )
        others = [rank for rank in range(place.world_size) if rank != place.rank]
        self.wire.listen(others if place.rank in (SERVER, LEAD) else [SERVER, LEAD])

    @property
    def workers(self) -> list[int]:
        """Ranks of the client processes other than the first."""
        return list(range(LEAD + 1, self.place.world_size))

    def lead(self, config: DictConfig, data: PreparedData) -> Recommender:
        """The first client process: load the clients' share and agree with the others.

        Returns:
            A recommender whose loops train through the team.
        """
        recommender = build_recommender(config, data)
        folder = recommender.backbone.folder
        assert folder is not None
        facts, num_clients = self._facts(folder), data.num_clients
        hello = Hello(facts, str(folder.resolve()), num_clients)
        body_names = self._greet(SERVER, hello)
        for rank in self.workers:
            self._greet(rank, Hello(facts, hello.folder, num_clients, body_names))
        return new_lead(recommender, self.wire, self.workers, body_names)

    def follow(self) -> None:
        """Every other process: agree with the first client process, and serve or work until the run is over."""
        hello = self.wire.receive(LEAD)
        if not isinstance(hello, Hello):
            raise SplitError(f"{role_name(LEAD)} began with {type(hello).__name__}, expected Hello")
        own = as_dict(self.config.backbone).get("path")
        folder = Path(own or hello.folder).expanduser()  # each node may have the backbone in a folder of its own
        self._agree(hello.facts, self._facts(folder))
        if self.place.rank == SERVER:
            self._serve(folder, hello.num_clients)
        else:
            self._work(hello)

    def _greet(self, rank: int, hello: Hello) -> tuple[str, ...]:
        self.wire.send(rank, hello)
        answer: Message = self.wire.receive(rank)
        if not isinstance(answer, Ready):
            raise SplitError(f"{role_name(rank)} answered with {type(answer).__name__}, expected Ready")
        return answer.body_names

    def _serve(self, folder: Path, num_clients: int) -> None:
        config, split = self.config, self.config.split
        dtype = DTYPES[config.backbone.get("dtype") or "float32"]
        body = load_share(folder, "server", split.head_layers, split.tail_layers, dtype)
        share = attach_server(config, SplitModel(body, split.head_layers, split.tail_layers), self.fabric)
        server = build_server(config, share, num_clients, self.fabric)
        self.wire.send(LEAD, Ready(tuple(sorted(share.trainable))))
        serve(self.wire, server, skips=config.participation.on_failure == "skip")

    def _work(self, hello: Hello) -> None:
        recommender = build_recommender(self.config, build_data(self.config))
        loop = build_loop(self.config, recommender, ())
        execution = connect(self.config, loop, recommender, ToServer(self.wire), hello.body_names)
        self.wire.send(LEAD, Ready())
        Worker(loop, execution, self.wire).run()

    def _facts(self, folder: Path) -> dict[str, Any]:
        plain = flatten({name: as_dict(self.config)[name] for name in _AGREED})
        plain.pop("split.timeout_seconds", None)
        # As text: what is compared came through JSON.
        facts = {key: repr(value) for key, value in plain.items() if not key.startswith("backbone.path")}
        versions = {"protocol version": str(PROTOCOL_VERSION), "torch version": torch.__version__}
        return {**facts, **versions, "backbone's fingerprint": fingerprint(folder)}

    def _agree(self, theirs: Any, own: dict[str, Any]) -> None:
        differing = [key for key in sorted({*theirs, *own}) if theirs.get(key) != own.get(key)]
        if differing:
            lines = [f"{key}: {theirs.get(key)} and {own.get(key)}" for key in differing[:5]]
            raise SplitError(f"{role_name(LEAD)} and {role_name(self.place.rank)} differ in " + "; ".join(lines))


def run_role(config: DictConfig, lead: Any) -> None:
    """Be what this process's rank says.

    Args:
        config: The composed configuration.
        lead: Called in the first client process with the team; trains and reports.

    Raises:
        FellrecError: After all peers were told why this process gives up.
    """
    place = Place.from_environment()
    team = Team(config, place)
    try:
        if place.rank == LEAD:
            with waiting_for_news(team.wire):
                lead(team)
        else:
            leave_signals_to_the_lead()
            team.follow()
    except FellrecError as error:
        text = str(error)
        team.wire.abort(text if text.startswith("rank ") else f"{role_name(place.rank)} stopped: {text}")
        raise
    except BaseException as error:
        team.wire.abort(f"{role_name(place.rank)} stopped: {type(error).__name__}: {error}")
        raise
    team.wire.close()


def leave_signals_to_the_lead() -> None:
    """Ctrl-C and a scheduler's signals reach all processes; the first client process decides, and tells the others."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def waiting_for_news(wire: Wire) -> Iterator[None]:
    """While this lasts, SIGTERM is dealt with as before, unless another process is gone: then that is what is reported.

    torchrun ends all processes when one is gone, which would leave its user without a reason.
    """

    def on_signal(number: int, frame: Any) -> None:
        time.sleep(_GRACE_SECONDS)
        if not wire.gone:
            if not callable(before):
                raise SystemExit(128 + number)
            before(number, frame)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
