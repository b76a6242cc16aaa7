"""One example of every message between processes."""

from __future__ import annotations

from dataclasses import replace

import torch

from fellrec.cut import messages as m
from fellrec.distributed.message import Abort, Done, Message, Stop
from fellrec.functional.packing import pack
from fellrec.pool import messages as p

HIDDEN = pack(torch.randn(2, 3, 4), "float32")
WEIGHTS = {"a.b": torch.randn(2, 3), "c": torch.zeros(())}
STATE = {"a.b|step": torch.tensor(7.0), "a.b|exp_avg": torch.ones(2, 3)}
CLIENT = p.TrainClient(
    1, -1, 2, 7, WEIGHTS, STATE, {"shared": WEIGHTS}, {}, ("c",), True, 1, ({"c|left": torch.ones(1)},)
)
TRAINED = p.ClientTrained(
    1,
    WEIGHTS,
    STATE,
    {},
    0.1 + 0.2,
    7,
    2,
    1 / 3,
    None,
    2**40,
    (),
    (0.25, 1 / 3),
    ((0, 2, "train", "up", "scalar", 1, 16),),
)
EXAMPLES: list[Message] = [
    m.OpenSlot(
        1, 2, "train", WEIGHTS, STATE, {"shared|c": torch.ones(())}, {"variate|c": torch.ones(())}, ("c",), 1, 7
    ),
    m.CloseSlot(1, 2, "train", keep=False),
    m.SlotClosed(1, 2, "train", WEIGHTS, STATE, {}),
    m.Serve(1, -1, "val", {"a.b": torch.randn(2, 3).bfloat16()}, 1),
    m.StopServing(1, -1, "val"),
    m.HiddenState(1, 2, "train", 3, (HIDDEN, pack(torch.randn(1, 2, 4), "int8")), torch.ones(2, 3, dtype=torch.bool)),
    m.HiddenReply(1, 2, "val", 3, (HIDDEN,)),
    m.Gradient(1, 2, "train", 3, (HIDDEN,), wants_norms=True),
    m.GradientReply(1, 2, "train", 3, (), ("a.b", "c"), torch.tensor([1.0, -1.0])),
    m.Step(1, 2, "train", 0.1, 1e-3),
    m.SelectRows(1, -1, "test", 4, 5, torch.tensor([1, 0, 0])),
    m.DropCache(1, 2, "test", 4),
    m.ChangeBase(0, {"a.b|left": torch.randn(2, 1), "a.b|right": torch.randn(1, 3)}),
    m.Report(),
    m.ServerReport(1.5, 2**40),
    Done(),
    Abort("because"),
    Stop(),
    p.Begin(1, {"torch version": "2"}, "0123456789abcdef", 3, "bf16-mixed", "eager"),
    p.Begun(WEIGHTS),
    CLIENT,
    TRAINED,
    p.ClientFailed(1, "because"),
    p.TrainClients((CLIENT, replace(CLIENT, row=3, changes=()))),
    p.ClientsTrained((TRAINED, p.ClientFailed(3, "because"))),
    p.MeasureLosses(1, None, 2, (WEIGHTS, WEIGHTS), 1, ({"c|left": torch.ones(1)},)),
    p.LossesMeasured(1, (0.5, float("inf")), ((0, 2, "train", "up", "scalar", 1, 16),)),
    p.ScoreClients(1, WEIGHTS, (0, 2), "val", -1, 0, 2, 0, ()),
    p.Scored(
        (
            (torch.tensor([3]), torch.tensor([0]), torch.rand(1, 2).double()),
            (torch.tensor([7, 2]), torch.tensor([0.5, 0.25]), torch.tensor([True])),
        )
    ),
]
