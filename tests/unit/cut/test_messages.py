"""Messages between processes: how they are encoded, and what cannot be sent to the server."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from message_examples import EXAMPLES, HIDDEN
from torch import Tensor

from fellrec.cut import messages as m
from fellrec.distributed.message import Message, _subclasses, decode, encode
from fellrec.errors import SplitError
from fellrec.functional.packing import Packed

TO_SERVER = (
    *(m.OpenSlot, m.CloseSlot, m.Serve, m.StopServing, m.HiddenState, m.Gradient, m.Step, m.SelectRows, m.DropCache),
    *(m.ChangeBase, m.Report),
)


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
    if isinstance(left, Message):
        return type(left) is type(right) and same(vars(left), vars(right))
    return left == right


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_survive_encoding(message: Message) -> None:
    import json

    plain, tensors = encode(message)
    back = decode(json.loads(json.dumps(plain)), tensors)
    assert type(back) is type(message)
    for field in dataclasses.fields(message):
        assert same(getattr(back, field.name), getattr(message, field.name)), field.name


def test_every_message_has_an_example() -> None:
    known = {cls.__name__ for cls in _subclasses(Message)}
    assert {type(example).__name__ for example in EXAMPLES} | {"ClientMessage"} == known


def test_all_messages_to_the_server_are_listed() -> None:
    to_server = {cls for cls in _subclasses(m.ClientMessage) if cls.to_server}  # type: ignore[attr-defined]
    assert set(TO_SERVER) == to_server | {m.ChangeBase, m.Report}


def test_no_message_to_the_server_has_a_field_for_what_is_private() -> None:
    """Fields are numbers, names of phases and parameters, tensors by parameter, hidden states, a mask, positions."""
    allowed = {
        int, float, bool, str, int | None, float | None, Tensor | None, tuple[Packed, ...], tuple[str, ...] | None,
        typing.get_type_hints(m.OpenSlot)["adapter"],
    }  # fmt: skip
    for kind in TO_SERVER:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            assert hints[field.name] in allowed, f"{kind.__name__}.{field.name}"
    integers = {f.name for kind in TO_SERVER for f in dataclasses.fields(kind) if "int" in str(f.type)}
    counts = {"base", "version", "total_steps", "head_layers"}
    assert integers == {"client", "round_index", "number", "source", "target", "cache"} | counts


IDS = torch.randint(0, 97, (2, 3, 4))


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: m.HiddenState(1, 2, "train", 3, (Packed(IDS),)), "HiddenState of client 1 in round 2: .*int64"),
        (lambda: m.HiddenState(1, 2, "train", 3, (Packed(IDS[0].float()),)), r"shape \[3, 4\], expected \[B, L, D\]"),
        (lambda: m.HiddenState(1, 2, "train", 3, (HIDDEN,), IDS[0]), r"must be \[B, L\] of bool"),
        (lambda: m.HiddenState(1, 2, "train", 3, (HIDDEN,), positions="[1, 5, 2]"), "positions"),
        (lambda: m.HiddenState(1, 2, "read", 3, (HIDDEN,)), "phase 'read'"),
        (lambda: m.HiddenState(-1, 2, "train", 3, (HIDDEN,)), "client -1 is negative"),
        (lambda: m.Gradient(1, 2, "train", 3, (Packed(IDS),)), "Gradient of client 1 in round 2: .*int64"),
        (
            lambda: m.HiddenReply(1, 2, "train", 3, (Packed(IDS.to(torch.int8), torch.ones(2, 3, 4)),)),
            "its scale has shape",
        ),
        (lambda: m.GradientReply(1, 2, "train", 3, (), ("a",), IDS[0, 0]), "must be a floating vector"),
        (
            lambda: m.OpenSlot(1, 2, "train", {}, total_steps=-1),
            "OpenSlot of client 1 in round 2: total_steps -1 is neg",
        ),
        (lambda: m.OpenSlot(1, 2, "train", {"ids": IDS}), "OpenSlot of client 1 in round 2: ids must be a floating"),
        (lambda: m.OpenSlot(1, 2, "train", {}, {"ids|step": IDS}), r"ids\|step must be a floating"),
        (lambda: m.OpenSlot(1, 2, "train", {}, {}, {"shared|ids": IDS}), r"shared\|ids must be a floating"),
        (lambda: m.OpenSlot(1, 2, "train", {}, {}, {}, {"own|ids": IDS}), r"own\|ids must be a floating"),
        (lambda: m.Serve(1, 2, "val", {"ids": IDS}), "Serve of client 1 in round 2: ids must be a floating"),
        (lambda: m.ChangeBase(0, {"ids|left": IDS}), r"ChangeBase: ids\|left must be a floating"),
        (lambda: m.SelectRows(1, 2, "test", 0, 0, torch.ones(3)), "must be a vector of int64"),
        (lambda: decode({"type": "Labels", "fields": {}}, []), "unknown message 'Labels'"),
        (lambda: decode({"type": "Stop", "fields": {"labels": [1]}}, []), "malformed message Stop"),
    ],
)
def test_wrong_contents_are_refused_on_either_side(build: typing.Callable[[], object], problem: str) -> None:
    with pytest.raises(SplitError, match=problem):
        build()


def test_sizes_are_those_of_the_tensors() -> None:
    sizes = {type(example).__name__: example.sizes() for example in EXAMPLES if isinstance(example, m.ClientMessage)}
    assert sizes["HiddenState"] == {"hidden_state": 2 * 3 * 4 * 4 + (1 * 2 * 4 + 1 * 2 * 4) + 2 * 3}
    assert sizes["Gradient"] == {"gradient": 2 * 3 * 4 * 4}
    assert sizes["GradientReply"] == {"scalar": 2 * 4}
    assert sizes["Step"] == {"scalar": 8}
    assert sizes["SelectRows"] == {"scalar": 8 * 3}
    for name in ("OpenSlot", "SlotClosed", "Serve"):
        assert sizes[name] == {}, "both parties are on the server's side"
