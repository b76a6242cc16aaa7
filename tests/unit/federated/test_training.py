"""Local training and the loop on a small synthetic run: laws, failures, Lightning's trainer, rules through the cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning import Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, PolynomialLR

from fellrec.aggregation import AggregationCallback, FedAvg
from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.errors import ConfigError, TrainingError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_federation, build_loop
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.populations import SharedAndPersonal
from fellrec.federated.records import Aggregated, Failed, Job, ScoreJob, Updates
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.functional.rng import derive_seed
from fellrec.types import Evaluation

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
def make_alone(tiny_overrides: list[str]) -> Make:
    """A loop with a recommender of its own, for settings that the recommender holds."""

    def build(*overrides: str) -> FederatedLoop:
        config = compose([*tiny_overrides, *overrides])
        return build_loop(config, build_recommender(config, build_data(config)))

    return build


def adapters(loop: FederatedLoop) -> dict[str, Tensor]:
    """Every row's adapter, name → ``[rows, *shape]``."""
    return dict(loop.population.bank.tensors)


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def module_of(loop: FederatedLoop) -> Any:
    return loop.executor.trainer.module  # type: ignore[attr-defined]


def test_the_same_seed_gives_the_same_bits(make: Make) -> None:
    first, second, other = make(), make(), make("seed=1")
    results = [loop.run() for loop in (first, second, other)]
    assert equal(adapters(first), adapters(second))
    assert results[0].evaluation.summary == results[1].evaluation.summary
    assert not equal(adapters(first), adapters(other))


def test_fedavg_leaves_all_clients_with_one_adapter_and_local_does_not(make: Make) -> None:
    fedavg, local = make("aggregation=fedavg"), make("aggregation=local")
    fedavg.run()
    local.run()
    for name, tensor in adapters(fedavg).items():
        assert torch.equal(tensor[0], tensor[1]), name
    assert any(not torch.equal(tensor[0], tensor[1]) for tensor in adapters(local).values())


def test_with_one_client_every_rule_is_local_training(tiny_overrides: list[str]) -> None:
    config = compose([*tiny_overrides, "partition.num_clients=1"])
    alone = build_recommender(config, build_data(config))
    results = []
    for rule in ("local", "fedavg", "fellrec", "uniform", "centralized"):
        loop = build_loop(compose([*tiny_overrides, "partition.num_clients=1", f"aggregation={rule}"]), alone)
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
        for batch in datamodule.train_loader(client, derive_seed(0, "order", 0, client, 0)):
            total, count = module.objective.loss(module.model, batch)
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
        ends.append({name: parameter.detach().numpy().copy() for name, parameter in module.trainable.items()})
        counts.append(datamodule.num_samples(client))
    loop.run_round(0)
    for name, tensor in adapters(loop).items():
        expected = np.average([end[name] for end in ends], axis=0, weights=counts)
        np.testing.assert_allclose(tensor[0].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(
    recommender: Recommender, tiny_overrides: list[str], tmp_path: Path
) -> None:
    def build(num_rounds: int) -> Any:
        config = compose([*tiny_overrides, f"trainer.num_rounds={num_rounds}", "aggregation=fellrec"])
        return build_federation(config, recommender)

    whole, first, second = build(4), build(2), build(4)
    expected = whole.loop().run()
    first.loop().run()
    CheckpointFolder(tmp_path).save(first.persisted, 2)
    assert CheckpointFolder(tmp_path).load(second.persisted) == 2
    loop = second.loop()
    found = loop.run()
    assert equal(adapters(loop), dict(whole.population.bank.tensors))
    assert found.evaluation.summary == expected.evaluation.summary
    assert second.population.local_steps == whole.population.local_steps
    assert found.best_round == expected.best_round


def test_a_diverging_client_is_named_and_the_last_state_stays(
    recommender: Recommender, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1's first loss of round 1 is not a number."""
    config = compose([*tiny_overrides, "trainer.num_rounds=3"])
    federation = build_federation(config, recommender)
    where = Where()
    checkpoint = Checkpoint(tmp_path, federation.persisted, federation.population)
    loop = federation.loop([checkpoint, where])
    loss = recommender.module.objective.loss

    def poisoned(model: object, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        total, count = loss(model, batch)  # type: ignore[arg-type]
        return total * (float("nan") if where.now == (1, 1) else 1.0), count

    monkeypatch.setattr(recommender.module.objective, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"client 1 became nan in round 1, local step 0"):
        loop.run()
    again = build_federation(config, recommender)
    assert CheckpointFolder(tmp_path / "checkpoints").load(again.persisted) == 1
    assert all(tensor.isfinite().all() for tensor in again.population.bank.tensors.values())


class Where(FederatedCallback):
    """Which round and client train."""

    now = (-1, -1)

    def on_client_start(self, job: Job) -> None:
        self.now = (job.round_index, job.row)


def break_client(loop: FederatedLoop, monkeypatch: pytest.MonkeyPatch, client: int, error: Exception) -> None:
    """From its second step of each round on, one client's loss raises."""
    objective, where, calls = module_of(loop).objective, Where(), []
    loop.events.callbacks.append(where)
    loss = objective.loss

    def broken(model: object, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        if where.now[1] == client:
            calls.append(1)
            if len(calls) > 1:
                raise error
        return loss(model, batch)

    monkeypatch.setattr(objective, "loss", broken)


def test_a_client_that_raises_is_named_with_its_round(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make()
    break_client(loop, monkeypatch, 1, torch.OutOfMemoryError("out of memory\nTried to allocate"))
    with pytest.raises(TrainingError, match=r"client 1 failed in round 0 with OutOfMemoryError: out of memory \("):
        loop.run()


def test_a_client_that_raises_can_be_left_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other clients train; the traceback is logged for --debug."""
    loop = make("participation.on_failure=skip", "participation.quorum=0.6")
    break_client(loop, monkeypatch, 1, TypeError("a mistake in an objective"))
    with caplog.at_level("DEBUG", logger="fellrec"):
        result = loop.run()
    assert result.failed_clients == {"0": [1], "1": [1]}
    assert "in broken" in caplog.text
    assert "a mistake in an objective" in caplog.text


def test_an_error_of_a_callback_is_not_a_failure_of_a_client(make: Make) -> None:
    class Broken(FederatedCallback):
        def on_step_end(self, loss: float) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make("participation.on_failure=skip", callbacks=(Broken(),)).run()


def test_parts_of_a_clients_users_are_together_all_of_them(make_alone: Make) -> None:
    """Batches are dealt out to the parts, so every user's figures are the same to the last bit."""
    loop = make_alone("trainer.eval_batch_size=7")
    evaluator, module = loop.executor.evaluator, module_of(loop)  # type: ignore[attr-defined]
    job = ScoreJob(0, loop.population.initial, (0,))
    evaluator.score(job, "val", -1)
    ((users, clients, values, *_),) = module.take_users()
    assert len(users) > 7
    for part in (2, 0, 1):
        evaluator.score(job, "val", -1, part, 3)
    (found,) = module.take_users()
    order, before = found[0].argsort(), users.argsort()
    assert torch.equal(found[0][order], users[before])
    assert torch.equal(found[1][order], clients[before])
    assert torch.equal(found[2][order], values[before])
    assert len(module.take_users()[0][0]) == 0


def test_a_huge_learning_rate_ends_in_a_message(make_alone: Make) -> None:
    with pytest.raises(TrainingError, match=r"client \d .*round \d"):
        make_alone("trainer.learning_rate=1e30", "trainer.gradient_clip=null").run()


def test_forgetting_the_moments_changes_the_second_round_only(make: Make) -> None:
    kept, forgotten = make(), make("trainer.reset_optimizer=true")
    for loop in (kept, forgotten):
        loop.run_round(0)
    assert equal(adapters(kept), adapters(forgotten))
    kept.run_round(1)
    forgotten.run_round(1)
    assert not equal(adapters(kept), adapters(forgotten))


class Values(FederatedCallback):
    """Keeps the mean of every validation."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        if evaluation.stage == "val":
            self.means.append(evaluation.summary["ndcg_at_10/mean"])


def test_the_best_round_is_tested_not_the_last(make: Make) -> None:
    values = Values()
    loop = make("trainer.num_rounds=4", callbacks=(values,))
    result = loop.run()
    best = int(np.argmax(values.means)) - 1
    assert len(values.means) == 5
    assert result.best_round == best == result.evaluation.round_index
    again = make("trainer.num_rounds=4")
    for round_index in range(best + 1):
        again.run_round(round_index)
    evaluation = again.evaluate(again.population.score_jobs(), "test", best)
    assert evaluation.summary == result.evaluation.summary


def test_local_steps_are_bounded_for_clients_and_pool_alike(make: Make) -> None:
    local, pooled = make("trainer.max_local_steps=2"), make("trainer.max_local_steps=2", "aggregation=centralized")
    for loop in (local, pooled):
        loop.run_round(0)
    assert local.population.local_steps == [2, 2, 2]
    assert pooled.population.local_steps == [6]


def test_gradients_left_in_the_backbone_are_not_learned(make: Make, recommender: Recommender) -> None:
    clean, dirty = make(), make()
    clean.run_round(0)
    for parameter in recommender.module.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    dirty.run_round(0)
    assert equal(adapters(clean), adapters(dirty))


def test_warm_up_raises_the_learning_rate_over_the_clients_own_steps(make: Make) -> None:
    trainer = make("trainer.warmup_steps=4", "trainer.learning_rate=1e-3").executor.trainer  # type: ignore[attr-defined]
    rates = [trainer.learning_rate(step, 0.5) for step in (0, 1, 3, 9)]
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
    make: Make, monkeypatch: pytest.MonkeyPatch, decay: str, scheduler: Callable[..., LRScheduler]
) -> None:
    """As PyTorch's own schedulers have it, over three rounds of two steps."""
    loop = make(f"trainer.learning_rate_decay={decay}", "trainer.num_rounds=3", "trainer.max_local_steps=2")
    full = loop.settings.learning_rate
    schedule = scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=full))
    expected, rates = [], []
    for _ in range(6):
        expected += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    configure = module_of(loop).configure_optimizers

    def watched() -> torch.optim.Optimizer:
        optimizer = configure()
        optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(module_of(loop), "configure_optimizers", watched)
    for round_index in range(3):
        loop.train([loop.population.job(0, round_index)])
    assert rates == pytest.approx(expected, rel=1e-6)


def test_sampled_candidates_have_metrics_of_their_own(make: Make, make_alone: Make) -> None:
    """Among all items they are the full ranking's, among five better; nothing else of an evaluation changes."""
    full = make().validate(-1).summary
    for num, compare in ((10_000, torch.equal), (5, lambda sampled, value: bool((sampled > value).all()))):
        found = make_alone(f"trainer.sampled_candidates={num}").validate(-1)
        prefix = f"sampled_{num}_"
        assert {name: value for name, value in found.summary.items() if not name.startswith(prefix)} == full
        names = [name for name in found.per_client if not name.startswith(prefix)]
        assert {f"{prefix}{name}" for name in names} | set(names) == set(found.per_client)
        assert compare(found.per_client[f"{prefix}ndcg_at_10"], found.per_client["ndcg_at_10"])
    with pytest.raises(ConfigError, match="trainer.metric"):
        compose(["trainer.sampled_candidates=5", "trainer.metric=sampled_5_ndcg_at_10"])


def lightning_trainer(epochs: int, **how: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet, **how)


def test_lightnings_trainer_and_a_federated_run_of_one_client_give_the_same_adapter(
    make: Make, recommender: Recommender
) -> None:
    """One client with the data of all, one local epoch: the same rows in the same order, AdamW and clipping."""
    loop = make("aggregation=centralized", "trainer.num_rounds=1")
    loop.run_round(0)
    module = recommender.module
    with torch.no_grad():
        for name, parameter in module.trainable.items():
            parameter.copy_(recommender.initial[name])
    lightning_trainer(1, gradient_clip_val=1.0, num_sanity_val_steps=0).fit(module, recommender.datamodule)
    for name, tensor in adapters(loop).items():
        torch.testing.assert_close(tensor[0], module.trainable[name].detach(), rtol=1e-6, atol=1e-8)


def test_lightnings_trainer_evaluates_as_the_loop_does(recommender: Recommender, make: Make) -> None:
    loop = make("aggregation=centralized")
    module = recommender.module
    trainer = lightning_trainer(2)
    trainer.fit(module, recommender.datamodule)
    logged = float(trainer.callback_metrics["val/ndcg_at_10/mean"])
    loop.population.bank.store(0, module.trainable)
    evaluation = loop.validate(0)
    assert logged == pytest.approx(evaluation.summary["ndcg_at_10/mean"], rel=1e-6)
    tested = trainer.test(module, recommender.datamodule, verbose=False)
    test = loop.evaluate(loop.population.score_jobs(), "test", 0)
    assert tested[0]["test/recall_at_10/pooled"] == pytest.approx(test.summary["recall_at_10/pooled"], rel=1e-6)


class Pull(LocalTerm):
    """A proximal term toward the received adapter and the anchor, if there is one."""

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor:
        references = [context.received, *context.anchors.values()]
        return sum(
            (0.5 * (v - r[k]).square().sum() for r in references for k, v in parameters.items()), torch.tensor(0.0)
        )


class Controls(LocalTerm):
    """SCAFFOLD's pattern: adds the difference of two control variates, and returns the mean raw gradient."""

    def correct(self, gradients: Mapping[str, Tensor], context: TermContext) -> None:
        sums = context.kept.setdefault("sum", {})
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
            for tensor, sign in (("own", -1.0), ("all", 1.0)):
                if name in context.tensors.get(tensor, {}):
                    gradient.add_(context.tensors[tensor][name], alpha=sign)

    def finish(
        self, parameters: Mapping[str, nn.Parameter], context: TermContext
    ) -> Mapping[str, Mapping[str, Tensor]]:
        return {"own": {name: value / context.num_steps for name, value in context.kept["sum"].items()}}


class Everything(FedAvg):
    """Uses all seams of a rule at once: terms, client tensors, server state, a base change, trained names, start loss."""

    needs_start_loss = True
    local_terms = (Pull(), Controls())
    client_tensors = ("own",)

    def __init__(self) -> None:
        self.start_losses: list[float] = []

    def trains(self, name: str, round_index: int) -> bool:
        return round_index != 1 or "lora_B" in name

    def group_of(self, name: str) -> str:
        return "A" if "lora_A" in name else "B"

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        assert updates.start_losses is not None
        self.start_losses += updates.start_losses.tolist()
        mixed = super().aggregate(updates, round_index)
        mean = {name: stack.mean(dim=0, keepdim=True) for name, stack in updates.tensors["own"].items()}
        common = {name: tensor.expand(len(updates.clients), *tensor.shape[1:]) for name, tensor in mean.items()}
        base: dict[str, Tensor] = {}
        for name in updates.end if round_index == 0 else ():
            if "lora_B" in name:
                weight, other = name.replace("lora_B.default", "base_layer"), name.replace("lora_B", "lora_A")
                base |= {f"{weight}|left": updates.end[name].mean(dim=0), f"{weight}|right": updates.end[other][0]}
        return Aggregated(mixed.adapters, mixed.matrices, {}, {"all": common}, base)

    def state_dict(self) -> dict[str, Any]:
        return {"start_losses": torch.tensor(self.start_losses, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_losses = state["start_losses"].tolist()


class Ditto(Everything):
    """The same with a shared and a personal model a client."""

    population = SharedAndPersonal


class Rates(LocalTerm):
    """Keeps the learning rates that it is told."""

    seen: ClassVar[list[float]] = []

    def correct(self, gradients: Mapping[str, Tensor], context: TermContext) -> None:
        self.seen.append(context.learning_rate)


class WithRates(FedAvg):
    local_terms = (Rates(),)


@pytest.mark.parametrize("transport", ["none", "inprocess"])
@pytest.mark.parametrize("clip", ["null", "1.0"])
@pytest.mark.usefixtures("importable")
def test_a_local_term_knows_the_rate_of_the_step_that_follows(
    tiny_overrides: list[str], transport: str, clip: str
) -> None:
    """A warm-up of 2 steps: half the rate, then all of it; on both sides of a cut."""
    how = ["trainer.num_rounds=1", "trainer.max_local_steps=2", "trainer.warmup_steps=2", "trainer.learning_rate=0.01"]
    made = federation_of(
        tiny_overrides, WithRates, *how, f"trainer.gradient_clip={clip}", f"split.transport={transport}"
    )
    Rates.seen.clear()
    made.loop().train([made.population.job(0, 0)])
    sides = 1 if transport == "none" else 2
    assert sorted(Rates.seen) == sorted([0.005, 0.01] * sides)


class FailsAtTheEnd(LocalTerm):
    def finish(self, parameters: Any, context: TermContext) -> Mapping[str, Mapping[str, Tensor]]:
        raise RuntimeError("no variates")


class WithFailure(FedAvg):
    local_terms = (FailsAtTheEnd(),)


@pytest.mark.usefixtures("importable")
def test_a_local_term_that_fails_fails_its_client(tiny_overrides: list[str]) -> None:
    made = federation_of(tiny_overrides, WithFailure, "participation.on_failure=skip")
    (outcome,) = made.loop().train([made.population.job(1, 0)])
    assert isinstance(outcome, Failed)
    assert "the training of client 1 failed in round 0 with RuntimeError: no variates" in outcome.reason


def test_a_stop_within_a_round_loses_no_traffic_of_the_cut(tiny_overrides: list[str], tmp_path: Path) -> None:
    given = [*tiny_overrides, *SEAMS, "split.transport=inprocess", "aggregation=fedavg"]
    config = compose(given)
    recommender = build_recommender(config, build_data(config))

    def fresh() -> Any:
        made = build_federation(config, recommender)
        made.population.persist(tmp_path)
        return made

    first = fresh()
    first.loop().train([first.population.job(row, 0) for row in (0, 1)])
    second = fresh()
    second.loop().train([second.population.job(row, 0) for row in (0, 1, 2)])
    for row in (0, 1):
        assert second.ledger.rows_of(row, 0) == first.ledger.rows_of(row, 0)
    assert second.ledger.total(client=0, kind="hidden_state") > 0


@pytest.mark.parametrize("rule", ["centralized", "fedavg"])
def test_each_clients_best_round_can_be_tested_through_the_cut(tiny_overrides: list[str], rule: str) -> None:
    """Also where clients have one model together: what is evaluated is named by the client."""
    given = [*tiny_overrides, *SEAMS, f"aggregation={rule}", "trainer.select=client", "trainer.num_rounds=1"]
    found = []
    for transport in ("none", "inprocess"):
        config = compose([*given, f"split.transport={transport}"])
        found.append(build_federation(config, build_recommender(config, build_data(config))).loop().run())
    assert found[0].evaluation.summary == found[1].evaluation.summary


SEAMS = ["adapter=lora", "adapter.dropout=0.2", "backbone.num_layers=3", "trainer.num_rounds=3",
         "trainer.accumulate_grad_batches=2", "split.head_layers=1", "split.tail_layers=1"]  # fmt: skip


def federation_of(tiny_overrides: list[str], rule: type[AggregationCallback], *more: str) -> Any:
    config = compose([*tiny_overrides, *SEAMS, *more])
    config.aggregation = OmegaConf.create({"_target_": f"{rule.__module__}.{rule.__qualname__}"})
    return build_federation(config, build_recommender(config, build_data(config)))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module under its own name, so that a configuration can name its rules."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Everything, Ditto])
@pytest.mark.usefixtures("importable")
def test_every_seam_gives_the_same_bits_through_the_cut_and_after_a_resume(
    tiny_overrides: list[str], rule: type[AggregationCallback], tmp_path: Path
) -> None:
    """Adapters, moments, client tensors, state of the rule, start losses and the changed base."""
    whole, cut = (federation_of(tiny_overrides, rule, f"split.transport={how}") for how in ("none", "inprocess"))
    expected, found = whole.loop().run(), cut.loop().run()
    first = federation_of(tiny_overrides, rule, "trainer.num_rounds=2", "split.transport=inprocess")
    first.loop().run()
    CheckpointFolder(tmp_path).save(first.persisted, 2)
    again = federation_of(tiny_overrides, rule)
    CheckpointFolder(tmp_path).load(again.persisted)
    resumed = again.loop().run()
    for other, result in ((cut, found), (again, resumed)):
        assert result.evaluation.summary == expected.evaluation.summary
        assert equal(other.population.bank.tensors, whole.population.bank.tensors)
        for row in range(whole.population.num_rows):
            assert equal(other.population.optimizer_of(row), whole.population.optimizer_of(row))
            assert equal(other.population.tensors_of(row), whole.population.tensors_of(row))
        assert other.rule.start_losses == whole.rule.start_losses
        assert len(other.population.base) == len(whole.population.base) == 1
    assert len(set(whole.rule.start_losses)) > 3
    initial = whole.population.initial.tensors()
    frozen = [name for name in initial if "lora_A" in name]
    assert frozen
    assert any(not torch.equal(whole.population.bank.row(0)[name], initial[name]) for name in frozen), (
        "trained in round 0"
    )
