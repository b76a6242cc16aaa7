"""A small model cut in two: the client's share and a server that has the rest, in one process."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from small_models import LAYERS

from fellrec.aggregation import FedAvg
from fellrec.cut.link import InProcess, ServerLink
from fellrec.cut.server import BodyServer, ServerSettings
from fellrec.federated.ledger import Ledger
from fellrec.federated.state import RunState, Selection
from fellrec.models.module import OptimizerSettings
from fellrec.models.remote import Cut, server_shell
from fellrec.models.split import SplitModel
from fellrec.state.bank import AdapterBank


def cut_in_two(model: Any, head: int, tail: int) -> tuple[SplitModel, ServerLink, BodyServer]:
    """A copy of the model as the client's share, and the server that has the rest; every parameter is trainable."""
    model = copy.deepcopy(model)
    cut = Cut(head, tail, LAYERS)
    body = SplitModel(server_shell(model, cut), head, tail)
    trainable = dict(sorted(body.model.named_parameters()))
    initial = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    bank = AdapterBank.replicate(initial, 2)
    state = RunState(bank, Selection("m", bank, bank), AdapterBank.replicate(initial, 2), local_steps=[0, 0])
    server = BodyServer(body, trainable, state, FedAvg(), ServerSettings(0, OptimizerSettings()), nullcontext)
    link = ServerLink(InProcess(server), Ledger())
    return SplitModel(model, head, tail, link).eval(), link, server
