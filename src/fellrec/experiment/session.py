"""Clients over ranks, ``trainer.devices`` × ``trainer.num_nodes``: what each process is, from meeting to leaving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from fellrec.data.prepared import PreparedData
from fellrec.distributed.agreement import differences, facts
from fellrec.distributed.batch_sharing import BatchSharing
from fellrec.distributed.channel import AbortedError, Naming, Wire, rank_name
from fellrec.errors import ConfigError, FellrecError, SplitError
from fellrec.experiment import Recommender, build_data, build_fabric, build_loop, build_recommender, recommender_key
from fellrec.experiment.roles import Place, find_place, leave_signals_to_the_lead, waiting_for_news
from fellrec.federated.loop import FederatedLoop
from fellrec.pool.crew import LEAD, Crew, rank_groups
from fellrec.pool.messages import Begin
from fellrec.pool.ranks import RankWorker

_LOCAL = ("backbone.path", "data.root", "cache_dir")
"""Settings that each process has its own value of."""


def num_processes(config: DictConfig, place: Place | None) -> int:
    """How many processes the run is to have: ``trainer.devices`` × ``trainer.num_nodes``.

    ``trainer.devices=auto`` is as many as there are, or this machine's GPUs if nobody started any.
    """
    trainer = config.trainer
    if trainer.devices != "auto":
        return int(trainer.devices) * int(trainer.num_nodes)
    if place is not None:
        return place.world_size
    uses_cuda = trainer.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return torch.cuda.device_count() if uses_cuda else 1


def processes_to_start(config: DictConfig) -> int:
    """How many ranks of this machine are still to be started; 0 if torchrun or srun did, or must."""
    if find_place() is not None or config.trainer.num_nodes != 1 or config.split.transport != "none":
        return 0
    return num_processes(config, None) - 1


def check_world(config: DictConfig, place: Place | None) -> int:
    """The number of processes, which is that of the settings.

    Raises:
        ConfigError: If it is not; says how to start them.
    """
    wanted, trainer = num_processes(config, place), config.trainer
    settings = f"trainer.devices={trainer.devices} × trainer.num_nodes={trainer.num_nodes}"
    if place is None and wanted > 1:
        raise ConfigError(
            f"{settings} needs {wanted} processes, and this is one: start them on each node by srun, or by "
            f"torchrun --nnodes {trainer.num_nodes} --nproc-per-node {trainer.devices} -m fellrec train …"
        )
    if place is not None and place.world_size != wanted:
        raise ConfigError(
            f"{settings} needs {wanted} processes, and torchrun or srun started {place.world_size}; "
            f"start {wanted}, or set trainer.devices=auto"
        )
    if wanted % trainer.devices_per_client:
        raise ConfigError(
            f"trainer.devices_per_client={trainer.devices_per_client} does not divide the {wanted} processes"
        )
    return wanted


class Ranks:
    """The processes of one command, from meeting to leaving.

    Args:
        config: The composed configuration, the same in every process.
        place: This process.
    """

    def __init__(self, config: DictConfig, place: Place) -> None:
        self.config = config
        self.place = place
        rank_zero_only.rank = place.rank  # type: ignore[attr-defined]
        trainer, size, rank = config.trainer, place.world_size, place.rank
        # What ranks send each other is small and held on the CPU: it needs no NCCL.
        naming = Naming(rank_name, "trainer.timeout_seconds")
        self.wire = Wire(rank, size, place.init_method, trainer.timeout_seconds, torch.device("cpu"), naming)
        self.wire.listen(range(1, size) if rank == LEAD else [LEAD])
        together = trainer.devices_per_client
        self.crew = Crew(self.wire, size, together, skips=config.participation.on_failure == "skip")
        self.sharing: BatchSharing | None = None
        if together > 1:
            group, device = rank_groups(size, together)[rank // together], build_fabric(config).device
            self.sharing = BatchSharing(group, rank, device, trainer.timeout_seconds)
        self._data: PreparedData | None = None
        self._recommender: tuple[str, Recommender] | None = None

    def lead(self, config: DictConfig, data: PreparedData) -> Recommender:
        """A recommender of rank 0, whose loops train on all ranks."""
        return replace(build_recommender(config, data), crew=self.crew, sharing=self.sharing)

    def follow(self) -> None:
        """Every other rank: work until the command is over."""
        RankWorker(self.wire, self._loop).run()

    def _loop(self, begin: Begin) -> FederatedLoop:
        """What another rank needs for a run that rank 0 begins; data and backbone stay from run to run."""
        config = OmegaConf.create(begin.config)
        assert isinstance(config, DictConfig)
        for key in _LOCAL:
            if OmegaConf.select(config, key) is not None:
                OmegaConf.update(config, key, OmegaConf.select(self.config, key))
        self._data = self._data or build_data(config)
        key = recommender_key(config)
        if self._recommender is None or self._recommender[0] != key:
            self._recommender = None  # the old backbone goes before the new one comes
            self._recommender = (key, replace(build_recommender(config, self._data), sharing=self.sharing))
            recommender = self._recommender[1]
            own = facts(self._data, recommender.backbone.model, recommender.fabric.device)
            if differing := differences(dict(begin.facts), own):
                raise SplitError(f"{rank_name(LEAD)} and {rank_name(self.place.rank)} differ in {differing}")
        return build_loop(config, self._recommender[1], (), keeps_state=False)


def run_ranks(config: DictConfig, lead: Callable[[Ranks | None], None]) -> None:
    """Be what this process's rank says.

    Args:
        config: The composed configuration.
        lead: Called in rank 0 with the ranks, or with ``None`` if there is one process; trains and reports.

    Raises:
        FellrecError: After the other ranks were told why this one gives up.
    """
    place = find_place()
    if check_world(config, place) == 1 or place is None:
        lead(None)
        return
    ranks = Ranks(config, place)
    try:
        if place.rank == LEAD:
            with waiting_for_news(ranks.wire):
                lead(ranks)
            ranks.crew.stop()
        else:
            leave_signals_to_the_lead()
            ranks.follow()
    except FellrecError as error:
        ranks.wire.abort(str(error))
        said_there = isinstance(error, AbortedError) or LEAD not in ranks.wire.gone
        error.already_reported = place.rank != LEAD and said_there
        raise
    except BaseException as error:
        ranks.wire.abort(f"{rank_name(place.rank)} stopped: {type(error).__name__}: {error}")
        raise
    ranks.wire.close()
