"""Whole runs through the executed cut: the same bits as one model, private things that never cross, a ledger that adds up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.cut.link import InProcess
from fellrec.cut.messages import Download, HiddenState, Message, SelectRows, Upload
from fellrec.cut.server import BodyServer
from fellrec.errors import TrainingError
from fellrec.experiment import build_data, build_loop, build_recommender
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.executor import SplitExecution
from fellrec.federated.loop import FederatedLoop
from fellrec.functional.packing import Packed
from fellrec.types import Evaluation

Run = Callable[..., FederatedLoop]


@pytest.fixture
def run(tiny_overrides: list[str]) -> Run:
    """Train three rounds with four layers; gives the loop."""

    def build(*overrides: str, callbacks: tuple[FederatedCallback, ...] = ()) -> FederatedLoop:
        loop = new_loop(tiny_overrides, *overrides, callbacks=callbacks)
        loop.run()
        return loop

    return build


def new_loop(
    tiny_overrides: list[str], *overrides: str, callbacks: tuple[FederatedCallback, ...] = ()
) -> FederatedLoop:
    config = compose([*tiny_overrides, "backbone.num_layers=4", "trainer.num_rounds=3", *overrides])
    return build_loop(config, build_recommender(config, build_data(config)), callbacks)


def server_of(loop: FederatedLoop) -> BodyServer:
    assert isinstance(loop.execution, SplitExecution)
    assert isinstance(loop.execution.link.transport, InProcess)
    return loop.execution.link.transport.server


def adapters(loop: FederatedLoop, bank: str = "current") -> dict[str, Tensor]:
    """Of the whole model, wherever its parts are."""
    own = dict(loop.state.bank_named(bank).tensors)
    return own | (server_of(loop).state.bank_named(bank).tensors if isinstance(loop.execution, SplitExecution) else {})


def moments(loop: FederatedLoop) -> dict[str, Tensor]:
    """AdamW's first moments by client and name."""
    states = [loop.state]
    if isinstance(loop.execution, SplitExecution):
        states.append(server_of(loop).state)
    return {
        f"{client} {name}": values["exp_avg"]
        for state in states
        for client in state.optimizers
        for name, values in state.optimizer_of(client).items()
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


class Values(FederatedCallback):
    """Losses of all clients and rounds, and all validation figures."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float, int]] = []
        self.figures: list[dict[str, float]] = []

    def on_client_end(self, loop, update) -> None:  # type: ignore[no-untyped-def]
        self.losses.append((update.client, update.loss, update.num_steps))

    def on_evaluate_end(self, loop, evaluation: Evaluation) -> None:  # type: ignore[no-untyped-def]
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
        "split.head_layers=0 split.tail_layers=2 participation.rate=0.5 trainer.reset_optimizer=true",
        "adapter=lora adapter.layers=body+tail",
        "adapter.layers=tail",
        "adapter.layers=head adapter=lora split.in_flight=3",
        "objective=generative adapter=lora trainer.num_rounds=1",
        "objective=generative adapter=lora ranker=grounding ranker.num_beams=2 ranker.max_new_tokens=5 "
        "trainer.num_rounds=1 trainer.learning_rate=0.05",
        "objective=generative adapter=lora ranker=constrained ranker.num_beams=3 trainer.num_rounds=1",
    ],
)
def test_a_run_through_the_cut_has_the_same_bits(run: Run, overrides: str) -> None:
    """Losses, adapters, optimiser moments, selection, and every figure of every evaluation."""
    seen = Values(), Values()
    whole = run(*overrides.split(), callbacks=(seen[0],))
    cut = run(*overrides.split(), "split.transport=inprocess", callbacks=(seen[1],))
    assert sorted(seen[0].losses) == sorted(seen[1].losses)
    assert seen[0].figures == seen[1].figures
    for bank in ("current", "best", "best_per_client"):
        assert_same(adapters(whole, bank), adapters(cut, bank))
    assert_same(moments(whole), moments(cut))
    assert moments(whole)
    assert whole.state.selection.client_rounds == cut.state.selection.client_rounds
    assert any(not torch.equal(a, b) for a, b in zip(adapters(cut).values(), adapters(cut, "initial").values()))


def test_bf16_stays_within_its_resolution(run: Run) -> None:
    """Autocast computes the same on both sides; hidden states travel as they are, so not even rounding differs."""
    whole = run("trainer.precision=bf16-mixed", "adapter=lora")
    cut = run("trainer.precision=bf16-mixed", "adapter=lora", "split.transport=inprocess")
    expected, found = adapters(whole), adapters(cut)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-5)


def test_how_many_clients_are_under_way_changes_nothing(run: Run) -> None:
    runs = [run("adapter=lora", "split.transport=inprocess", f"split.in_flight={number}") for number in (1, 2, 3)]
    for other in runs[1:]:
        assert_same(adapters(runs[0]), adapters(other))
        assert runs[0].execution.ledger.rows() == other.execution.ledger.rows()


@pytest.mark.parametrize("depth", [(0, 1), (2, 1), (1, 2)])
def test_where_the_cuts_are_changes_nothing(run: Run, depth: tuple[int, int]) -> None:
    """Dropout belongs to layers, not to parts: any two cuts give the same run."""
    where = [f"split.head_layers={depth[0]}", f"split.tail_layers={depth[1]}", "split.transport=inprocess"]
    assert_same(adapters(run("adapter=lora")), adapters(run("adapter=lora", *where)))


@pytest.mark.parametrize(("packing", "atol"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_packed_hidden_states_cost_little_and_save_bytes(run: Run, packing: str, atol: float) -> None:
    """Bytes by arithmetic: bfloat16 halves 4 bytes a number; int8 is 1 byte, and 4 bytes of scale a token of 16."""
    plain = run("split.transport=inprocess")
    packed = run("split.transport=inprocess", f"split.hidden_dtype={packing}", f"split.gradient_dtype={packing}")
    share = 0.5 if packing == "bfloat16" else (16 + 4) / 64
    for kind in ("hidden_state", "gradient"):
        num_bytes = plain.execution.ledger.total(kind=kind, phase="train")
        assert packed.execution.ledger.total(kind=kind, phase="train") == share * num_bytes
    figures = [loop.test_evaluation.summary["ndcg_at_10/pooled"] for loop in (plain, packed)]  # type: ignore[union-attr]
    assert figures[0] == pytest.approx(figures[1], abs=atol)
    assert any(not torch.equal(adapters(plain)[name], tensor) for name, tensor in adapters(packed).items())


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
        loop = new_loop(tiny_overrides, "split.transport=inprocess", "trainer.num_rounds=2", *overrides)
        assert isinstance(loop.execution, SplitExecution)
        recording = loop.execution.link.transport = Recording(server_of(loop))
        loop.run()
        return loop, recording.sent

    return build


@pytest.mark.parametrize("objective", ["retrieval", "generative"])
def test_nothing_private_reaches_the_server(
    recorded: Callable[..., tuple[FederatedLoop, list[Message]]], objective: str
) -> None:
    loop, sent = recorded(f"objective={objective}", "adapter=lora", "trainer.num_rounds=1")
    data, embedding = loop.datamodule.data, loop.module.model.model.get_input_embeddings()
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
    clients = {name for name, _ in loop.module.model.model.named_parameters()}
    assert not clients & set(state)
    assert not hasattr(server, "datamodule")


def test_client_adapters_go_up_once_a_round_and_only_if_the_rule_mixes(
    recorded: Callable[..., tuple[FederatedLoop, list[Message]]],
) -> None:
    loop, sent = recorded("aggregation=fellrec")
    uploads = [(m.round_index, m.client) for m in sent if isinstance(m, Upload)]
    assert uploads == [(-1, 0)] + [(r, c) for r in range(2) for c in range(3)]
    for message in (m for m in sent if isinstance(m, Upload)):
        assert {loop.module.model.part_of(name) for name in message.adapter} == {"head", "tail"}
    _, sent = recorded("aggregation=local")
    assert not [m for m in sent if isinstance(m, (Upload, Download))]


def test_the_ledger_is_the_closed_form(tiny_overrides: list[str]) -> None:
    """METHOD §4: 4 crossings × tokens × hidden size × 4 bytes a micro-batch, adapters up and down, scalars.

    Tokens are counted from the very batches, from another data module than the run's.
    """
    loop = new_loop(tiny_overrides, "split.transport=inprocess", "trainer.num_rounds=2", "trainer.local_epochs=2")
    loop.run()
    from fellrec.functional.rng import derive_seed

    ledger, hidden_size, epochs = loop.execution.ledger, 16, 2
    assert isinstance(loop.execution, SplitExecution)
    own = sum(tensor[0].nbytes for tensor in loop.state.bank.tensors.values())
    body_names = loop.execution.trainer.settings.body_names
    for round_index in range(2):
        for client in range(3):
            tokens = steps = 0
            for epoch in range(epochs):
                seed = derive_seed(0, "order", round_index, client, epoch)
                for batch in loop.datamodule.train_loader(client, seed):
                    tokens, steps = tokens + batch["input_ids"].numel(), steps + 1
            where = {"client": client, "round": round_index, "phase": "train"}
            for direction in ("up", "down"):
                for kind in ("hidden_state", "gradient"):
                    crossing = ledger.total(**where, direction=direction, kind=kind)
                    assert crossing == tokens * hidden_size * 4, (where, direction, kind)
                    assert ledger.num_messages(**where, direction=direction, kind=kind) == steps
                assert ledger.total(**where, direction=direction, kind="adapter") == own
            assert ledger.total(**where, direction="up", kind="scalar") == 8 * steps + 16
            assert ledger.total(**where, direction="down", kind="scalar") == 4 * len(body_names) * steps
    assert ledger.total(round=-1, kind="adapter") == own, "the shared start, once"
    users = sum(len(batch["users"]) for batch in loop.datamodule.eval_loader("val"))
    assert users == len(loop.test_evaluation.client_of_user)  # type: ignore[union-attr]
    evaluated = sum(
        loop.module.objective._history_tokens(batch["histories"])[0].numel()  # type: ignore[attr-defined]
        for client in range(3)
        for batch in loop.datamodule.eval_loader("val", (client,))
    )
    for direction in ("up", "down"):
        assert ledger.total(round=1, phase="val", direction=direction) == evaluated * hidden_size * 4


def test_the_whole_model_books_what_a_federation_would_send(run: Run) -> None:
    loop = run("aggregation=fedavg")
    num_bytes = sum(tensor[0].nbytes for tensor in loop.state.bank.tensors.values())
    for direction in ("up", "down"):
        assert loop.execution.ledger.total(round=1, direction=direction, kind="adapter") == 3 * num_bytes
    assert not run("aggregation=local").execution.ledger.rows()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_the_head_is_computed_once_where_it_is_frozen(run: Run, kind: str) -> None:
    frozen = ["adapter=lora", "adapter.layers=body+tail", "split.transport=inprocess", "trainer.local_epochs=2"]
    without = run(*frozen, "split.head_cache=none")
    cached = run(*frozen, f"split.head_cache={kind}")
    assert_same(adapters(without), adapters(cached))
    assert without.test_evaluation.summary == cached.test_evaluation.summary  # type: ignore[union-attr]
    assert isinstance(cached.execution, SplitExecution)
    cache = cached.execution.trainer.head_cache
    assert cache is not None
    rows = sum(len(cached.datamodule._rows(client)) for client in range(3))
    assert cache.misses == rows, "once"
    assert cache.hits == rows * (2 * 3 - 1), "in all other epochs and rounds it is there"
    assert (kind == "disk") == (cache.file is not None and cache.file.is_file())


def test_a_full_head_cache_computes_the_rest_anew(run: Run) -> None:
    frozen = ["adapter=lora", "adapter.layers=body+tail", "split.transport=inprocess"]
    without = run(*frozen, "split.head_cache=none")
    cached = run(*frozen, "split.head_cache_bytes=20000")
    assert isinstance(cached.execution, SplitExecution)
    cache = cached.execution.trainer.head_cache
    assert cache is not None
    assert 0 < cache.used_bytes <= 20000
    assert cache.hits > 0
    assert cache.misses > sum(len(cached.datamodule._rows(client)) for client in range(3))
    assert_same(adapters(without), adapters(cached))


def test_a_trained_head_is_not_cached(run: Run) -> None:
    loop = run("split.transport=inprocess", "trainer.num_rounds=1")
    assert isinstance(loop.execution, SplitExecution)
    assert loop.execution.trainer.head_cache is None


def test_a_resumed_run_through_the_cut_equals_an_uninterrupted_one(tiny_overrides: list[str], tmp_path: Path) -> None:
    how = ["split.transport=inprocess", "adapter=lora", "trainer.num_rounds=4"]
    whole = new_loop(tiny_overrides, *how)
    whole.run()
    first = new_loop(tiny_overrides, *how, callbacks=(Checkpoint(tmp_path),))
    first.validate(-1)
    first.execution.start(first)
    for round_index in range(2):
        first.run_round(round_index)
    second = new_loop(tiny_overrides, *how)
    second.execution.load(second, tmp_path)
    assert second.state.round_index == 2
    second.run()
    for bank in ("current", "best"):
        assert_same(adapters(whole, bank), adapters(second, bank))
    assert_same(moments(whole), moments(second))


def test_a_checkpoint_without_the_servers_share_is_no_checkpoint(tiny_overrides: list[str], tmp_path: Path) -> None:
    import shutil

    how = ["split.transport=inprocess", "adapter=lora"]
    first = new_loop(tiny_overrides, *how, callbacks=(Checkpoint(tmp_path),))
    first.run()
    second = new_loop(tiny_overrides, *how)
    (tmp_path / "checkpoints-server" / "round_00003.json").unlink()
    second.execution.load(second, tmp_path)
    assert second.state.round_index == 2, "the newest that both have"
    shutil.rmtree(tmp_path / "checkpoints-server")
    with pytest.raises(TrainingError, match="no checkpoint of both clients and server"):
        second.execution.load(second, tmp_path)


def poison(loop: FederatedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 1's loss becomes NaN in round 1."""
    loss_of, model = loop.module.objective.loss_of, loop.module.model

    def poisoned(model_, hidden, batch):  # type: ignore[no-untyped-def]
        total, count = loss_of(model_, hidden, batch)
        rows = set(batch["row_ids"].tolist())
        is_client_1 = rows <= set((loop.datamodule._rows(1).first_id + torch.arange(10_000)).tolist()) and not (
            rows & set((loop.datamodule._rows(2).first_id + torch.arange(10_000)).tolist())
        )
        return (total * float("nan") if is_client_1 and loop.state.round_index == 1 else total), count

    for client in range(3):
        loop.datamodule._rows(client)  # in this order, so that clients have ascending numbers of rows
    monkeypatch.setattr(loop.module.objective, "loss_of", poisoned)
    assert model is loop.module.model


@pytest.mark.parametrize("transport", ["none", "inprocess"])
def test_a_client_that_fails_is_skipped_or_stops_the_run(
    tiny_overrides: list[str], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = [f"split.transport={transport}", "adapter=lora", "aggregation=fedavg"]
    loop = new_loop(tiny_overrides, *how)
    poison(loop, monkeypatch)
    with pytest.raises(TrainingError, match="client 1 became nan in round 1, local step 0"):
        loop.run()
    skipping = new_loop(tiny_overrides, *how, "participation.on_failure=skip")
    poison(skipping, monkeypatch)
    skipping.validate(-1)
    skipping.execution.start(skipping)
    skipping.run_round(0)
    before = {name: tensor.clone() for name, tensor in adapters(skipping).items()}
    skipping.run_round(1)
    after = adapters(skipping)
    assert all(torch.equal(after[name][1], before[name][1]) for name in after), "as it was"
    assert any(not torch.equal(after[name][0], before[name][0]) for name in after)
    assert all(torch.equal(after[name][0], after[name][2]) for name in after), "FedAvg of the other two"
    assert skipping.state.extras["dropped_clients"] == {"1": [1]}
    few = new_loop(tiny_overrides, *how, "participation.on_failure=skip", "participation.quorum=0.9")
    poison(few, monkeypatch)
    with pytest.raises(TrainingError, match=r"only 2 of 3 clients finished round 1, participation.quorum=0.9 needs 3"):
        few.run()
