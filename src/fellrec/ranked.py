"""Clients over ranks, ``trainer.devices`` × ``trainer.num_nodes``: what each process is, and how they agree."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from fellrec.build import Recommender, build_data, build_loop, build_recommender
from fellrec.config import as_dict
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError, FellrecError, SplitError
from fellrec.federated.crew import LEAD, Crew, rank_groups
from fellrec.federated.messages import PROTOCOL_VERSION
from fellrec.federated.rank_messages import Join, Joined
from fellrec.federated.ranks import RankWorker
from fellrec.federated.sharing import BatchSharing
from fellrec.federated.wire import Naming, Wire, rank_name
from fellrec.functional.nested import flatten
from fellrec.roles import Place

_AGREED = (
    *("seed", "data", "holdout", "partition", "backbone", "adapter", "split", "objective", "ranker", "aggregation"),
    *("participation", "trainer"),
)
"""Configuration that all ranks must share."""
_LOCAL = ("backbone.path", "data.root", "trainer.accelerator")
"""Settings below it that may differ between machines."""
_SAMPLED = 16
"""Values of each of the backbone's tensors that ranks compare."""


def find_place() -> Place | None:
    """This process among those that torchrun or srun started; ``None`` if neither did."""
    environment: ClusterEnvironment
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif "SLURM_STEP_NUM_TASKS" in os.environ and SLURMEnvironment.detect():  # in a batch script there is no step
        environment = SLURMEnvironment()
    else:
        return None
    where = f"tcp://{environment.main_address}:{environment.main_port}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        where = "env://"  # torchrun's agent holds the port already
    return Place(environment.global_rank(), environment.world_size(), where)


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
    place, trainer = find_place(), config.trainer
    if place is not None or trainer.num_nodes != 1 or config.split.transport != "none":
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
    """The processes of one run, from meeting to leaving.

    Args:
        config: The composed configuration, the same in every process.
        place: This process.
    """

    def __init__(self, config: DictConfig, place: Place) -> None:
        self.config = config
        self.place = place
        rank_zero_only.rank = place.rank  # type: ignore[attr-defined]
        self._timeout = config.trainer.timeout_seconds
        # Adapters are small and held on the CPU: they need no NCCL.
        self.wire = Wire(
            place.rank,
            place.world_size,
            place.init_method,
            self._timeout,
            torch.device("cpu"),
            Naming(rank_name, "trainer.timeout_seconds"),
        )
        self.wire.listen([rank for rank in range(place.world_size) if rank != LEAD] if place.rank == LEAD else [LEAD])

    def lead(self, data: PreparedData) -> Recommender:
        """Rank 0: load the backbone, and agree with the other ranks.

        Returns:
            A recommender whose loops train on all ranks.
        """
        recommender = build_recommender(self.config, data)
        facts, others = self._facts(recommender), range(1, self.place.world_size)
        for rank in others:
            self.wire.send(rank, Join(facts))
        for rank in others:
            answer = self.wire.receive(rank)
            if not isinstance(answer, Joined):
                raise SplitError(f"rank {rank} answered with {type(answer).__name__}, expected Joined")
        skips = self.config.participation.on_failure == "skip"
        crew = Crew(self.wire, self.place.world_size, self.config.trainer.devices_per_client, skips)
        return replace(recommender, crew=crew, sharing=self._sharing(recommender))

    def follow(self) -> None:
        """Every other rank: wait until rank 0 has prepared data and backbone, load them, and work."""
        hello = self.wire.receive(LEAD)
        if not isinstance(hello, Join):
            raise SplitError(f"rank {LEAD} began with {type(hello).__name__}, expected Join")
        recommender = build_recommender(self.config, build_data(self.config))
        own = self._facts(recommender)
        differing = [key for key in sorted({*hello.facts, *own}) if hello.facts.get(key) != own.get(key)]
        if differing:
            lines = [f"{key}: {hello.facts.get(key)} and {own.get(key)}" for key in differing[:5]]
            raise SplitError(f"rank {LEAD} and rank {self.place.rank} differ in " + "; ".join(lines))
        self.wire.send(LEAD, Joined())
        sharing = self._sharing(recommender)
        loop = build_loop(self.config, replace(recommender, sharing=sharing), (), keeps_state=False)
        RankWorker(loop, self.wire, answers=sharing is None or sharing.position == 0).run()

    def _sharing(self, recommender: Recommender) -> BatchSharing | None:
        rank, together = self.place.rank, self.config.trainer.devices_per_client
        if together == 1:
            return None
        group = rank_groups(self.place.world_size, together)[rank // together]
        return BatchSharing(group, rank, recommender.fabric.device, self._timeout)

    def _facts(self, recommender: Recommender) -> dict[str, str]:
        plain = flatten({name: as_dict(self.config)[name] for name in _AGREED})
        facts = {key: repr(value) for key, value in plain.items() if key not in _LOCAL}
        if recommender.fabric.device.type == "cpu":  # sums depend on it
            facts["number of threads (OMP_NUM_THREADS)"] = str(torch.get_num_threads())
        return {
            **facts,
            "protocol version": str(PROTOCOL_VERSION),
            "torch version": torch.__version__,
            "data's key": recommender.data.key,
            "backbone's weights": _digest(recommender.backbone.model),
        }


def _digest(model: torch.nn.Module) -> str:
    """A hash of names, shapes and first values of all tensors."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
            lead(ranks)
        else:
            _leave_signals_to_the_lead()
            ranks.follow()
    except FellrecError as error:
        ranks.wire.abort(str(error))
        # Rank 0 tells the user, unless it is what is gone.
        error.is_told = place.rank != LEAD and LEAD not in ranks.wire._gone
        raise
    except BaseException as error:
        ranks.wire.abort(f"{rank_name(place.rank)} stopped: {type(error).__name__}: {error}")
        raise
    ranks.wire.close()


def _leave_signals_to_the_lead() -> None:
    """Ctrl-C and a scheduler's signals reach all processes; rank 0 decides, and tells the others."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
