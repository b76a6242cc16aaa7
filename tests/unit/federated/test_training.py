"""The federated loop on a small synthetic run: laws, resume, failure, selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, PolynomialLR

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.errors import ConfigError, TrainingError
from fellrec.experiment import Recommender, build_data, build_loop, build_recommender
from fellrec.federated.callback import HOOKS, FederatedCallback
from fellrec.federated.checkpoint import load_state, rounds_on_disk, save_state
from fellrec.federated.loop import FederatedLoop
from fellrec.functional.participation import cohort
from fellrec.types import Aggregated, Evaluation

Make = Callable[..., FederatedLoop]


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose(tiny_overrides)
    return build_recommender(config, build_data(config))


@pytest.fixture
def make(recommender: Recommender, tiny_overrides: list[str]) -> Make:
    """A fresh loop over the module's one recommender."""

    def build(*overrides: str, callbacks: tuple[FederatedCallback, ...] = ()) -> FederatedLoop:
        return build_loop(compose([*tiny_overrides, *overrides]), recommender, callbacks)

    return build


@pytest.fixture
def make_anew(tiny_overrides: list[str]) -> Make:
    """A loop with a recommender of its own, for settings that the recommender holds."""

    def build(*overrides: str) -> FederatedLoop:
        config = compose([*tiny_overrides, *overrides])
        return build_loop(config, build_recommender(config, build_data(config)), ())

    return build


def adapters(loop: FederatedLoop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.state.bank.tensors.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_same_seed_gives_the_same_bits(make: Make) -> None:
    first, second, other = make(), make(), make("seed=1")
    evaluations = [loop.run() for loop in (first, second, other)]
    assert equal(adapters(first), adapters(second))
    assert evaluations[0].summary == evaluations[1].summary
    assert not equal(adapters(first), adapters(other))


def test_fedavg_leaves_all_clients_with_one_adapter_and_local_does_not(make: Make) -> None:
    fedavg, local = make("aggregation=fedavg"), make("aggregation=local")
    fedavg.run()
    local.run()
    for name, tensor in adapters(fedavg).items():
        assert torch.equal(tensor[0], tensor[1]), name
    assert any(not torch.equal(tensor[0], tensor[1]) for tensor in adapters(local).values())


def test_with_one_client_every_rule_is_local_training(make: Make, tiny_overrides: list[str]) -> None:
    config = compose([*tiny_overrides, "partition.num_clients=1"])
    alone = build_recommender(config, build_data(config))
    results = []
    for rule in ("local", "fedavg", "fellrec", "uniform", "centralized"):
        loop = build_loop(compose([*tiny_overrides, "partition.num_clients=1", f"aggregation={rule}"]), alone, ())
        loop.run()
        results.append(adapters(loop))
    assert all(equal(results[0], other) for other in results[1:])


def test_a_fedavg_round_is_local_training_and_the_weighted_mean(make: Make, recommender: Recommender) -> None:
    """Each client alone, by plain AdamW from the common start; then NumPy's mean weighted by training targets."""
    loop = make("aggregation=fedavg", "trainer.gradient_clip=null")
    ends, counts = [], []
    module, datamodule = recommender.module, recommender.datamodule
    for client in range(3):
        with torch.no_grad():
            for name, parameter in module.trainable.items():
                parameter.copy_(recommender.initial[name])
        optimizer = torch.optim.AdamW(module.trainable.values(), lr=1e-3, weight_decay=0.01)
        module.train()
        from fellrec.functional.rng import derive_seed

        for batch in datamodule.train_loader(client, derive_seed(0, "order", 0, client, 0)):
            total, count = module.objective.loss(module.model, batch)
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
        ends.append({name: parameter.detach().numpy().copy() for name, parameter in module.trainable.items()})
        counts.append(datamodule.num_samples(client))
    loop.validate(-1)
    loop.run_round(0)
    for name, tensor in adapters(loop).items():
        expected = np.average([end[name] for end in ends], axis=0, weights=counts)
        np.testing.assert_allclose(tensor[0].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    whole = make("trainer.num_rounds=4", "aggregation=fellrec")
    expected = whole.run()
    first = make("trainer.num_rounds=2", "aggregation=fellrec")
    first.run()
    save_state(tmp_path, first.state)
    second = make("trainer.num_rounds=4", "aggregation=fellrec")
    load_state(tmp_path, second.state)
    assert second.state.round_index == 2
    got = second.run()
    assert equal(adapters(whole), adapters(second))
    assert got.summary == expected.summary
    assert second.state.local_steps == whole.state.local_steps
    assert second.state.selection.round_index == whole.state.selection.round_index


def test_old_checkpoints_go_and_the_newest_stay(make: Make, tmp_path: Path) -> None:
    make("trainer.num_rounds=4", callbacks=(Checkpoint(tmp_path),)).run()
    assert rounds_on_disk(tmp_path / "checkpoints") == [3, 4]


def test_there_must_be_something_to_resume(make: Make, tmp_path: Path) -> None:
    loop = make()
    with pytest.raises(TrainingError, match="nothing to resume: no checkpoint"):
        load_state(tmp_path, loop.state)


def test_a_diverging_client_is_named_and_the_last_state_stays(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make("trainer.num_rounds=3", callbacks=(Checkpoint(tmp_path),))
    step = loop.trainer._step

    def poisoned(batch: dict[str, torch.Tensor]) -> tuple[float, int]:
        if loop.state.round_index == 1 and loop.state.local_steps[0] > loop.trainer.num_steps(0):
            return float("nan"), 1
        return step(batch)

    monkeypatch.setattr(loop.trainer, "_step", poisoned)
    with pytest.raises(TrainingError, match=r"client 1 became nan in round 1, local step 0"):
        loop.run()
    fresh = make("trainer.num_rounds=3")
    load_state(tmp_path / "checkpoints", fresh.state)
    assert fresh.state.round_index == 1
    assert all(tensor.isfinite().all() for tensor in adapters(fresh).values())


def break_client(loop: FederatedLoop, monkeypatch: pytest.MonkeyPatch, client: int, error: Exception) -> None:
    """From its second step on, one client's loss raises."""
    loss, calls = loop.module.objective.loss, []

    def broken(model: object, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        ids = loop.datamodule._rows(client)
        if int(batch["row_ids"].min()) >= ids.first_id and int(batch["row_ids"].max()) < ids.first_id + len(ids):
            calls.append(1)
            if len(calls) > 1:
                raise error
        return loss(model, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.module.objective, "loss", broken)


def test_a_client_that_raises_is_named_with_its_round(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make()
    break_client(loop, monkeypatch, 1, torch.OutOfMemoryError("out of memory\nTried to allocate"))
    with pytest.raises(TrainingError, match=r"client 1 failed in round 0 with OutOfMemoryError: out of memory \("):
        loop.run()


def test_a_client_that_raises_can_be_left_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others go on; where it happened is logged for --debug."""
    loop = make("participation.on_failure=skip", "participation.quorum=0.6")
    break_client(loop, monkeypatch, 1, TypeError("a mistake in an objective"))
    with caplog.at_level("DEBUG", logger="fellrec"):
        loop.run()
    assert loop.state.extras["dropped_clients"] == {"0": [1], "1": [1]}
    assert "in broken" in caplog.text
    assert "a mistake in an objective" in caplog.text


def test_an_error_of_a_callback_is_no_failure_of_a_client(make: Make) -> None:
    class Broken(FederatedCallback):
        def on_step_end(self, loop: FederatedLoop, loss: float) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make("participation.on_failure=skip", callbacks=(Broken(),)).run()


def test_an_adapter_that_the_last_step_spoilt_is_a_failure(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss was finite to the end."""
    loop = make("participation.on_failure=skip", "participation.quorum=0.1")
    step, calls = loop.optimizer.step, []

    def spoil() -> None:
        step()
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                next(iter(loop.module.trainable.values())).view(-1)[0] = float("inf")

    monkeypatch.setattr(loop.optimizer, "step", spoil)
    monkeypatch.setattr(loop.trainer, "num_steps", lambda client: 1)
    loop.validate(-1)
    loop.run_round(0)
    assert loop.state.extras["dropped_clients"] == {"0": [1]}


def test_parts_of_a_rows_users_are_together_all_of_them(make_anew: Make) -> None:
    """Batches are dealt out, so every user's figures are the same to the last bit."""
    loop = make_anew("trainer.eval_batch_size=7")
    loop.state.bank.copy_to(loop.module.trainable, 0)
    (metrics,) = loop.module.metrics
    loop.module.eval()
    loop.score_row("val", 0, "current")
    users, clients, values, *_ = metrics.take()
    assert len(users) > 7
    for part in (2, 0, 1):
        loop.score_row("val", 0, "current", part, 3)
    found = metrics.take()
    order = found[0].argsort()
    assert torch.equal(found[0][order], users)
    assert torch.equal(found[1][order], clients)
    assert torch.equal(found[2][order], values)
    assert len(metrics.take()[0]) == 0


def test_a_huge_learning_rate_ends_in_a_message(make_anew: Make) -> None:
    with pytest.raises(TrainingError, match=r"client \d .*round \d"):
        make_anew("trainer.learning_rate=1e30", "trainer.gradient_clip=null").run()


def test_forgetting_the_moments_changes_the_second_round_only(make: Make) -> None:
    kept, forgotten = make(), make("trainer.reset_optimizer=true")
    for loop in (kept, forgotten):
        loop.validate(-1)
        loop.run_round(0)
    assert equal(adapters(kept), adapters(forgotten))
    kept.run_round(1)
    forgotten.run_round(1)
    assert not equal(adapters(kept), adapters(forgotten))


def test_absent_clients_are_untouched(make: Make) -> None:
    loop = make("participation.rate=0.5", "aggregation=fedavg")
    before = adapters(loop)
    loop.validate(-1)
    loop.run_round(0)
    present = cohort(3, 0.5, 0, 0)
    assert len(present) == 2
    for name, tensor in adapters(loop).items():
        for client in range(3):
            assert torch.equal(tensor[client], before[name][client]) == (client not in present), (name, client)


def test_selection_never_sees_the_test_holdout(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a test holdout in which the worst item is right, the same round and adapters are selected."""
    honest, poisoned = make("trainer.num_rounds=3"), make("trainer.num_rounds=3")
    honest.run()
    stages = []
    evaluate = poisoned.evaluate

    def spy(stage: str, *arguments: object) -> object:
        stages.append(stage)
        return evaluate(stage, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(poisoned, "evaluate", spy)
    poisoned.run()
    assert stages == ["val"] * 4 + ["test"]
    assert equal(dict(honest.state.selection.bank.tensors), dict(poisoned.state.selection.bank.tensors))


class Values(FederatedCallback):
    """Records every validation."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        if evaluation.stage == "val":
            self.means.append(evaluation.summary["ndcg_at_10/mean"])


class Spoil(FederatedCallback):
    """Breaks every adapter from round 2 on."""

    def on_aggregate_end(self, loop: FederatedLoop, aggregated: Aggregated) -> None:
        if loop.state.round_index >= 2:
            spoilt = {
                name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
                for name, tensor in loop.state.bank.tensors.items()
            }
            loop.state.bank.replace(range(len(loop.state.bank)), spoilt)


def test_the_best_round_is_tested_not_the_last(make: Make) -> None:
    values = Values()
    loop = make("trainer.num_rounds=4", callbacks=(values, Spoil()))
    test = loop.run()
    best = int(np.argmax(values.means)) - 1
    assert len(values.means) == 5
    assert best < 2, "spoilt adapters are not the best"
    assert loop.state.selection.round_index == best == test.round_index
    again = make("trainer.num_rounds=4")
    for round_index in range(best + 1):
        again.run_round(round_index)
    assert again.evaluate("test", best, "current", again.row_of_client).summary == test.summary


def test_patience_stops_the_run(make_anew: Make) -> None:
    loop = make_anew("trainer.learning_rate=0.5", "trainer.num_rounds=30", "trainer.patience=2")
    loop.run()
    assert loop.state.round_index == loop.state.selection.round_index + 1 + 2 < 30


def test_each_client_can_keep_its_own_best_round(make: Make) -> None:
    loop = make("trainer.select=client", "trainer.num_rounds=3", "aggregation=local")
    test = loop.run()
    selection = loop.state.selection
    assert all(value >= 0 for value in selection.client_values)
    for client, best in enumerate(selection.client_rounds):
        again = make("trainer.num_rounds=3", "aggregation=local")
        for round_index in range(best + 1):
            again.run_round(round_index)
        evaluation = again.evaluate("test", best, "current", again.row_of_client)
        assert evaluation.per_client["ndcg_at_10"][client] == test.per_client["ndcg_at_10"][client]


def test_hooks_come_in_order(make: Make) -> None:
    seen: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda self, *arguments: seen.append(name)

    recorder = type("Recorder", (FederatedCallback,), {name: record(name) for name in HOOKS})()
    make("trainer.num_rounds=1", callbacks=(recorder,)).run()
    assert [name for name in seen if name != "on_step_end"] == [
        "on_fit_start",
        *["on_evaluate_start", "on_evaluate_end"],
        "on_round_start",
        *["on_client_start", "on_client_end"] * 3,
        *["on_aggregate_start", "on_aggregate_end"],
        *["on_evaluate_start", "on_evaluate_end"],
        "on_round_end",
        *["on_evaluate_start", "on_evaluate_end"],
        "on_fit_end",
    ]


def test_local_steps_are_bounded_for_clients_and_pool_alike(make: Make) -> None:
    local, pooled = make("trainer.max_local_steps=2"), make("trainer.max_local_steps=2", "aggregation=centralized")
    for loop in (local, pooled):
        loop.validate(-1)
        loop.run_round(0)
    assert local.state.local_steps == [2, 2, 2]
    assert pooled.state.local_steps == [6]


def test_gradients_left_behind_are_not_learned(make: Make, recommender: Recommender) -> None:
    clean, dirty = make(), make()
    clean.run_round(0)
    for parameter in recommender.module.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    dirty.run_round(0)
    assert equal(adapters(clean), adapters(dirty))


def test_warm_up_raises_the_learning_rate_over_the_clients_own_steps(make: Make) -> None:
    loop = make("trainer.warmup_steps=4", "trainer.learning_rate=1e-3")
    rates = []
    for step in (0, 1, 3, 9):
        loop.trainer._set_learning_rate(step, 0.5)
        rates.append(loop.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("decay", "scheduler"),
    [
        ("none", partial(ConstantLR, factor=1)),
        ("linear", partial(PolynomialLR, total_iters=6)),
        ("cosine", partial(CosineAnnealingLR, T_max=6)),
    ],
)
def test_the_learning_rate_decays_over_the_rounds(
    make: Make, decay: str, scheduler: Callable[..., LRScheduler]
) -> None:
    """As PyTorch's own schedulers have it, over three rounds of two steps."""
    loop = make(f"trainer.learning_rate_decay={decay}", "trainer.num_rounds=3", "trainer.max_local_steps=2")
    schedule = scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=loop.optimizer.param_groups[0]["lr"]))
    expected, rates = [], []
    for _ in range(6):
        expected += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    loop.optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for round_index in range(3):
        loop.train((0,), round_index)
    assert rates == pytest.approx(expected, rel=1e-6)


def test_sampled_candidates_have_metrics_of_their_own(make: Make, make_anew: Make) -> None:
    """Among all items they are the full ranking's, among five better; nothing else of an evaluation changes."""
    full = make().validate(-1).summary
    for num, compare in ((10_000, torch.equal), (5, lambda sampled, value: bool((sampled > value).all()))):
        found = make_anew(f"trainer.sampled_candidates={num}").validate(-1)
        prefix = f"sampled_{num}_"
        assert {name: value for name, value in found.summary.items() if not name.startswith(prefix)} == full
        names = [name for name in found.per_client if not name.startswith(prefix)]
        assert {f"{prefix}{name}" for name in names} | set(names) == set(found.per_client)
        assert compare(found.per_client[f"{prefix}ndcg_at_10"], found.per_client["ndcg_at_10"])
    with pytest.raises(ConfigError, match="trainer.metric"):
        compose(["trainer.sampled_candidates=5", "trainer.metric=sampled_5_ndcg_at_10"])


def test_too_many_adapters_for_the_memory_are_refused(make_anew: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(ConfigError, match=r"3 clients with an adapter of .* MB each need about .* GB of memory"):
        make_anew("split.transport=inprocess", "split.head_layers=0")


def test_lightnings_trainer_is_the_centralised_baseline(recommender: Recommender, make: Make) -> None:
    loop = make("aggregation=centralized")
    start = loop.validate(-1).summary["ndcg_at_10/mean"]
    module = recommender.module
    loop.state.bank.copy_to(module.trainable, 0)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, recommender.datamodule)
    logged = float(trainer.callback_metrics["val/ndcg_at_10/mean"])
    loop.state.bank.store(0, module.trainable)
    evaluation = loop.evaluate("val", 0, "current", loop.row_of_client)
    assert logged == pytest.approx(evaluation.summary["ndcg_at_10/mean"], rel=1e-6)
    assert logged > start, "two epochs of training help"
    tested = trainer.test(module, recommender.datamodule, verbose=False)
    test = loop.evaluate("test", 0, "current", loop.row_of_client)
    assert tested[0]["test/recall_at_10/pooled"] == pytest.approx(test.summary["recall_at_10/pooled"], rel=1e-6)
