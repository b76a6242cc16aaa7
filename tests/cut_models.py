"""A small model cut in two: the client's part and a server that has the rest, in one process."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from small_models import LAYERS

from fellrec.cut.link import InProcess, ServerLink
from fellrec.cut.messages import OpenSlot, Serve
from fellrec.cut.server import BodyServer, ServerSettings
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.ledger import Ledger
from fellrec.models.module import OptimizerSettings
from fellrec.models.remote import Cut, server_shell
from fellrec.models.split import SplitModel

NUM_CLIENTS = 2


def cut_in_two(model: Any, head: int, tail: int) -> tuple[SplitModel, ServerLink, BodyServer]:
    """A copy of the model as the client's part, and the server that has the rest; every parameter is trainable.

    The server has the adapters of all clients for evaluation, and none of them is being trained; see ``open_slot``.
    """
    model = copy.deepcopy(model)
    body = SplitModel(server_shell(model, Cut(head, tail, LAYERS)), head, tail)
    trainable = {name: p for name, p in sorted(body.model.named_parameters()) if p.requires_grad}
    settings = ServerSettings(0, OptimizerSettings(), num_rows=NUM_CLIENTS)
    server = BodyServer(body, trainable, settings, nullcontext, BaseWeights(body.model))
    link = ServerLink()
    link.connect(InProcess(server), Ledger())
    for client in range(NUM_CLIENTS):
        link.send(Serve(client, 0, "val", dict(server.trainable), head_layers=head))
    return SplitModel(model, head, tail, link).eval(), link, server


def open_slot(link: ServerLink, server: BodyServer, client: int, round_index: int = 0) -> None:
    """Let a client begin its local training with the model's own weights."""
    link.send(OpenSlot(client, round_index, "train", dict(server.trainable), head_layers=server.model.cut.head_layers))
