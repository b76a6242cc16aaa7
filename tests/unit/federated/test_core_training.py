"""Adapters with frozen outer factors in real local training: learning, exactness of a round, moments, the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender, build_rule
from fellrec.experiment.federation import build_loop
from fellrec.functional.cores import CORES, SCALES

KINDS = {"fed_sb": ["adapter=lora_sb", "adapter.rank=8"], "ravan": ["adapter=lora_heads", "adapter.rank=4"]}
HOW = ["adapter.alpha=16", "adapter.dropout=0", "trainer.max_local_steps=4", "trainer.learning_rate=0.05"]


def made(tiny_overrides: list[str], rule: str, *more: str) -> Any:
    config = compose([*tiny_overrides, *KINDS[rule], *HOW, f"aggregation={rule}", *more])
    recommender = build_recommender(config, build_data(config))
    return recommender, build_loop(config, recommender)


@pytest.mark.parametrize("rule", KINDS)
def test_clients_learn_and_a_round_gives_the_mean_of_their_products(tiny_overrides: list[str], rule: str) -> None:
    _, loop = made(tiny_overrides, rule)
    losses = []
    for round_index in range(3):
        record = loop.run_round(round_index)
        samples = torch.tensor([t.num_samples for t in record.trained], dtype=torch.float64)
        losses.append(float(samples @ torch.tensor([t.loss for t in record.trained]).double() / samples.sum()))
        served, ends = loop.population.bank.row(0), [t.adapter.tensors() for t in record.trained]
        for name in [name for name in served if name.endswith(CORES)]:
            scales = name.replace(CORES, SCALES)
            expected = sum(p * scaled(end, name, scales) for p, end in zip(samples / samples.sum(), ends, strict=True))
            torch.testing.assert_close(scaled(served, name, scales), expected, rtol=0, atol=1e-6)
            assert served[name].abs().max() > 1e-3
            assert bool((served.get(scales, torch.ones(1)) == 1).all())
            assert rule == "fed_sb" or all(bool((end[scales] != 1).all()) for end in ends), "they are trained"
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.05
    kept = {key.partition("|")[0].rpartition(".")[2] for key in loop.population.optimizer_of(0)}
    assert kept == {CORES}, "the moments of factors that are new are forgotten"


def scaled(adapter: Any, cores: str, scales: str) -> torch.Tensor:
    found: torch.Tensor = adapter[cores].double()
    return found * adapter[scales].double()[:, None, None] if scales in adapter else found


def test_the_cut_gives_the_bits_of_the_whole_model_and_the_same_export(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    short = ["adapter.dropout=0.1", "trainer.max_local_steps=2", "split.tail_layers=0"]
    rows = []
    for transport in ("none", "inprocess"):
        recommender, loop = made(tiny_overrides, "ravan", *short, f"split.transport={transport}")
        for round_index in range(2):
            loop.run_round(round_index)
        rows.append(loop.population.bank.row(0))
        recommender.adapter.save(rows[-1], recommender.backbone, dict, tmp_path / transport)
    assert set(rows[0]) == set(rows[1])
    assert all(torch.equal(rows[1][name], tensor) for name, tensor in rows[0].items())
    files = [(tmp_path / transport / "adapter_model.safetensors").read_bytes() for transport in ("none", "inprocess")]
    assert files[0] == files[1]


@pytest.mark.parametrize("rule", ["fed_sb", "ravan", "fedavg", "fedadam", "fellrec"])
def test_rules_accept_the_adapters(rule: str) -> None:
    build_rule(compose([*KINDS.get(rule, ["adapter=lora_heads"]), f"aggregation={rule}"]))
