"""The executed cut equals the whole model for every architecture: forward, every gradient, and generation with a cache.

The server has only its partial model. The reference is the whole Transformers model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import cut_in_two, open_slot
from small_models import CONFIGS, masks
from transformers import AutoModelForCausalLM

from fellrec.cut.messages import ChangeBase, CloseSlot, Gradient, HiddenState, Serve, SlotClosed, Step, StopServing
from fellrec.distributed.message import Stop
from fellrec.errors import BackboneError, SplitError
from fellrec.functional.packing import Packed, pack
from fellrec.models.partial import load_partial
from fellrec.models.split import SplitModel

CUTS = [(2, 1), (0, 2), (1, 0), (0, 0)]


def whole_model(name: str, without_dropout: bool = False) -> Any:
    torch.manual_seed(0)
    values = CONFIGS[name].to_dict()
    off = dict.fromkeys([key for key in values if "drop" in key], 0.0) if without_dropout else {}
    return AutoModelForCausalLM.from_config(CONFIGS[name].__class__(**{**values, **off})).eval()


@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_exact(name: str, mask: str) -> None:
    model, ids, attention_mask = whole_model(name), torch.randint(3, 97, (3, 9)), masks()[mask]
    expected = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    for head, tail in CUTS:
        client, link, _ = cut_in_two(model, head, tail)
        with torch.no_grad(), link.on_behalf_of(0, 0, "val"):
            logits = client.lm_head(client(ids, attention_mask))
        assert torch.equal(logits, expected), (head, tail)
        assert link.ledger.total(direction="down") == 3 * 9 * 32 * 4


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_that_of_transformers_in_every_part(name: str) -> None:
    """The bits of a model that Transformers made with explicit attention, in the whole model and through the cut."""
    model, ids = whole_model(name), torch.randint(3, 97, (3, 9))
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    expected_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected = expected_model(input_ids=ids, use_cache=False).logits
    whole = SplitModel(model, 2, 1)
    assert whole.attention == ("eager" if name == "gemma2" else "sdpa")  # gemma2 caps the logits of attention
    whole.use_attention("eager")
    assert whole.attention == "eager"
    assert torch.equal(whole.lm_head(whole(ids)), expected)
    client, link, server = cut_in_two(whole_model(name), 2, 1)
    for part in (client, server.model):
        part.use_attention("eager")
    with torch.no_grad(), link.on_behalf_of(0, 0, "val"):
        assert torch.equal(client.lm_head(client(ids)), expected)
    whole.use_attention("sdpa")
    assert torch.equal(whole.lm_head(whole(ids)), whole_model(name)(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_is_exact(name: str) -> None:
    """The client computes those of head and tail, the server those of the body from ∂L/∂h, and their norms."""
    model, ids = whole_model(name, without_dropout=True).train(), torch.randint(3, 97, (3, 9))
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    client, link, server = cut_in_two(model, 2, 1)
    client.model.zero_grad()
    open_slot(link, server, 1)
    link.wants_norms = True
    with link.on_behalf_of(1, 0, "train"):
        (hidden_BLD,) = client.train().encode([ids])
        client.lm_head(hidden_BLD).square().sum().backward()
    found = {key: parameter.grad for key, parameter in client.model.named_parameters()}
    body = {key: tensor.grad for key, tensor in server.jobs[1].slot.parameters.items()}
    assert (found | body).keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.equal((found | body)[key], gradient), key
    assert link.norms == {key: float(gradient.norm()) for key, gradient in body.items()}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_on_both_sides_is_exact(name: str, beams: int) -> None:
    model, ids, mask = whole_model(name), torch.randint(3, 97, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0
    how = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **how)
    for head, tail in CUTS:
        client, link, server = cut_in_two(model, head, tail)
        with link.on_behalf_of(1, 0, "test"):
            cache = client.new_cache()
            written = client.model.generate(input_ids=ids, **client.cache_argument(cache), **how)
            assert server.caches
            client.drop_cache(cache)
        assert torch.equal(written, expected), (head, tail)
        assert not server.caches, "the server frees its caches"
        rows, new = 3 * beams, expected.shape[1] - 6
        masks_bytes = sum(rows * (6 + step) for step in range(new))
        hidden_bytes = rows * 32 * 4 * (6 + new - 1)
        assert link.ledger.total(direction="up", kind="hidden_state") == hidden_bytes + masks_bytes
        assert link.ledger.total(direction="down") == hidden_bytes, "once over the prompt, then one token at a time"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copied_cache_grows_on_its_own(name: str) -> None:
    model, ids = whole_model(name), torch.randint(3, 97, (2, 5))
    client, link, _ = cut_in_two(model, 1, 1)
    more = torch.randint(3, 97, (4, 3))
    whole = model(torch.cat([ids.repeat_interleave(2, dim=0), more], dim=1), use_cache=False).logits[:, 5:]
    with torch.no_grad(), link.on_behalf_of(0, 0, "val"):
        cache = client.new_cache()
        client.model(ids, attention_mask=torch.ones_like(ids), **client.cache_argument(cache), use_cache=True)
        for _ in range(2):
            twin = client.copy_cache(cache)
            twin.batch_repeat_interleave(2)
            mask = torch.ones(4, 8, dtype=torch.long)
            logits = client.model(more, attention_mask=mask, **client.cache_argument(twin), use_cache=True).logits
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_partial_model_reads_only_its_own_tensors(name: str, tmp_path: Path) -> None:
    model = whole_model(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(3, 97, (3, 9))
    expected = model(input_ids=ids, use_cache=False).logits
    client_lm, server_lm = (load_partial(tmp_path, side, 2, 1, torch.float32) for side in ("client", "server"))
    clients, servers = ({key for key, _ in lm.named_parameters()} for lm in (client_lm, server_lm))
    assert not clients & servers
    assert clients | servers == {key for key, _ in model.named_parameters()}
    layers = f"{SplitModel(server_lm, 2, 1).arch.inner}.{SplitModel(server_lm, 2, 1).arch.layers}."
    assert {key.removeprefix(layers).split(".")[0] for key in server_lm.state_dict()} <= {
        "2",
        "3",
        layers.split(".", maxsplit=1)[0],
    }
    assert all(key.startswith((f"{layers}2.", f"{layers}3.")) for key in servers)
    whole = dict(model.named_parameters())
    for key, parameter in (*client_lm.named_parameters(), *server_lm.named_parameters()):
        assert torch.equal(parameter, whole[key]), key
    server = SplitModel(server_lm, 2, 1)

    class Body:
        def run_body(self, hidden: Any, mask: Any, positions: str, cache: Any) -> Any:
            return server.serve_body(hidden, mask, positions, cache)

    client = SplitModel(client_lm, 2, 1, Body())  # type: ignore[arg-type]
    assert torch.equal(client.lm_head(client(ids)), expected)


def test_incomplete_files_of_a_partial_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith("model.layers.2.")}
    save_file(tensors, path, metadata={"format": "pt"})
    load_partial(tmp_path, "client", 2, 1, torch.float32)
    with pytest.raises(BackboneError, match=r"\d+ tensors of the partial model are missing .* \(model.layers.2"):
        load_partial(tmp_path, "server", 2, 1, torch.float32)


def test_a_split_that_leaves_the_server_nothing_is_refused() -> None:
    with pytest.raises(BackboneError, match="split.head_layers=3 and split.tail_layers=2 leave the server nothing"):
        cut_in_two(whole_model("llama"), 3, 2)


def packed(*shape: int) -> tuple[Packed]:
    return (pack(torch.zeros(shape), "float32"),)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            HiddenState(0, 4, "val", 1, packed(2, 3, 31)),
            "client 0 in round 4: its hidden size is 31, the body's is 32",
        ),
        (HiddenState(1, 4, "train", 1, packed(2, 3, 32), training=True), "round 4: the client is not being trained"),
        (HiddenState(9, 4, "train", 1, packed(2, 3, 32)), "client 9 in round 4: there are 2 clients"),
        (
            Gradient(0, 4, "train", 7, packed(2, 3, 32)),
            "client 0 in round 4: it belongs to forward pass 7, which is unknown",
        ),
        (Step(1, 4, "train", 1.0, 1e-3), "client 1 in round 4: the client is not being trained"),
        (CloseSlot(1, 4, "train"), "client 1 in round 4: the client is not being trained"),
        (ChangeBase(1, {}), "change 1 of the base comes before change 0"),
        (Stop(), "unexpected message Stop"),
    ],
)
def test_messages_that_do_not_fit_are_refused(message: Any, problem: str) -> None:
    _, link, _ = cut_in_two(whole_model("llama"), 2, 1)
    with pytest.raises(SplitError, match=problem):
        link.send(message)


def test_a_gradient_of_another_shape_is_refused() -> None:
    _, link, server = cut_in_two(whole_model("llama"), 2, 1)
    open_slot(link, server, 0, 4)
    link.send(HiddenState(0, 4, "train", 1, packed(2, 3, 32), training=True, keeps_graph=True))
    with pytest.raises(SplitError, match=r"its shapes \[\[2, 4, 32\]\] are not those of the forward pass"):
        link.send(Gradient(0, 4, "train", 1, packed(2, 4, 32)))


def test_rows_of_a_cache_are_positions_in_its_batch_and_nothing_else() -> None:
    client, link, _ = cut_in_two(whole_model("llama"), 2, 1)
    with torch.no_grad(), link.on_behalf_of(0, 0, "test"):
        cache = client.new_cache()
        client.model(torch.randint(3, 97, (3, 5)), **client.cache_argument(cache), use_cache=True)
        link.select_rows(cache.number, cache.number, torch.tensor([2, 0]))
        for ids in ([2, 0], [-1, 0], [96, 0]):
            with pytest.raises(SplitError, match="client 0 in round 0: its rows are not positions in a batch of 2"):
                link.select_rows(cache.number, cache.number, torch.tensor(ids))


def test_the_server_returns_what_a_client_trained_and_keeps_nothing() -> None:
    """A step of size 0 with the gradient of a constant: AdamW changes no weight, and its moments are zero."""
    _, link, server = cut_in_two(whole_model("llama"), 2, 1)
    open_slot(link, server, 1, 4)
    sent = {name: tensor.detach().clone() for name, tensor in server.trainable.items()}
    link.send(HiddenState(1, 4, "train", 1, packed(2, 3, 32), training=True, keeps_graph=True))
    link.send(Gradient(1, 4, "train", 1, packed(2, 3, 32)))
    link.send(Step(1, 4, "train", 1.0, 0.0))
    for _ in range(2):
        link.transport.receive()
    closed = link.request(CloseSlot(1, 4, "train"))
    assert isinstance(closed, SlotClosed)
    assert closed.adapter.keys() == sent.keys()
    assert all(torch.equal(closed.adapter[name], tensor) for name, tensor in sent.items())
    assert {key.partition("|")[0] for key in closed.optimizer} == set(sent)
    assert all(not closed.optimizer[f"{name}|exp_avg"].any() for name in sent)
    assert not server.jobs


def test_a_client_that_failed_leaves_nothing_on_the_server() -> None:
    _, link, server = cut_in_two(whole_model("llama"), 2, 1)
    open_slot(link, server, 1)
    link.send(CloseSlot(1, 0, "train", keep=False))
    assert not server.jobs
    with pytest.raises(SplitError, match="the client is not being trained"):
        link.send(Step(1, 0, "train", 1.0, 1e-3))


def test_an_adapter_is_served_until_the_last_evaluation_with_it_is_over() -> None:
    """Two client processes may evaluate parts of one client's users at the same time."""
    _, link, server = cut_in_two(whole_model("llama"), 2, 1)
    link.send(Serve(0, 0, "val", dict(server.trainable), head_layers=2))
    link.send(StopServing(0, 0, "val"))
    link.request(HiddenState(0, 0, "val", 1, packed(2, 3, 32)))
    link.send(StopServing(0, 0, "val"))
    assert 0 not in server.served
    with pytest.raises(SplitError, match="HiddenState of client 0 in round 0: no adapter was sent for the client"):
        link.send(HiddenState(0, 0, "val", 1, packed(2, 3, 32)))
    with pytest.raises(SplitError, match="StopServing of client 0 in round 0: the client is not being evaluated"):
        link.send(StopServing(0, 0, "val"))
