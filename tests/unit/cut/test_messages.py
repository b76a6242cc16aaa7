"""Messages: what can be said between client and server, and what cannot."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from torch import Tensor

from fellrec.cut import messages as m
from fellrec.errors import SplitError
from fellrec.functional.packing import Packed, pack
from fellrec.pool import messages as r

HIDDEN = pack(torch.randn(2, 3, 4), "float32")
EXAMPLES: list[m.Message] = [
    m.HiddenState(1, 2, "train", 3, (HIDDEN, pack(torch.randn(1, 2, 4), "int8")), torch.ones(2, 3, dtype=torch.bool)),
    m.HiddenReply(1, 2, "val", 3, (HIDDEN,)),
    m.Gradient(1, 2, "train", 3, (HIDDEN,), wants_norms=True),
    m.GradientReply(1, 2, "train", 3, (), torch.tensor([1.0, -1.0])),
    m.Step(1, 2, "train", 0.1, 1e-3),
    m.Finish(1, 2, "train", 0.1 + 0.2, 7),
    m.Upload(1, 2, "train", {"a.b": torch.randn(2, 3), "c": torch.zeros(())}),
    m.Download(1, 2, "train", {"a.b": torch.randn(2, 3).bfloat16()}),
    m.Fetch(1, 2, "train"),
    m.SelectRows(1, -1, "test", 4, 5, torch.tensor([1, 0, 0])),
    m.DropCache(1, 2, "test", 4),
    m.Aggregate(2, (0, 2)),
    m.Mixed({"mixing": torch.eye(2).double()}, {"difficulty": torch.ones(2)}),
    m.KeepBest(True, (0, 1), (0, 0)),
    m.SaveState("runs/a b", 3),
    m.LoadState("runs/a b", 3),
    m.SaveAdapters("runs/a b/adapters", "best"),
    m.Report(),
    m.Done(1.5, 2**40),
    m.Hello({"seed": "0"}, "folder", 3, ("x", "y")),
    m.Ready(("x",)),
    m.Abort("because"),
    m.Stop(),
    m.Train(1, (0, 2)),
    m.Trained(((0, 10, 2, 0.5, 0.1),), {"2": "gone"}, ((0, 1, "train", "up", "scalar", 1, 16),)),
    m.Refresh(1, (0, 2)),
    m.Score("val", 1, "best", (0,)),
    m.Scored(
        (
            (torch.tensor([3]), torch.tensor([0]), torch.rand(1, 2).double()),
            (torch.tensor([7, 2]), torch.tensor([0.5, 0.25]), torch.tensor([True])),
        ),
        (),
    ),
    r.Begin("seed: 0\n", {"torch version": "2"}),
    r.Begun(),
    r.TrainClient(
        1, 2, 7, {"a.b": torch.randn(2, 3)}, {"a.b": {"step": torch.tensor(7.0), "exp_avg": torch.ones(2, 3)}}
    ),
    r.Finished(1, 9, 2, 0.1 + 0.2, 0.5, (0.25, 1 / 3), {"a.b": torch.randn(2, 3)}, {"a.b": {}}, 2**40),
    r.Failed(1, "because"),
    r.ScoreClients("val", "best", 1, 0, 2, {"a.b": torch.randn(2, 3)}),
]
TO_SERVER = (m.HiddenState, m.Gradient, m.Step, m.Finish, m.Upload, m.Fetch, m.SelectRows, m.DropCache, m.Aggregate)


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Packed):
        assert isinstance(right, Packed)
        return same(left.codes, right.codes) and same(left.scale, right.scale)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, tuple):
        return isinstance(right, tuple) and len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message: m.Message) -> None:
    import json

    plain, tensors = m.encode(message)
    back = m.decode(json.loads(json.dumps(plain)), tensors)
    assert type(back) is type(message)
    for field in dataclasses.fields(message):
        assert same(getattr(back, field.name), getattr(message, field.name)), field.name


def test_every_message_has_an_example() -> None:
    bases = {"ClientMessage", "AmongClients"}
    assert {type(example).__name__ for example in EXAMPLES} | bases == {c.__name__ for c in m._subclasses(m.Message)}


def test_no_message_to_the_server_has_a_field_for_what_is_private() -> None:
    """Fields are numbers, names of phases and banks, floating tensors, a mask of booleans, positions in a batch."""
    allowed = {
        int, float, bool, str, int | None, Tensor | None, tuple[Packed, ...], tuple[int, ...],
        typing.get_type_hints(m.Upload)["adapter"],
    }  # fmt: skip
    for kind in TO_SERVER:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            assert hints[field.name] in allowed, f"{kind.__name__}.{field.name}"
    integers = {f.name for kind in TO_SERVER for f in dataclasses.fields(kind) if "int" in str(f.type)}
    assert integers == {"client", "round_index", "ticket", "num_samples", "source", "target", "cache", "clients"}


IDS = torch.randint(0, 97, (2, 3, 4))


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: m.HiddenState(1, 2, "train", 3, (Packed(IDS),)), "HiddenState of client 1 in round 2: .*int64"),
        (lambda: m.HiddenState(1, 2, "train", 3, (Packed(IDS[0].float()),)), r"shape \[3, 4\], expected \[B, L, D\]"),
        (lambda: m.HiddenState(1, 2, "train", 3, (HIDDEN,), IDS[0]), r"no \[B, L\] of bool"),
        (lambda: m.HiddenState(1, 2, "train", 3, (HIDDEN,), positions="[1, 5, 2]"), "positions"),
        (lambda: m.HiddenState(1, 2, "read", 3, (HIDDEN,)), "phase 'read'"),
        (lambda: m.HiddenState(-1, 2, "train", 3, (HIDDEN,)), "client -1 is negative"),
        (lambda: m.Gradient(1, 2, "train", 3, (Packed(IDS),)), "Gradient of client 1 in round 2: .*int64"),
        (
            lambda: m.HiddenReply(1, 2, "train", 3, (Packed(IDS.to(torch.int8), torch.ones(2, 3, 4)),)),
            "its scale has shape",
        ),
        (lambda: m.GradientReply(1, 2, "train", 3, (), IDS[0, 0]), "no floating vector"),
        (lambda: m.Upload(1, 2, "train", {"ids": IDS}), "ids is no floating tensor"),
        (lambda: m.SelectRows(1, 2, "test", 0, 0, torch.ones(3)), "no vector of int64"),
        (lambda: m.decode({"type": "Labels", "fields": {}}, []), "unknown message 'Labels'"),
        (lambda: m.decode({"type": "Stop", "fields": {"labels": [1]}}, []), "malformed message Stop"),
    ],
)
def test_wrong_contents_are_refused_on_either_side(build: typing.Callable[[], object], problem: str) -> None:
    with pytest.raises(SplitError, match=problem):
        build()


def test_sizes_are_those_of_the_tensors() -> None:
    sizes = {type(example).__name__: example.sizes() for example in EXAMPLES}
    assert sizes["HiddenState"] == {"hidden_state": 2 * 3 * 4 * 4 + (1 * 2 * 4 + 1 * 2 * 4) + 2 * 3}
    assert sizes["Gradient"] == {"gradient": 2 * 3 * 4 * 4}
    assert sizes["GradientReply"] == {"scalar": 2 * 4}
    assert sizes["Upload"] == {"adapter": 4 * (2 * 3 + 1)}
    assert sizes["Download"] == {"adapter": 2 * 2 * 3}
    assert sizes["Step"] == {"scalar": 8}
    assert sizes["Finish"] == {"scalar": 16}
