"""The planned peak memory compared with the allocations that PyTorch's profiler records in local training."""

from __future__ import annotations

import pytest
from torch.profiler import ProfilerActivity, profile

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.planning.plan import Planner


def peak_of(prof: profile) -> int:
    """Maximum of the memory that is allocated at one time."""
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["adapter=lora"], ["adapter=lora", "trainer.clients_per_step=3"], ["adapter=lora", "split.transport=inprocess"], ["adapter=full"], ["adapter=lora", "adapter.layers=body+tail", "objective.num_negatives=20"],
     ["adapter=lora", "objective.item_encoder=encoded", "objective.refresh_items=round", "objective.chunk_items=20"]],
    ids=" ".join,
)  # fmt: skip
def test_planned_peak_memory_equals_the_profile(overrides: list[str], tiny_overrides: list[str]) -> None:
    """One client, or three at once, with a model whose activations dominate; the weights are allocated before profiling."""
    shape = ["backbone.hidden_size=96", "backbone.num_heads=4", "backbone.num_layers=8", "trainer.batch_size=64"]
    how = ["trainer.max_local_steps=2", "backbone.pretrain.steps=1"]
    config = compose([*tiny_overrides, *shape, *how, *overrides])
    plan = Planner().plan(config)
    loop = build_loop(config, build_recommender(config, build_data(config)), ())
    rows = loop.participation.draw(loop.population, 0).rows[: config.trainer.clients_per_step]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        loop.train([loop.population.job(row, 0) for row in rows])
    weights = plan.client.weight_bytes + plan.server.weight_bytes
    assert plan.client_peak_bytes + plan.server_peak_bytes == pytest.approx(peak_of(prof) + weights, rel=0.25)
