"""FedALT in real local training: learning, what stays at a client, what it receives, absent clients, the cut."""

from __future__ import annotations

from typing import Any

import torch

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop

HOW = ["adapter=lora_mixed", "adapter.rank=4", "adapter.dropout=0.1", "aggregation=fedalt", "trainer.max_local_steps=4",
       "trainer.learning_rate=0.02", "trainer.weight_decay=0.5", "participation.rate=0.6"]  # fmt: skip


def loop_of(tiny_overrides: list[str], *more: str) -> Any:
    config = compose([*tiny_overrides, *HOW, *more])
    return build_loop(config, build_recommender(config, build_data(config)))


def of(adapter: Any, part: str) -> Any:
    return {name: tensor for name, tensor in adapter.items() if f"lora_{part}" in name}


def test_clients_learn_with_what_the_others_trained(tiny_overrides: list[str]) -> None:
    """With a weight decay of 0.5: the others' factors do not decay."""
    loop = loop_of(tiny_overrides)
    losses: dict[int, list[float]] = {}
    for round_index in range(4):
        before = [loop.population.bank.row(row) for row in range(3)]
        record = loop.run_round(round_index)
        ends = {t.row: t.adapter.tensors() for t in record.trained}
        assert len(ends) == 2
        for row in range(3):
            after = loop.population.bank.row(row)
            if row not in ends:
                assert all(torch.equal(after[name], tensor) for name, tensor in before[row].items())
                continue
            (other,) = set(ends) - {row}
            losses.setdefault(row, []).append(next(t.loss for t in record.trained if t.row == row))
            assert all(torch.equal(ends[row][name], t) for name, t in of(before[row], "rest").items()), "frozen"
            assert all(torch.equal(after[name.replace("own", "rest")], t) for name, t in of(ends[other], "own").items())
            for part in ("own", "router"):
                assert all(torch.equal(after[name], tensor) for name, tensor in of(ends[row], part).items())
    assert any(bool(tensor.any()) for tensor in of(loop.population.bank.row(0), "router").values())
    assert all(found[0] > found[-1] for found in losses.values() if len(found) > 1)
    assert not of(dict(loop.population.optimizer_of(0)), "rest")


def test_the_cut_gives_the_bits_of_the_whole_model(tiny_overrides: list[str]) -> None:
    rows = []
    for transport in ("none", "inprocess"):
        short = ["trainer.max_local_steps=1", "split.tail_layers=0", f"split.transport={transport}"]
        loop = loop_of(tiny_overrides, *short)
        for round_index in range(2):
            loop.run_round(round_index)
        rows.append([loop.population.bank.row(row) for row in range(3)])
    for whole, cut in zip(*rows, strict=True):
        assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
