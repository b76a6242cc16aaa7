"""The processes of one command: the coordinator, its workers, and the body server of an executed cut."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from omegaconf import DictConfig
from torch import Tensor

from fellrec.config.instantiate import as_dict
from fellrec.config.paths import cache_dir
from fellrec.cut.link import OverChannel
from fellrec.cut.serve import serve
from fellrec.cut.server import BodyServer
from fellrec.data.prepared import PreparedData
from fellrec.distributed.agreement import differences, fingerprint
from fellrec.distributed.batch_sharing import BatchSharing
from fellrec.distributed.channel import CPU, AbortedError, Channel, Naming
from fellrec.distributed.message import PROTOCOL_VERSION, Done, Message, Stop, reading
from fellrec.distributed.processes import (
    children_of,
    leave_signals_to_the_coordinator,
    reporting_lost_processes,
)
from fellrec.distributed.secret import new_secret, shared_secret
from fellrec.errors import ConfigError, FellrecError, SplitError
from fellrec.experiment.auto import Candidate, chosen
from fellrec.experiment.backbones import cached_backbone
from fellrec.experiment.build import (
    Recommender,
    attach_server,
    backbone_path,
    build_data,
    build_recommender,
    recommender_key,
)
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.federation import build_serial, build_server
from fellrec.experiment.precision import use_precision, weights_dtype
from fellrec.federated.ledger import Ledger
from fellrec.functional.nested import flatten
from fellrec.models.backbone import DTYPES, local_folder
from fellrec.models.partial import fingerprint as fingerprint_of
from fellrec.models.partial import load_partial
from fellrec.models.split import SplitModel
from fellrec.pool.executor import PoolExecutor, Worker
from fellrec.pool.messages import Begin, Begun, MeasureLosses, ScoreClients, TrainClients
from fellrec.pool.pool import COORDINATOR, Pool, process_groups

_AGREED = ("seed", "split", "backbone", "adapter", "aggregation", "objective", "ranker", "trainer", "participation")
"""Settings that all processes must share. The data that they prepare are compared by their key."""
_OWN = ("backbone.path", "adapter.path", "split.timeout_seconds")
"""Those of which each process may have its own value."""


class Session:
    """One process of a command, as soon as all of them are connected.

    Args:
        configs: The composed configurations of the command's runs, the same in every process. What a process builds
            comes from its own: a message says which, and nothing else.
        fabric: Launched.
        secret: See `shared_secret`.
    """

    def __init__(self, configs: Sequence[DictConfig], fabric: Fabric, secret: bytes) -> None:
        self.configs = configs
        self.config = config = configs[0]
        self.fabric = fabric
        self.process, size = fabric.global_rank, fabric.world_size
        has_server = config.split.transport == "distributed"
        self.server = size - 1 if has_server else None
        self.clients = tuple(range(size - 1 if has_server else size))
        naming = Naming(self.name_of, "split.timeout_seconds" if has_server else "trainer.timeout_seconds")
        timeout = config.split.timeout_seconds if has_server else config.trainer.timeout_seconds
        # Without a server, what processes send each other is small and on the CPU.
        device = fabric.device if has_server else CPU
        self.channel = Channel(self.process, size, timeout, secret, device, naming)
        others = {process for process in range(size) if process != self.process}
        central = {COORDINATOR, self.server}
        self.channel.listen(sorted(others if self.process in central else others & central))
        self.pool = Pool(
            self.channel, self.clients, config.trainer.devices_per_client, config.participation.on_failure == "skip"
        )
        self.sharing = self._sharing()
        self._data: PreparedData | None = None
        self._recommender: tuple[str, Recommender] | None = None
        self._worker: Worker | None = None

    def name_of(self, process: int) -> str:
        """How messages call a process."""
        if self.server is None:
            return f"process {process}"
        return f"process {process} ({'the server' if process == self.server else 'a client process'})"

    def begin(self, config: DictConfig, recommender: Recommender, num_rows: int) -> dict[str, Tensor]:
        """Let all other processes prepare for a run; gives the body's initial adapter, if there is a server.

        Raises:
            SplitError: If a process differs in what all must agree on.
        """
        folder, settings = recommender.backbone.folder, self._settings(config)
        choice = Candidate(config.trainer.precision, config.trainer.attention)
        number = [self._settings(chosen(own, choice)) for own in self.configs].index(settings)
        is_cached = folder is not None and config.backbone.name != "hf"
        key = folder.name if folder is not None and is_cached else ""
        agreed = settings | self._fingerprint(recommender, folder)
        message = Begin(number, agreed, key, num_rows, choice.precision, choice.attention)
        body: dict[str, Tensor] = {}
        if self.server is not None:
            self.channel.send(self.server, message)
            answer = self.channel.receive(self.server)
            if not isinstance(answer, Begun):
                raise SplitError(f"unexpected message {type(answer).__name__}, expected Begun")
            body = {name: tensor.cpu() for name, tensor in answer.adapter.items()}
        self.pool.ask_all(message, Begun)
        return body

    def transport(self) -> OverChannel:
        """The connection of this client process to the server."""
        assert self.server is not None
        return OverChannel(self.channel, self.server)

    def executor(self, local: Any, ledger: Ledger) -> PoolExecutor:
        """Carries out jobs on all client processes."""
        return PoolExecutor(self.pool, local, ledger)

    def close(self) -> None:
        """The coordinator is done: all other processes may end."""
        self.pool.close()
        if self.server is not None:
            self.channel.send(self.server, Stop())
            self.channel.receive(self.server)

    def follow(self) -> None:
        """Be a worker or the server until the command is over."""
        if self.process == self.server:
            serve(self.channel, self._begin_server, self.pool.skips)
        else:
            self._work()

    def _work(self) -> None:
        while not isinstance(message := self.channel.receive(COORDINATOR), Stop):
            match message:
                case Begin():
                    self.channel.send(COORDINATOR, self._begin_worker(message))
                case TrainClients() if self._worker is not None:
                    with reading(message):
                        answer = self._worker.train(message)
                    if self.sharing is None or self.sharing.position == 0:  # one answers for those that train together
                        self.channel.send(COORDINATOR, answer)
                case MeasureLosses() if self._worker is not None:
                    with reading(message):
                        answer = self._worker.measure(message)
                    self.channel.send(COORDINATOR, answer)
                case ScoreClients() if self._worker is not None:
                    with reading(message):
                        answer = self._worker.score(message)
                    self.channel.send(COORDINATOR, answer)
                case _:
                    raise SplitError(f"unexpected message {type(message).__name__}")
        self.channel.send(COORDINATOR, Done())

    def _begin_worker(self, begin: Begin) -> Begun:
        """Data and backbone stay from run to run."""
        config = self._own(begin)
        self._data = self._data or build_data(config)
        key = recommender_key(config)
        if self._recommender is None or self._recommender[0] != key:
            self._recommender = None  # the old backbone is freed before the new one is loaded
            self._recommender = (key, build_recommender(config, self._data, self.fabric))
        recommender = self._recommender[1]
        self._agree(begin, self._settings(config) | self._fingerprint(recommender, recommender.backbone.folder))
        ledger = Ledger()
        transport = None if self.server is None else self.transport()
        local = build_serial(config, recommender, transport, ledger, self.sharing)

        def report(text: str) -> None:
            """Let the other processes know what this one is doing."""
            self.channel.activity = text

        self._worker = Worker(local, ledger, report, self.channel.check)
        return Begun()

    def _begin_server(self, begin: Begin) -> tuple[BodyServer, Message]:
        config = self._own(begin)
        use_precision(self.fabric, config)
        split = config.split
        if config.backbone.name == "hf":
            folder = local_folder(backbone_path(config)[0])  # each node may have the backbone in a folder of its own
        else:
            folder = cached_backbone(cache_dir(config) / "backbones", begin.backbone)
        self._agree(begin, self._settings(config) | {"backbone's files": fingerprint_of(folder)})
        dtype = DTYPES[weights_dtype(config)]
        body = load_partial(folder, "server", split.head_layers, split.tail_layers, dtype)
        part = attach_server(config, SplitModel(body, split.head_layers, split.tail_layers), self.fabric)
        server = build_server(config, part, begin.num_rows, self.fabric)
        return server, Begun(part.initial)

    def _own(self, begin: Begin) -> DictConfig:
        """This process's configuration of the run that begins."""
        if begin.number >= len(self.configs):
            raise SplitError(f"Begin: this command has {len(self.configs)} runs, run {begin.number} is none of them")
        return chosen(self.configs[begin.number], Candidate(begin.precision, begin.attention))

    def _sharing(self) -> BatchSharing | None:
        together = self.config.trainer.devices_per_client
        if together == 1:
            return None
        if len(self.clients) % together:
            raise ConfigError(
                f"trainer.devices_per_client={together} does not divide the {len(self.clients)} processes"
            )
        group = process_groups(self.clients, together)[self.process // together]
        return BatchSharing(group, self.process, self.fabric.device, self.config.trainer.timeout_seconds)

    def _settings(self, config: DictConfig) -> dict[str, str]:
        """The settings and versions that all processes must share, as text."""
        plain = flatten({name: as_dict(config)[name] for name in _AGREED})
        for key in _OWN:
            plain.pop(key, None)
        return {key: repr(value) for key, value in plain.items()} | {"protocol version": str(PROTOCOL_VERSION)}

    def _fingerprint(self, recommender: Recommender, folder: Path | None) -> dict[str, str]:
        recommender.base.use([])  # the last run of a comparison may have changed it
        own = fingerprint(recommender.data, recommender.backbone.model, recommender.fabric.device)
        files = {} if folder is None else {"backbone's files": fingerprint_of(folder)}
        return own | files

    def _agree(self, begin: Begin, own: dict[str, str]) -> None:
        theirs = {name: value for name, value in begin.fingerprint.items() if name in own}
        if differing := differences(theirs, own):
            raise SplitError(f"{self.name_of(COORDINATOR)} and {self.name_of(self.process)} differ in {differing}")


def run_processes(configs: Sequence[DictConfig], coordinate: Callable[[Session | None], None]) -> None:
    """Start the processes that the settings ask for, and be what this one is.

    Args:
        configs: The composed configurations of the command's runs; the first one says which processes are needed.
        coordinate: Called in the coordinator with the session, or with ``None`` if there is one process; trains and
            reports.

    Raises:
        FellrecError: After the other processes were sent the reason why this one ends.
    """
    _quieten_lightning()
    config = configs[0]
    fabric = build_fabric(config)
    check_processes(config, fabric.world_size)
    if fabric.world_size == 1:
        coordinate(None)
        return
    secret = _launch(fabric, config)
    with children_of(fabric.strategy.launcher):
        session = Session(configs, fabric, secret)
        is_coordinator = session.process == COORDINATOR
        try:
            if is_coordinator:
                with reporting_lost_processes(session.channel):
                    coordinate(session)
                    session.close()
            else:
                leave_signals_to_the_coordinator()
                session.follow()
        except FellrecError as error:
            text = str(error)
            session.channel.abort(
                text if text.startswith("process ") else f"{session.name_of(session.process)}: {text}"
            )
            is_reported_there = isinstance(error, AbortedError) or COORDINATOR not in session.channel.gone
            error.already_reported = not is_coordinator and is_reported_there
            raise
        except BaseException as error:
            name = session.name_of(session.process)
            session.channel.abort(f"{name} stopped: {type(error).__name__}: {error}")
            raise
        session.channel.close()


def check_processes(config: DictConfig, num_processes: int) -> None:
    """Refuse a number of processes that the settings cannot use.

    Raises:
        ConfigError: Says how to start them.
    """
    transport, together = config.split.transport, config.trainer.devices_per_client
    if transport == "distributed" and num_processes < 2:
        raise ConfigError(
            "split.transport=distributed needs one process for the server and at least one for clients: "
            "set trainer.devices=3, or trainer.devices=auto if torchrun --nproc-per-node 3 or srun starts them"
        )
    if transport == "inprocess" and num_processes > 1:
        raise ConfigError(
            f"split.transport=inprocess needs one process, not {num_processes}; give split.transport=distributed"
        )
    if transport != "none" and together > 1:
        raise ConfigError(f"trainer.devices_per_client={together} needs split.transport=none")
    if num_processes % together:
        raise ConfigError(f"trainer.devices_per_client={together} does not divide the {num_processes} processes")


def _quieten_lightning() -> None:
    """Lightning logs the start of every process; with --verbose this is shown."""
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    if logging.getLogger().level > logging.INFO:
        for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _launch(fabric: Fabric, config: DictConfig) -> bytes:
    """Start or join the processes; gives the secret of the run.

    Raises:
        SplitError: If not all of them are there in time.
    """
    environment = getattr(fabric.strategy, "cluster_environment", None)
    are_started_here = isinstance(environment, LightningEnvironment) and config.trainer.num_nodes == 1
    try:
        with new_secret() if are_started_here else nullcontext():
            secret = shared_secret()
            fabric.launch()
            return secret
    except FellrecError:
        raise
    except Exception as error:  # the store of torch.distributed raises several types
        raise SplitError(
            f"process {fabric.global_rank}: not all {fabric.world_size} processes met in time "
            f"(trainer.timeout_seconds={config.trainer.timeout_seconds:g}): {str(error).splitlines()[0]}"
        ) from error
