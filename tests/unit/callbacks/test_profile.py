"""The profile of a run: what is counted follows from the batches, and the parts are disjoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fellrec.callbacks.profile import OF_STEPS, PARTS, Profile, flops_per_token
from fellrec.config.compose import compose
from fellrec.data.batching import length_groups
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated import callback
from fellrec.federated.callback import Events, FederatedCallback
from fellrec.federated.executor import SerialExecutor
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.trial import first_batch, trial_step
from fellrec.models.objectives import groups
from fellrec.models.times import NO_TIMES, PartTimes

ROUNDS = 2


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int, once: str) -> None:
        assert once == "profile"
        self.metrics[step] = metrics


class Course(PartTimes):
    """Remembers where a step was."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.names: list[str | None] = []

    def enter(self, name: str | None) -> None:
        super().enter(name)
        self.names.append(name)


@pytest.fixture(scope="module")
def built(tiny_overrides: list[str]) -> tuple[list[str], Recommender]:
    given = [*tiny_overrides, f"trainer.num_rounds={ROUNDS}", "trainer.accumulate_grad_batches=2"]
    config = compose([*given, "split.head_layers=1", "split.tail_layers=0"])
    return [*given, "split.head_layers=1", "split.tail_layers=0"], build_recommender(config, build_data(config))


def profiled(built: tuple[list[str], Recommender]) -> tuple[FederatedLoop, Log, Profile]:
    given, recommender = built
    log = Log()
    profile = Profile(log, recommender.module, recommender.datamodule, recommender.fabric, 0)  # type: ignore[arg-type]
    return build_loop(compose(given), recommender, [FederatedCallback(), profile]), log, profile


def test_tokens_and_padding_are_those_of_the_batches_and_the_result_is_that_of_a_run_without(
    built: tuple[list[str], Recommender], capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens by the widths of each batch's groups of rows; a round without a part has all its seconds elsewhere."""
    given, recommender = built
    loop, log, profile = profiled(built)
    loop.run()
    plain = build_loop(compose(given), recommender)
    plain.run()
    expected = plain.population.bank.tensors
    assert all(torch.equal(loop.population.bank.tensors[name], expected[name]) for name in expected)
    assert list(log.metrics) == list(range(ROUNDS))
    executor = plain.executor
    assert isinstance(executor, SerialExecutor)
    for round_index, metrics in log.metrics.items():
        padded = inside = 0
        for job in (plain.population.job(row, round_index) for row in range(3)):
            for batch in (batch for step in executor.trainer.batches(job) for batch in step):
                lengths = batch["lengths"]
                divided = length_groups(lengths) or [torch.arange(len(lengths))]
                padded += sum(len(rows) * int(lengths[rows].max()) for rows in divided)
                inside += int(lengths.sum())
        in_steps = sum(metrics[f"profile/{name}_seconds"] for name in OF_STEPS)
        assert metrics["profile/tokens_per_second"] * in_steps == pytest.approx(padded)
        assert metrics["profile/padding_rate"] == pytest.approx(1 - inside / padded)
        assert profile.flops_per_token is not None
        assert metrics["profile/utilisation"] * in_steps * profile.matrix_rate == pytest.approx(
            profile.flops_per_token * padded
        )
        seconds = {name: metrics[f"profile/{name}_seconds"] for name in (*PARTS, "other")}
        assert min(seconds.values()) >= 0
        assert {name for name, value in seconds.items() if value == 0} == set(), "every part was seen"
        assert sum(seconds.values()) == pytest.approx(metrics["profile/total_seconds"])
    printed = capsys.readouterr().err
    assert "Profile of this process" in printed
    assert all(name in printed for name in PARTS)


def test_a_step_enters_its_parts_in_both_directions(
    built: tuple[list[str], Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward, each group of rows goes through all parts before the group that was computed before it."""
    _, recommender = built
    monkeypatch.setattr(groups, "length_groups", lambda lengths: length_groups(lengths, least_saving=20))
    times, batch = Course(), first_batch(recommender.datamodule, 0)
    num = len(groups.RowGroups(batch["lengths"]))
    assert num > 1, "a batch whose rows have different lengths"
    recommender.module.model.times = times
    times.enter("logits")
    trial_step(recommender.fabric, recommender.module, batch, 0)
    recommender.module.model.times = NO_TIMES
    forward, backward = ["head", "body", "tail"], ["tail", "body", "head"]
    entered = [name for name, before in zip(times.names, [None, *times.names], strict=False) if name != before]
    found = [name for name in entered if name != "logits"]
    assert found == num * forward + num * backward
    assert entered[0] == "logits"
    assert entered[entered.index("tail") + 1] == "logits"


def test_outside_of_a_step_nothing_is_measured(built: tuple[list[str], Recommender]) -> None:
    _, recommender = built
    times, model = PartTimes(torch.device("cpu")), recommender.module.model
    before, model.times = model.times, times
    hidden = model(torch.tensor([[1, 5, 7]]))
    model.times = before
    assert "Boundary" not in str(hidden.grad_fn)
    assert (times.seconds, times.num_tokens) == ({}, 0)


def test_flops_are_those_of_the_matrix_products(built: tuple[list[str], Recommender]) -> None:
    """Three times the forward pass when all weights are trained: 2 for each weight of a linear layer and token, 4·L·D
    for attention, and 2·D for each target and item; the angles of rotary positions are the rest.
    """
    _, recommender = built
    batch, model = first_batch(recommender.datamodule, 0), recommender.module.model.model
    size, layers = model.config.hidden_size, model.config.num_hidden_layers
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    lengths = batch["lengths"]
    divided = length_groups(lengths) or [torch.arange(len(lengths))]
    shapes = [(len(rows), int(lengths[rows].max())) for rows in divided]
    tokens = sum(rows * width for rows, width in shapes)
    forward = 2 * tokens * linear + sum(4 * layers * rows * width * width * size for rows, width in shapes)
    forward += 2 * len(batch["targets"]) * len(recommender.data.catalogue) * size
    found = flops_per_token(recommender.fabric, recommender.module, recommender.datamodule, 0)
    assert found == pytest.approx(3 * forward / tokens, rel=1e-3)
    assert found >= 3 * forward / tokens


def test_events_add_the_seconds_of_the_observers_and_not_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a hook advances: the rule by 1 s, the observers by 10 and 100."""
    now = [0.0]

    class Takes(FederatedCallback):
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def on_round_start(self, round_index: int) -> None:
            now[0] += self.seconds

    monkeypatch.setattr(callback.time, "perf_counter", lambda: now[0])
    events = Events([Takes(1.0), Takes(10.0), Takes(100.0)])
    events.call("on_round_start", 0)
    events.call("on_step_end", 0.5)
    assert events.seconds == 110.0


def test_it_is_added_to_the_default_callbacks(tmp_path: Path) -> None:
    default = compose([]).callbacks
    found = compose(["+callbacks=profile", "trainer.num_rounds=1"]).callbacks
    assert list(found) == [*default, "profile"]
    assert list(compose(["callbacks=[default,profile]"]).callbacks) == list(found)
