"""From a composed configuration and a recommender to a federated loop, and to the server of the executed cut."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fellrec.cut.link import InProcess, Transport
from fellrec.cut.pipeline import CutSettings, PipelinedTrainer
from fellrec.cut.processes import LeadExecution
from fellrec.cut.server import BodyServer, ServerSettings
from fellrec.distributed.agreement import facts
from fellrec.distributed.channel import ToServer
from fellrec.errors import ConfigError
from fellrec.experiment.build import Recommender, ServerShare, build_rule
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.executor import SplitExecution
from fellrec.federated.ledger import Ledger
from fellrec.federated.local import LocalSettings
from fellrec.federated.loop import FederatedLoop, LoopSettings
from fellrec.federated.state import RunState, Selection
from fellrec.models.adapters import adapter_bytes
from fellrec.models.module import OptimizerSettings
from fellrec.pool.ranks import RankedExecution
from fellrec.state.bank import AdapterBank

_BANKS = 7
"""Copies of all adapters that a side of the executed cut holds: now, best, best per client, two AdamW moments, and two
of a round's. Where the cut is not executed they are on the disk."""


def build_server(config: DictConfig, share: ServerShare, num_clients: int, fabric: Fabric) -> BodyServer:
    """The server before the first round, every client with the same starting adapter."""
    rule, trainer = build_rule(config), config.trainer
    rows = 1 if rule.pools_clients else num_clients
    return BodyServer(
        model=share.model,
        trainable=share.trainable,
        state=new_state(share.initial, rows, num_clients, trainer.metric),
        rule=rule,
        settings=ServerSettings(
            seed=config.seed,
            optimizer=OptimizerSettings(trainer.learning_rate, trainer.weight_decay),
            reset_optimizer=trainer.reset_optimizer,
            hidden_dtype=config.split.hidden_dtype,
            gradient_dtype=config.split.gradient_dtype,
            checkpoints_kept=trainer.checkpoints_kept,
        ),
        autocast=fabric.autocast,
    )


def build_loop(
    config: DictConfig, recommender: Recommender, callbacks: Sequence[FederatedCallback], keeps_state: bool = True
) -> FederatedLoop:
    """A federated loop before its first round, every client with the same starting adapter.

    Args:
        config: The configuration.
        recommender: What rules share.
        callbacks: Observers.
        keeps_state: Whether clients' adapters are kept here; false in a rank that is sent them.
    """
    aggregation = build_rule(config)
    num_clients = recommender.data.num_clients if keeps_state else 1
    rows = 1 if aggregation.pools_clients else num_clients
    if recommender.link is not None:
        _check_memory(recommender.initial, num_clients)
    trainer = config.trainer
    loop = FederatedLoop(
        fabric=recommender.fabric,
        module=recommender.module,
        datamodule=recommender.datamodule,
        aggregation=aggregation,
        callbacks=callbacks,
        state=new_state(recommender.initial, rows, num_clients, trainer.metric),
        settings=LoopSettings(
            num_rounds=trainer.num_rounds,
            evaluate_every=trainer.evaluate_every,
            patience=trainer.patience,
            select=trainer.select,
            participation_rate=config.participation.rate,
            on_failure=config.participation.on_failure,
            quorum=config.participation.quorum,
            checkpoints_kept=trainer.checkpoints_kept,
            seed=config.seed,
        ),
        local=LocalSettings(
            local_epochs=trainer.local_epochs,
            max_local_steps=trainer.max_local_steps,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            gradient_clip=trainer.gradient_clip,
            reset_optimizer=trainer.reset_optimizer,
            warmup_steps=trainer.warmup_steps,
            learning_rate_decay=trainer.learning_rate_decay,
            num_rounds=trainer.num_rounds,
            seed=config.seed,
        ),
    )
    loop.trainer.sharing = recommender.sharing
    if recommender.crew is not None:
        agreed = facts(recommender.data, recommender.backbone.model, recommender.fabric.device)
        recommender.crew.begin(OmegaConf.to_yaml(config, resolve=True), agreed)
        loop.execution = RankedExecution(recommender.crew)
    if recommender.server is not None:
        assert recommender.link is not None
        server = build_server(config, recommender.server, num_clients, recommender.fabric)
        connect(config, loop, recommender, InProcess(server), tuple(sorted(recommender.server.trainable)))
    if recommender.peers is not None:
        peers = recommender.peers
        execution = connect(config, loop, recommender, ToServer(peers.wire), peers.body_names)
        loop.execution = LeadExecution(execution.link, execution.trainer, peers.wire, peers.workers)
    return loop


def connect(
    config: DictConfig, loop: FederatedLoop, recommender: Recommender, transport: Transport, body_names: tuple[str, ...]
) -> SplitExecution:
    """Let the loop train through the executed cut.

    Args:
        config: The configuration.
        loop: With the client's share of the model.
        recommender: Whose link is connected.
        transport: To the server.
        body_names: The server's trainable parameters.
    """
    link, split = recommender.link, config.split
    assert link is not None
    link.transport, link.ledger = transport, Ledger()
    settings = CutSettings(hidden_dtype=split.hidden_dtype, gradient_dtype=split.gradient_dtype, body_names=body_names)
    trainer = PipelinedTrainer(loop.fabric, loop.module, loop.trainer, link, settings)
    loop.execution = execution = SplitExecution(link, trainer)
    return execution


def new_state(initial: Mapping[str, Tensor], rows: int, num_clients: int, metric: str) -> RunState:
    """The state before the first round.

    Args:
        initial: The adapter that every client starts from.
        rows: Adapters that are trained: one per client, or one for all.
        num_clients: Clients that are evaluated.
        metric: What selection looks at.
    """
    start = AdapterBank.replicate(initial, max(rows, num_clients))

    def bank(size: int) -> AdapterBank:
        return AdapterBank(start.versions[:size], start.kinds)

    return RunState(
        bank=bank(rows),
        selection=Selection(metric=metric, bank=bank(rows), client_bank=bank(num_clients)),
        initial=bank(rows),
        local_steps=[0] * rows,
    )


def _check_memory(initial: dict[str, Tensor], num_clients: int) -> None:
    num_bytes = adapter_bytes(initial)
    needed = num_bytes * num_clients * _BANKS
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * present:
        raise ConfigError(
            f"{num_clients} clients with an adapter of {num_bytes / 1e6:.1f} MB each need about "
            f"{needed / 1e9:.1f} GB of memory, this machine has {present / 1e9:.1f} GB; "
            "use adapter=lora or fewer clients"
        )
