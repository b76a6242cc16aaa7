"""Whole runs through the executed cut: the same bits as one model, private things that never cross, a ledger that adds up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from run_tensors import adapters, assert_same, optimizer_states, own_tensors, selected
from torch import Tensor

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.cut.client_model import CutClientModel
from fellrec.cut.link import InProcess, ServerLink
from fellrec.cut.messages import Gradient, HiddenState, OpenSlot, SelectRows, Serve
from fellrec.cut.server import BodyServer
from fellrec.distributed.message import Message
from fellrec.errors import ConfigError, TrainingError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import Federation, build_federation
from fellrec.experiment.storage import heads_of, storage_of
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import Job, Trained
from fellrec.functional.packing import Packed
from fellrec.models.module import FellrecModule
from fellrec.types import Evaluation

Run = Callable[..., FederatedLoop]


@pytest.fixture
def run(tiny_overrides: list[str]) -> Run:
    """Train two rounds with four layers; gives the loop."""

    def build(*overrides: str, callbacks: tuple[FederatedCallback, ...] = ()) -> FederatedLoop:
        loop = new_loop(tiny_overrides, *overrides, callbacks=callbacks)
        loop.run()
        return loop

    return build


def new_federation(tiny_overrides: list[str], *overrides: str) -> Federation:
    config = compose([*tiny_overrides, "backbone.num_layers=4", *overrides])
    return build_federation(config, build_recommender(config, build_data(config)))


def new_loop(
    tiny_overrides: list[str], *overrides: str, callbacks: tuple[FederatedCallback, ...] = ()
) -> FederatedLoop:
    return new_federation(tiny_overrides, *overrides).loop(callbacks)


def module_of(loop: FederatedLoop) -> FellrecModule:
    return loop.executor.evaluator.module  # type: ignore[attr-defined]


def link_of(loop: FederatedLoop) -> ServerLink:
    model = loop.executor.trainer.model  # type: ignore[attr-defined]
    assert isinstance(model, CutClientModel)
    return model.link


def server_of(loop: FederatedLoop) -> BodyServer:
    transport = link_of(loop).transport
    assert isinstance(transport, InProcess)
    return transport.server


class Values(FederatedCallback):
    """Losses of all clients and rounds, and all validation figures."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float, int]] = []
        self.figures: list[dict[str, float]] = []

    def on_client_end(self, trained: Trained) -> None:
        self.losses.append((trained.row, trained.loss, trained.num_steps))

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        self.figures.append(dict(evaluation.summary))


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "adapter=lora adapter.dropout=0.2",
        "adapter=lora aggregation=fedavg trainer.accumulate_grad_batches=3",
        "aggregation=local trainer.select=client trainer.warmup_steps=3 trainer.gradient_clip=null "
        "trainer.learning_rate_decay=linear",
        "aggregation=centralized adapter=lora",
        "objective.item_encoder=encoded adapter=lora trainer.gradient_clip=0.01",
        "split.head_layers=0 split.tail_layers=2 participation.rate=0.5 trainer.reset_optimizer=true trainer.num_rounds=3",
        "aggregation=scaffold adapter=lora trainer.gradient_clip=0.5 participation.rate=0.5 trainer.num_rounds=3",
        "aggregation=ditto",
        "aggregation=fedper aggregation.personal=b adapter=lora",
        "aggregation=fedrep split.tail_layers=2",
        "aggregation=fedamp aggregation.mu=1 trainer.gradient_clip=null",
        "aggregation=ifca aggregation.noise=0.5",
        "aggregation=fedfomo aggregation.num_models=1 adapter=lora",
        "aggregation=fedavg participation=power_of_choice participation.rate=0.3 trainer.num_rounds=3",
        "aggregation=pfedme aggregation.inner_steps=2 adapter=lora",
        "adapter=lora adapter.layers=body+tail",
        "adapter.layers=tail",
        "adapter.layers=head adapter=lora",
        "objective=generative ranker=likelihood adapter=lora trainer.num_rounds=1",
        "objective=generative adapter=lora ranker=grounding ranker.num_beams=2 ranker.max_new_tokens=5 "
        "trainer.num_rounds=1 trainer.learning_rate=0.05",
        "objective=generative adapter=lora ranker=constrained ranker.num_beams=3 trainer.num_rounds=1",
    ],
)
def test_a_run_through_the_cut_has_the_same_bits(run: Run, overrides: str) -> None:
    """Losses, adapters, optimiser states, selection, and every figure of every evaluation."""
    seen = Values(), Values()
    whole = run(*overrides.split(), callbacks=(seen[0],))
    cut = run(*overrides.split(), "split.transport=inprocess", callbacks=(seen[1],))
    assert seen[0].losses == seen[1].losses
    assert seen[0].figures == seen[1].figures
    assert_same(adapters(whole), adapters(cut))
    assert_same(selected(whole), selected(cut))
    assert_same(optimizer_states(whole), optimizer_states(cut))
    assert_same(own_tensors(whole), own_tensors(cut))
    assert optimizer_states(whole)
    assert whole.selection.client_rounds == cut.selection.client_rounds
    assert whole.population.local_steps == cut.population.local_steps
    start = cut.population.initial.tensors()
    assert any(not torch.equal(tensor[0], start[name]) for name, tensor in adapters(cut).items())


def test_bf16_stays_within_its_resolution(run: Run) -> None:
    """Autocast computes the same on both sides; hidden states travel as they are, so not even rounding differs."""
    whole = run("trainer.precision=bf16-mixed", "adapter=lora")
    cut = run("trainer.precision=bf16-mixed", "adapter=lora", "split.transport=inprocess")
    expected, found = adapters(whole), adapters(cut)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-5)


@pytest.fixture(scope="module")
def of_whole_model(tiny_overrides: list[str]) -> dict[str, Tensor]:
    """Adapters of a run without cuts."""
    loop = new_loop(tiny_overrides, "adapter=lora")
    loop.run()
    return adapters(loop)


@pytest.mark.parametrize("depth", [(0, 1), (2, 1), (1, 2)])
def test_where_the_cuts_are_changes_nothing(
    run: Run, of_whole_model: dict[str, Tensor], depth: tuple[int, int]
) -> None:
    """Dropout belongs to layers, not to parts: any two cuts give the same run."""
    where = [f"split.head_layers={depth[0]}", f"split.tail_layers={depth[1]}", "split.transport=inprocess"]
    assert_same(of_whole_model, adapters(run("adapter=lora", *where)))


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "adapter=lora adapter.dropout=0.2 adapter.rank=[1,2,4] aggregation=rbla",
        "aggregation=scaffold adapter=lora trainer.gradient_clip=0.01",
        "aggregation=flora adapter=lora",
        "aggregation=fedper aggregation.personal=tail trainer.select=client",
        "aggregation=centralized adapter=lora",
        "aggregation=fedfomo aggregation.num_models=1 adapter=lora",
        "objective.item_encoder=encoded adapter=lora participation.rate=0.7 trainer.num_rounds=3",
        "objective=generative adapter=lora ranker=grounding ranker.num_beams=2 ranker.max_new_tokens=5 "
        "trainer.num_rounds=1 trainer.learning_rate=0.05",
        "objective=generative adapter=lora ranker=constrained ranker.num_beams=3 trainer.num_rounds=1",
    ],
)
def test_clients_with_heads_of_different_depths_train_together(run: Run, overrides: str) -> None:
    """Clients with 2, 0 and 1 layers have the bits of one model that is not cut."""
    seen = Values(), Values()
    whole = run(*overrides.split(), callbacks=(seen[0],))
    heads = "split.head_layers=[2,0,1]", "split.transport=inprocess"
    cut = run(*overrides.split(), *heads, callbacks=(seen[1],))
    assert seen[0].losses == seen[1].losses
    assert seen[0].figures == seen[1].figures
    assert_same(adapters(whole), adapters(cut))
    assert_same(optimizer_states(whole), optimizer_states(cut))
    assert_same(own_tensors(whole), own_tensors(cut))


def test_a_client_sends_the_adapter_of_its_own_head(
    recorded: Callable[..., tuple[FederatedLoop, list[Message]]],
) -> None:
    """By the client's number of training samples: the server trains all layers that its head does not have.

    A client sends all but what the server trains. It has four layers, of which the last is the tail.
    """
    how = "adapter=lora", "trainer.num_rounds=1", "split.head_layers={0: 0, 1: 2}"
    loop, sent = recorded(*how)
    assert {message.head_layers for message in sent if isinstance(message, OpenSlot | Serve)} == {2}
    loop, sent = recorded(*how[:2], "split.head_layers=[2,0,1]")
    sizes = {name: tensor.nbytes for name, tensor in loop.population.initial.tensors().items()}
    for client, depth in enumerate([2, 0, 1]):
        opened = [message for message in sent if isinstance(message, OpenSlot) and message.client == client]
        layers = {int(name.partition("layers.")[2].partition(".")[0]) for m in opened for name in m.adapter}
        assert (len(opened), layers) == (1, set(range(depth, 3)))
        at_server = sum(size for name, size in sizes.items() if name in opened[0].adapter)
        own = loop.exchange.ledger.total(client=client, kind="adapter", phase="train")
        assert own == 2 * (sum(sizes.values()) - at_server), "up and down"


def test_a_client_stores_what_it_would_if_all_had_its_head(tiny_overrides: list[str]) -> None:
    def built(heads: object) -> tuple[DictConfig, Recommender]:
        how = "backbone.num_layers=4", "adapter=lora", "split.transport=inprocess", f"split.head_layers={heads}"
        config = compose([*tiny_overrides, *how])
        return config, build_recommender(config, build_data(config))

    found = heads_of(*built([2, 0, 1]))
    alone = {depth: storage_of(*built(depth)) for depth in (0, 1, 2)}
    assert [(head.num_layers, head.stored_bytes) for head in found] == [(d, alone[d].client_bytes) for d in (2, 0, 1)]
    assert heads_of(*built(1)) == []
    together = storage_of(*built([2, 0, 1]))
    assert (together.client_bytes, together.server_bytes) == (alone[2].client_bytes, alone[0].server_bytes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split.head_layers=[1,2,1]"], "needs split.transport=inprocess, not none"),
        (["split.head_layers=[1,2]", "split.transport=inprocess"], "has 2 values, and there are 3 clients"),
        (["split.head_layers={5: 1}", "split.transport=inprocess"], "numbers by size such as {0: 1, 500: 4}"),
        (
            ["split.head_layers={0: 0, 9: 1}", "split.transport=inprocess", "adapter=lora", "adapter.layers=body+tail"],
            "trains only one of head and body",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(tiny_overrides: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_federation(tiny_overrides, *overrides)


@pytest.mark.parametrize(("packing", "atol"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_packed_hidden_states_cost_little_and_save_bytes(tiny_overrides: list[str], packing: str, atol: float) -> None:
    """Bytes by arithmetic: bfloat16 halves 4 bytes a number; int8 is 1 byte, and 4 bytes of scale a token of 16."""
    how = ("split.transport=inprocess",)
    loops = [new_loop(tiny_overrides, *how, *more) for more in ([], packed_as(packing))]
    figures = [loop.run().evaluation.summary["ndcg_at_10/pooled"] for loop in loops]
    plain, packed = loops
    share = 0.5 if packing == "bfloat16" else (16 + 4) / 64
    for kind in ("hidden_state", "gradient"):
        num_bytes = plain.exchange.ledger.total(kind=kind, phase="train")
        assert packed.exchange.ledger.total(kind=kind, phase="train") == share * num_bytes
    assert figures[0] == pytest.approx(figures[1], abs=atol)
    assert any(not torch.equal(adapters(plain)[name], tensor) for name, tensor in adapters(packed).items())


def packed_as(packing: str) -> list[str]:
    return [f"split.hidden_dtype={packing}", f"split.gradient_dtype={packing}"]


class Recording(InProcess):
    """Keeps all that the server is told."""

    def __init__(self, server: BodyServer) -> None:
        super().__init__(server)
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)
        super().send(message)


def tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Packed):
        return [value.codes, *([] if value.scale is None else [value.scale])]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in tensors_of(getattr(value, field.name))]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    return [t for item in value for t in tensors_of(item)] if isinstance(value, tuple) else []


@pytest.fixture
def recorded(tiny_overrides: list[str]) -> Callable[..., tuple[FederatedLoop, list[Message]]]:
    def build(*overrides: str) -> tuple[FederatedLoop, list[Message]]:
        loop = new_loop(tiny_overrides, "split.transport=inprocess", *overrides)
        recording = Recording(server_of(loop))
        link_of(loop).connect(recording, loop.exchange.ledger)
        loop.run()
        return loop, recording.sent

    return build


def first(messages: list[Message], kind: type[Message]) -> Tensor:
    """The first tensor that the server gets in messages of a kind."""
    found = next(message for message in messages if isinstance(message, kind))
    return tensors_of(found)[0]


def test_noise_has_its_standard_deviation_and_clipping_its_norm_where_they_are_asked_for(
    recorded: Callable[..., tuple[FederatedLoop, list[Message]]],
) -> None:
    """The start is evaluated first, so the first hidden states and, without noise in them, gradients are comparable."""
    _, plain = recorded("trainer.num_rounds=1")
    _, hidden = recorded("trainer.num_rounds=1", "split.hidden_noise=0.5")
    _, gradient = recorded("trainer.num_rounds=1", "split.gradient_clip=1e-3", "split.gradient_noise=0.25")
    noise = first(hidden, HiddenState) - first(plain, HiddenState)
    assert float(noise.std()) == pytest.approx(0.5, rel=4 / (2 * noise.numel()) ** 0.5)
    assert torch.equal(first(gradient, HiddenState), first(plain, HiddenState))
    exact = first(plain, Gradient)
    clipped = exact * (1e-3 / exact.norm(dim=-1, keepdim=True).clamp(min=1e-3))
    noise = first(gradient, Gradient) - clipped
    assert float(noise.std()) == pytest.approx(0.25, rel=4 / (2 * noise.numel()) ** 0.5)


@pytest.mark.parametrize("objective", ["retrieval", "generative"])
def test_nothing_private_reaches_the_server(
    recorded: Callable[..., tuple[FederatedLoop, list[Message]]], objective: str
) -> None:
    loop, sent = recorded(f"objective={objective}", "adapter=lora", "trainer.num_rounds=1")
    data = loop.executor.evaluator.datamodule.data  # type: ignore[attr-defined]
    embedding = module_of(loop).model.model.get_input_embeddings()
    integers = {
        type(message)
        for message in sent
        for t in tensors_of(message)
        if not t.is_floating_point() and t.dtype != torch.bool
    }
    # Token ids, labels and user ids are integers; positions in a batch are too, and the server refuses any other.
    assert integers <= ({SelectRows} if objective == "generative" else set())
    for message in sent:
        for tensor in tensors_of(message):
            assert tensor.shape[:1] != embedding.weight.shape[:1], "no table of embeddings, no logits"
    hidden = [m for m in sent if isinstance(m, HiddenState)]
    assert hidden
    raw = embedding.weight.detach()
    for message in hidden[:20]:
        for packed in message.hidden:
            rows = packed.codes.flatten(0, 1).float()
            assert float(torch.cdist(rows, raw).min()) > 0, "no token's own embedding: at least a layer is before it"
    text = repr([{f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name != "hidden"} for m in sent])
    assert not [title for title in data.catalogue.titles if title in text]
    assert not [user for user in data.users["user_id"].astype(str) if f"'{user}'" in text]


def test_the_server_object_holds_the_body_only(run: Run) -> None:
    loop = run("split.transport=inprocess", "adapter=lora", "trainer.num_rounds=1")
    server = server_of(loop)
    state = server.model.model.state_dict()
    assert state
    assert {name.split(".")[2] for name in state} == {"1", "2"}
    assert all(name.startswith("model.layers.") for name in state)
    clients = {name for name, _ in module_of(loop).model.model.named_parameters()}
    assert not clients & set(state)
    assert not hasattr(server, "datamodule")
    assert not server.jobs, "nothing of a client stays when its training is over"
    assert not server.served, "or its evaluation"


def test_the_server_is_sent_the_body_of_adapters_only(
    recorded: Callable[..., tuple[FederatedLoop, list[Message]]],
) -> None:
    """Once for a client's training, with its optimiser state, and once for its evaluation."""
    loop, sent = recorded("aggregation=fellrec")
    begun = [message for message in sent if isinstance(message, OpenSlot)]
    assert [(m.round_index, m.client) for m in begun] == [(r, c) for r in range(2) for c in range(3)]
    part_of = module_of(loop).model.part_of
    for message in (m for m in sent if isinstance(m, OpenSlot | Serve)):
        assert {part_of(name) for name in message.adapter} == {"body"}
    for message in begun:
        assert {key.partition("|")[0] for key in message.optimizer} == (
            set(message.adapter) if message.round_index else set()
        )


def test_client_adapters_go_up_once_a_round_and_only_if_the_rule_mixes(run: Run) -> None:
    """Of head and tail only: the body's adapters are with the server."""
    how = "split.transport=inprocess", "trainer.num_rounds=2"
    loop = run(*how, "aggregation=fellrec")
    part_of, kinds = module_of(loop).model.part_of, loop.population.bank.kinds
    own = sum(kind.itemsize * shape.numel() for name, (kind, shape) in kinds.items() if part_of(name) != "body")
    ledger = loop.exchange.ledger
    for direction in ("up", "down"):
        for client, round_index in ((client, round_index) for client in range(3) for round_index in range(2)):
            where = {"client": client, "round": round_index, "direction": direction, "kind": "adapter"}
            assert (ledger.num_messages(**where), ledger.total(**where)) == (1, own)
    assert ledger.total(kind="adapter") == 2 * 3 * 2 * own
    assert run(*how, "aggregation=local").exchange.ledger.total(kind="adapter") == 0


def test_the_ledger_is_the_closed_form(tiny_overrides: list[str]) -> None:
    """METHOD §4: 4 crossings × tokens × hidden size × 4 bytes a micro-batch, adapters up and down, scalars.

    Tokens are counted from the very batches, from another data module than the run's.
    """
    loop = new_loop(tiny_overrides, "split.transport=inprocess", "trainer.num_rounds=2", "trainer.local_epochs=2")
    result = loop.run()
    from fellrec.functional.rng import derive_seed

    ledger, hidden_size, epochs = loop.exchange.ledger, 16, 2
    module, datamodule = module_of(loop), loop.executor.evaluator.datamodule  # type: ignore[attr-defined]
    body = {name for name in loop.population.bank.kinds if module.model.part_of(name) == "body"}
    own = sum(tensor[0].nbytes for name, tensor in adapters(loop).items() if name not in body)
    for round_index in range(2):
        for client in range(3):
            tokens = steps = 0
            for epoch in range(epochs):
                seed = derive_seed(0, "order", round_index, client, epoch)
                for batch in datamodule.train_loader(client, seed):
                    tokens += sum(ids.numel() for ids in module.objective.inputs(batch))
                    steps += 1
            where = {"client": client, "round": round_index, "phase": "train"}
            for direction in ("up", "down"):
                for kind in ("hidden_state", "gradient"):
                    crossing = ledger.total(**where, direction=direction, kind=kind)
                    assert crossing == tokens * hidden_size * 4, (where, direction, kind)
                    assert ledger.num_messages(**where, direction=direction, kind=kind) == steps
                assert ledger.total(**where, direction=direction, kind="adapter") == own
            assert ledger.total(**where, direction="up", kind="scalar") == 8 * steps + 16
            assert ledger.total(**where, direction="down", kind="scalar") == 4 * len(body) * steps
    users = sum(len(batch["users"]) for batch in datamodule.eval_loader("val"))
    assert users == len(result.evaluation.client_of_user)
    evaluated = sum(
        module.objective._history_tokens(batch["histories"])[0].numel()  # type: ignore[attr-defined]
        for client in range(3)
        for batch in datamodule.eval_loader("val", (client,))
    )
    for direction in ("up", "down"):
        assert ledger.total(round=1, phase="val", direction=direction) == evaluated * hidden_size * 4


def test_the_whole_model_records_what_a_federation_would_send(run: Run) -> None:
    loop = run("aggregation=fedavg")
    num_bytes = sum(tensor[0].nbytes for tensor in adapters(loop).values())
    for direction in ("up", "down"):
        assert loop.exchange.ledger.total(round=1, direction=direction, kind="adapter") == 3 * num_bytes
    assert not run("aggregation=local").exchange.ledger.rows()


class Stopped(Exception):
    """Instead of a signal."""


class StopsBeforeRound(FederatedCallback):
    def __init__(self, round_index: int) -> None:
        self.round_index = round_index

    def on_round_start(self, round_index: int) -> None:
        if round_index == self.round_index:
            raise Stopped


RESUMED = ["adapter=lora", "trainer.num_rounds=3"]


@pytest.fixture(scope="module")
def uninterrupted(tiny_overrides: list[str]) -> FederatedLoop:
    loop = new_loop(tiny_overrides, *RESUMED, "split.transport=inprocess")
    loop.run()
    return loop


@pytest.mark.parametrize(
    ("before", "after"), [("inprocess", "inprocess"), ("none", "inprocess"), ("inprocess", "none")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_overrides: list[str], uninterrupted: FederatedLoop, tmp_path: Path, before: str, after: str
) -> None:
    """Also with the cut executed before the stop only, or after it only: the state of a run is the same in both."""
    whole = uninterrupted
    first = new_federation(tiny_overrides, *RESUMED, f"split.transport={before}")
    checkpoint = Checkpoint(tmp_path, first.persisted, first.population)
    with pytest.raises(Stopped):
        first.loop([checkpoint, StopsBeforeRound(2)]).run()
    second = new_federation(tiny_overrides, *RESUMED, f"split.transport={after}")
    assert Checkpoint(tmp_path, second.persisted, second.population).resume() == 2
    loop = second.loop()
    loop.run()
    assert_same(adapters(whole), adapters(loop))
    assert_same(selected(whole), selected(loop))
    assert_same(optimizer_states(whole), optimizer_states(loop))


class Poison(FederatedCallback):
    """Client 1's loss becomes NaN in round 1."""

    def __init__(self) -> None:
        self.is_poisoned = False

    def on_client_start(self, job: Job) -> None:
        self.is_poisoned = (job.row, job.round_index) == (1, 1)

    def on(self, loop: FederatedLoop, monkeypatch: pytest.MonkeyPatch) -> FederatedLoop:
        objective = module_of(loop).objective
        loss = objective.loss

        def poisoned(model, batch):  # type: ignore[no-untyped-def]
            total, count = loss(model, batch)
            return (total * float("nan") if self.is_poisoned else total), count

        monkeypatch.setattr(objective, "loss", poisoned)
        return loop


@pytest.mark.parametrize("transport", ["none", "inprocess"])
def test_a_client_that_fails_is_skipped_or_stops_the_run(
    tiny_overrides: list[str], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = [f"split.transport={transport}", "adapter=lora", "aggregation=fedavg"]

    def poisoned_loop(*more: str) -> FederatedLoop:
        poison = Poison()
        return poison.on(new_loop(tiny_overrides, *how, *more, callbacks=(poison,)), monkeypatch)

    with pytest.raises(TrainingError, match="client 1 became nan in round 1, local step 0"):
        poisoned_loop().run()
    skipping = poisoned_loop("participation.on_failure=skip")
    skipping.validate(-1)
    skipping.run_round(0)
    before = {name: tensor.clone() for name, tensor in adapters(skipping).items()}
    record = skipping.run_round(1)
    after = adapters(skipping)
    assert [outcome.row for outcome in record.failed] == [1]
    assert any(not torch.equal(after[name][0], before[name][0]) for name in after)
    assert all(torch.equal(after[name][0], after[name][2]) for name in after), "FedAvg of the other two"
    assert all(torch.equal(after[name][0], after[name][1]) for name in after), "the server's model, for the next round"
    assert skipping.progress.failed_clients == {"1": [1]}
    if transport == "inprocess":
        assert not server_of(skipping).jobs, "the server has dropped the failed client's training"
    few = poisoned_loop("participation.on_failure=skip", "participation.quorum=0.9")
    with pytest.raises(TrainingError, match=r"only 2 of 3 clients finished round 1, participation.quorum=0.9 needs 3"):
        few.run()
