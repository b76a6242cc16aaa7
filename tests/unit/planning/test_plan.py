"""``fellrec plan``: counts compared with real models, activations with a real forward pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from fellrec.cli.main import main
from fellrec.cli.plan import plan
from fellrec.config.compose import compose
from fellrec.data.datamodule import FellrecDataModule
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_federation, build_loop
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.records import Trained
from fellrec.federated.settings import TrainerSettings
from fellrec.functional.cost import PartCost, fraction, total_cost
from fellrec.models.adapters import FullAdapter, LoraAdapter, adapter_bytes
from fellrec.models.architectures import ARCHITECTURES
from fellrec.models.split import SplitModel
from fellrec.planning.load import Load, count_load
from fellrec.planning.measure import bytes_of_parts, measure_parts, trace
from fellrec.planning.plan import Planner
from fellrec.planning.shape import find_config, model_configs, read_config
from fellrec.planning.table import print_plans
from fellrec.state.bank import AdapterBank
from fellrec.types import PUBLIC, Evaluation

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama_tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2_sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=4),
    "gemma3_text": Gemma3TextConfig(**SHAPE, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=5, n_head=4),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4
    ),
    "opt": OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=5, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "phi3": Phi3Config(**SHAPE),
}


class LanguageModelling:
    """Next-token prediction through the LM head."""

    one_target_per_row = True

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return [batch["input_ids"]]

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        logits = model.lm_head(hidden[0][:, :-1]).float().flatten(0, 1)
        return F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum"), len(logits)


OBJECTIVE, BATCH = LanguageModelling(), {"input_ids": torch.arange(3 * 16).reshape(3, 16)}
LONG = {"input_ids": (torch.arange(2 * 128) % 97).reshape(2, 128)}
"""Long enough to detect two L x L matrices per head."""


def built(config: object, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SplitModel:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return SplitModel(model, 2, 1)


def measured(
    config: object, adapter: object, dtype: torch.dtype = torch.float32, batch: dict[str, Tensor] = BATCH
) -> dict[str, PartCost]:
    return measure_parts(built(config, "meta", dtype), adapter, OBJECTIVE, batch)  # type: ignore[arg-type]


def test_every_architecture_is_covered() -> None:
    encoders = {name for name, arch in ARCHITECTURES.items() if not arch.is_causal}  # in test_plan_encoders.py
    assert set(ARCHITECTURES) == {config.model_type for config in CONFIGS.values()} | encoders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LoraAdapter, FullAdapter])
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_those_of_a_real_model(name: str, kind: type, dtype: torch.dtype) -> None:
    found = measured(CONFIGS[name], kind(), dtype)
    real = built(CONFIGS[name], dtype=dtype)
    assert {part: cost.weight_bytes for part, cost in found.items()} == bytes_of_parts(
        real, dict(real.model.named_parameters())
    )
    # Tied weights are saved once and Hugging Face counts its own memory.
    assert total_cost(found.values()).weight_bytes == real.model.get_memory_footprint(return_buffers=False)
    adapter = kind()
    adapter.attach(real.model, real.arch, 0, real.part_of)
    trainable = adapter.trainable(real.model)
    bank = AdapterBank.replicate(trainable, 1)
    assert total_cost(found.values()).adapter_bytes == adapter_bytes(trainable) == bank.adapter_bytes
    assert total_cost(found.values()).num_adapter_tensors == len(bank.kinds)
    assert all(cost.added_bytes == (cost.adapter_bytes if kind is LoraAdapter else 0) for cost in found.values())
    assert [cost.num_layers for cost in found.values()] == [2, 2, 1]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_activations_are_those_of_a_real_forward_pass(kind: str, dropout: float) -> None:
    """On the CPU the same forward pass runs, with the fused kernel that saves no L x L matrix."""
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 16})
    saved = {}
    for device in ("meta", "cpu"):
        model = built(config, device)
        adapter = LoraAdapter(dropout=dropout) if kind == "lora" else FullAdapter()
        adapter.attach(model.model, model.arch, 0, model.part_of)
        saved[device] = {part: found.saved_bytes for part, found in trace(model, OBJECTIVE, LONG).items()}  # type: ignore[arg-type]
    for part, num_bytes in saved["cpu"].items():
        assert math.isclose(saved["meta"][part], num_bytes, rel_tol=0.25), part


def test_a_real_pass_over_the_whole_model_saves_the_same_memory() -> None:
    """Independent of ``trace``: PyTorch's hooks around the forward pass of transformers."""
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})
    found = total_cost(measured(config, FullAdapter(), batch=LONG).values()).activation_bytes
    model = built(config).model
    weights, seen = {tensor.data_ptr() for tensor in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        logits = model(input_ids=LONG["input_ids"], use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.float().flatten(0, 1), LONG["input_ids"][:, 1:].flatten(), reduction="sum")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in seen}
    expected = sum(num_bytes for address, num_bytes in storages.items() if address not in weights)
    assert math.isclose(found, expected, rel_tol=0.25)


def test_compute_is_two_operations_per_weight_and_token() -> None:
    """Forward pass of a Llama: 2 · tokens · matrix weights, and 2 · 2 · B · L² · D per layer for attention."""
    config = LlamaConfig(**SHAPE)
    found = measured(config, FullAdapter())
    queries, keys = 4 * 8, 2 * 8
    layer = 2 * 32 * queries + 2 * 32 * keys + 3 * 32 * 48
    rows, length = BATCH["input_ids"].shape
    one = 2 * rows * length * layer + 4 * rows * length**2 * queries
    lm_head = 2 * rows * (length - 1) * 32 * 97
    assert [cost.forward_flops for cost in found.values()] == [2 * one, 2 * one, one + lm_head]


def test_a_frozen_head_saves_nothing_for_the_backward_pass() -> None:
    found = measured(CONFIGS["llama"], LoraAdapter(layers="body+tail"))
    assert found["head"].activation_bytes == found["head"].adapter_bytes == 0
    assert found["body"].activation_bytes > 0


PUBLISHED = {
    "llama_2_7b": 6_738_415_616,
    "llama_3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_7b": 7_615_616_512,
    "gpt2": 124_439_808,
    "smollm2_135m": 134_515_008,
}
"""Numbers of parameters in the model cards."""


def test_included_configurations_have_the_published_sizes() -> None:
    assert set(PUBLISHED) == set(model_configs())
    for name, expected in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(read_config(find_config(name)))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected, name


@pytest.mark.parametrize(("head_layers", "percent"), [(20, 67), (2, 13)])
def test_llama_7b(head_layers: int, percent: int) -> None:
    """METHOD §4 and LoRA by hand: 32 layers · 2 modules · (A and B) · 8 · 4096 = 4,194,304 parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(find_config("llama_2_7b")), dtype=torch.bfloat16)
    parts = measure_parts(SplitModel(model, head_layers, 1), LoraAdapter(), OBJECTIVE, BATCH)  # type: ignore[arg-type]
    whole, client = total_cost(parts.values()), total_cost([parts["head"], parts["tail"]])
    assert whole.weight_bytes == 2 * 6_738_415_616, "bfloat16"
    assert whole.adapter_bytes == 4 * 4_194_304, "LoRA stays in float32"
    assert client.adapter_bytes == (head_layers + 1) * 4 * 4 * 8 * 4096
    assert round(100 * fraction(client.weight_bytes, whole.weight_bytes)) == percent


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["split.hidden_dtype=int8", "split.gradient_dtype=bfloat16"],
        ["adapter=lora", "adapter.layers=body+tail", "trainer.gradient_clip=null"],
        ["adapter=lora", "adapter.layers=head"],
        ["adapter.layers=tail"],
        ["objective.item_encoder=encoded"],
        ["trainer.accumulate_grad_batches=3", "trainer.local_epochs=2", "trainer.max_local_steps=3"],
        ["aggregation=local"],
        ["objective=generative", "participation.rate=0.5"],
        ["aggregation=qfedavg"],
        ["aggregation=ifca", "aggregation.num_clusters=2"],
        ["aggregation=ditto"],
        ["aggregation=fedprox"],
        ["participation=power_of_choice", "participation.rate=0.5"],
    ],
)
def test_traffic_equals_the_ledger_of_an_executed_round(overrides: list[str], tiny_overrides: list[str]) -> None:
    """The ledger measures real messages; the plan agrees with it to the byte."""
    config = compose([*tiny_overrides, "backbone.num_layers=3", "split=executed", *overrides])
    found = Planner().plan(config)
    loop = build_loop(config, build_recommender(config, build_data(config)), ())
    loop.run_round(0)
    measured_bytes = {
        (kind, way): loop.exchange.ledger.total(round=0, phase="train", direction=way, kind=kind)
        for kind in ("hidden_state", "gradient", "adapter", "scalar")
        for way in ("up", "down")
    }
    planned = {
        (kind, way): getattr(found.traffic, f"{kind.removesuffix('_state')}_{way}_bytes") * found.cohort_size
        for kind, way in measured_bytes
    }
    if found.cohort_size == 3:
        assert planned == pytest.approx(measured_bytes)
    else:  # two of three clients: the plan is the mean over all
        assert planned == pytest.approx(measured_bytes, rel=0.3)
    assert measured_bytes["hidden_state", "up"] > 0


def test_clients_with_different_heads_have_a_line_for_each(tiny_overrides: list[str]) -> None:
    """Each line is the plan of a run in which all clients have that head; the counts are those of the clients."""
    more = ["backbone.num_layers=3", "split=executed", "adapter=lora"]
    rows = plan([*tiny_overrides, *more, "split.head_layers=[2,0,2]"])
    assert [row.plan.clients_by_head for row in rows] == [{0: 1, 2: 2}] * 2
    for row, depth in zip(rows, (0, 2), strict=True):
        (same,) = plan([*tiny_overrides, *more, f"split.head_layers={depth}"])
        expected = same.plan.to_dict() | {"clients_by_head": {0: 1, 2: 2}}
        assert row.plan.to_dict() == expected
    console = Console(width=200, record=True)
    print_plans(rows, console)
    assert "Layers in the head: clients 1 with 0, 2 with 2." in console.export_text()


def test_losses_of_fedfomo_are_counted_on_the_rows_that_are_held_out(tiny_overrides: list[str]) -> None:
    """From the second round on: the own model and that of both others, which are sent."""
    overrides = [*tiny_overrides, "backbone.num_layers=3", "split=executed", "aggregation=fedfomo"]
    config = compose([*overrides, "aggregation.held_out=0.3"])
    found = Planner().plan(config)
    assert found.load.mean.num_losses == 3
    loop = build_loop(config, build_recommender(config, build_data(config)), ())
    loop.run_round(0)
    record = loop.run_round(1)
    total = loop.exchange.ledger.total
    assert found.load.mean.num_steps * 3 == sum(trained.num_steps for trained in record.trained)
    for kind, way, planned in (
        ("hidden_state", "up", found.traffic.hidden_up_bytes),
        ("adapter", "down", found.traffic.adapter_down_bytes),
        ("scalar", "up", found.traffic.scalar_up_bytes),
    ):
        rel = 0.02 if kind == "hidden_state" else 1e-9  # other rows are padded together than in the first round
        assert planned * 3 == pytest.approx(total(round=1, phase="train", direction=way, kind=kind), rel=rel)


@pytest.mark.parametrize(("rule", "trainings"), [("ditto", 2), ("apfl", 2), ("pfedme", 1), ("fedrep", 1)])
def test_all_that_a_client_trains_is_counted(
    rule: str, trainings: int, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the optimiser, and in the input of the model; Ditto and APFL train a second model."""
    config = compose([*tiny_overrides, f"aggregation={rule}"])
    recommender = build_recommender(config, build_data(config))
    loop = build_loop(config, recommender, ())
    steps, tokens = [], []
    own_step, own_inputs = torch.optim.AdamW.step, recommender.module.objective.inputs
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: steps.append(1) or own_step(*given))
    recommender.module.objective.inputs = lambda batch: [  # type: ignore[method-assign]
        tokens.append(ids.numel()) or ids for ids in own_inputs(batch)
    ]
    record = loop.run_round(0)
    found, plain = Planner().plan(config), Planner().plan(compose(tiny_overrides))
    assert found.load.mean.num_steps * 3 == len(steps) == trainings * plain.load.mean.num_steps * 3
    assert found.load.mean.num_tokens * 3 == sum(tokens)
    assert record.trained


def test_seconds_include_losses_and_the_servers_own_training(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 6 s a step of LoRA, whose backward pass costs as much as the forward pass, a forward pass is 3 s."""
    monkeypatch.setattr("fellrec.planning.plan.seconds_per_step", lambda *given: 6.0)
    planner = Planner()

    def planned(rule: str) -> tuple[float, Load]:
        found = planner.plan(compose([*tiny_overrides, "adapter=lora", f"aggregation={rule}"]), probe_steps=1)
        assert found.seconds_per_round is not None
        return found.seconds_per_round, found.load

    (plain, load), (with_loss, measured) = planned("fedavg"), planned("qfedavg")
    assert plain == pytest.approx(3 * 6 * load.mean.num_steps)
    assert load.mean.measured_batches == 0 < measured.mean.measured_batches
    assert with_loss == pytest.approx(plain + 3 * 3 * measured.mean.measured_batches)
    data = build_data(compose(tiny_overrides))
    module = FellrecDataModule(data, lambda *given: {}, one_target_per_row=False, batch_size=16, eval_batch_size=1)
    (ditto, of_both), (apfl, _) = planned("ditto"), planned("apfl")
    assert ditto == pytest.approx(2 * plain)
    assert of_both.mean.num_steps == 2 * load.mean.num_steps
    assert apfl == pytest.approx(plain), "the step that is timed has both models"
    assert planned("fltrust")[0] == pytest.approx(plain + 6 * module.num_batches(PUBLIC))


def validation(values: list[float], round_index: int) -> Evaluation:
    """A validation with these values of the three clients."""
    metric, nobody = torch.tensor(values).double(), torch.zeros(0, dtype=torch.int64)
    summary = {"ndcg_at_10/mean": float(metric.mean())}
    return Evaluation("val", round_index, {}, nobody, {"ndcg_at_10": metric}, summary, nobody)


def test_steps_tokens_and_checkpoint_are_those_of_a_real_run(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Compared with the steps, tokens and checkpoint size of a real run."""
    overrides = [*tiny_overrides, "trainer.local_epochs=2", "trainer.max_local_steps=3"]
    config = compose(overrides)
    recommender = build_recommender(config, build_data(config))
    federation = build_federation(config, recommender)
    loop, population = federation.loop(), federation.population
    tokens = []
    own_inputs = recommender.module.objective.inputs
    recommender.module.objective.inputs = lambda batch: [  # type: ignore[method-assign]
        tokens.append(ids.numel()) or ids for ids in own_inputs(batch)
    ]
    outcomes = loop.train([population.job(row, 0) for row in range(3)])
    num_tokens = sum(tokens)
    loop.selection.update(validation([5.0, 0.0, 0.0], 0))
    for round_index, values in ((1, [3.0, 3.0, 3.0]), (2, [0.0, 4.0, 4.0])):
        loop.train([population.job(row, round_index) for row in range(3)])
        loop.selection.update(validation(values, round_index))
    loop.train([population.job(row, 3) for row in range(3)])
    assert (loop.selection.round_index, loop.selection.client_rounds) == (1, [0, 2, 2]), "no adapter counts twice"
    found = Planner().plan(config)
    assert found.load.mean.num_steps * 3 == sum(
        trained.num_steps for trained in outcomes if isinstance(trained, Trained)
    )
    assert found.load.mean.num_tokens * 3 == num_tokens
    assert found.load.num_tokens_largest == max(tokens)
    assert not found.load.is_sampled
    assert found.num_parameters == recommender.backbone.num_parameters
    CheckpointFolder(tmp_path).save(federation.persisted, 4)
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert found.checkpoint_bytes <= on_disk, "the files also contain names and shapes"
    assert math.isclose(found.checkpoint_bytes, on_disk, rel_tol=0.15)


def test_a_sample_is_scaled_and_marked(tiny_overrides: list[str]) -> None:
    config = compose([*tiny_overrides, "trainer.batch_size=2"])
    recommender = build_recommender(config, build_data(config))
    exact = count_load(recommender.datamodule, recommender.module.objective, TrainerSettings(), 0)
    sample = count_load(recommender.datamodule, recommender.module.objective, TrainerSettings(), 0, max_batches=9)
    assert (exact.is_sampled, sample.is_sampled) == (False, True)
    assert sample.mean.num_steps == exact.mean.num_steps
    assert math.isclose(sample.mean.num_tokens, exact.mean.num_tokens, rel_tol=0.2)


def test_load_is_counted_once_for_all_cuts(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "fellrec.planning.plan.count_load", lambda *arguments: calls.append(arguments) or count_load(*arguments)
    )
    rows = plan([*tiny_overrides, "split.head_layers=0,1"])
    assert [row.values for row in rows] == [{"split.head_layers": "0"}, {"split.head_layers": "1"}]
    assert [row.plan.head.num_layers for row in rows] == [0, 1]
    assert len(calls) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_console(width: int, tiny_overrides: list[str]) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plans(plan([*tiny_overrides, "split.head_layers=0,1", "trainer.batch_size=8,16"]), console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in console.export_text()
    assert sum(line.startswith("8 ") for line in lines) >= 4, "two cuts in two tables"


def test_the_verb_prints_a_table(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *tiny_overrides, "split.head_layers=0,1", "split.tail_layers=1"])
    shown = capsys.readouterr().out
    assert "0+1+1" in shown
    assert "1+0+1" in shown
    assert "s/round" not in shown
    (row,) = plan([*tiny_overrides, "split.head_layers=0", "split.tail_layers=1"])
    assert f" {row.plan.load.mean.num_steps:.1f} steps and " in shown
    assert "(means over clients)" in shown
    assert "Estimated: activations" in shown


def test_the_verb_prints_json_and_probes(tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *tiny_overrides, "split.tail_layers=0", "--format", "json", "--probe", "2"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["layers"] == {"head": 1, "body": 1, "tail": 0}
    assert found["seconds_per_round"] > 0
    traffic = found["traffic_per_client"]
    # D is 16; float32 both ways, and as much again for gradients: adapter=full trains the head.
    assert traffic["hidden_up_bytes"] == traffic["gradient_down_bytes"] == found["tokens_per_client"] * 16 * 4
    assert found["traffic_per_round_bytes"] == pytest.approx(3 * traffic["total_bytes"])
    assert found["storage_saved"] == pytest.approx(1 - found["client_weight_share"])


def test_dtypes_of_messages_come_from_the_configuration(tiny_overrides: list[str]) -> None:
    config = compose(tiny_overrides)
    plain = Planner().plan(config).traffic
    packed = Planner().plan(compose([*tiny_overrides, "split.hidden_dtype=int8", "split.gradient_dtype=bfloat16"]))
    assert packed.traffic.hidden_up_bytes == plain.hidden_up_bytes * (16 + 4) / (16 * 4)
    assert packed.traffic.gradient_up_bytes == plain.gradient_up_bytes / 2


def test_items_with_cached_vectors_are_not_part_of_a_step(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the cache all 60 texts go through the model in every micro-batch."""
    towers = [*tiny_overrides, "objective.item_encoder=encoded"]
    each, kept, later, tokens = (
        plan([*towers, *more])[0].plan
        for more in (
            [],
            ["objective.refresh_items=round"],
            ["objective.freeze_items_after=1"],
            ["objective.item_encoder=tokens"],
        )
    )
    assert kept.load.mean == tokens.load.mean
    assert later.load.mean == each.load.mean, "the first round does not use the cache"
    data = build_data(compose(towers))
    width = build_recommender(compose(towers), data).module.objective.item_text.tokens.shape[1]  # type: ignore[union-attr]
    more = each.load.mean.num_tokens - kept.load.mean.num_tokens
    assert more == pytest.approx(60 * width * each.load.mean.num_steps)
    assert kept.client.activation_bytes < each.client.activation_bytes
    main(["plan", *towers, "objective.refresh_items=3"])
    assert "Cached item vectors are computed without gradients" in capsys.readouterr().out
    main(["plan", *towers])
    assert "Cached item vectors" not in capsys.readouterr().out


def test_a_model_directory_needs_only_its_configuration(tiny_overrides: list[str], tmp_path: Path) -> None:
    LlamaConfig(**{**SHAPE, "vocab_size": 4000}).save_pretrained(tmp_path)
    hf = [item for item in tiny_overrides if not item.startswith("backbone.")] + ["backbone=hf", "adapter=full"]
    rows = plan([*hf, f"backbone.config={tmp_path}"])
    assert rows[0].plan.backbone == tmp_path.name
    assert not rows[0].plan.has_own_tokenizer
    from fellrec.models.tiny import build_tokenizer

    build_tokenizer(["a film"], vocab_size=259).save_pretrained(tmp_path)
    own = plan([*hf, f"backbone.config={tmp_path / 'config.json'}", "data.max_history=2"])
    assert own[0].plan.has_own_tokenizer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone=hf"], "backbone.path needs a value: give backbone.path=…, or backbone.config=…"),
        (["backbone=hf", "backbone.config=llama_2"], "unknown backbone.config 'llama_2'; choose from: llama_2_7b, "),
        (["backbone=hf", "backbone.config=gpt2", "backbone.path=x"], "exclude each other"),
        (["backbone=hf", "backbone.config=gpt2", "--probe", "3"], "--probe 3 needs weights"),
        (["split.transport=distributed", "--probe", "3"], "--probe 3 runs in one process"),
        (["--probe", "0"], "--probe 0 is not allowed: a whole number of at least 1"),
        (["split.head_layers=9"], "split.head_layers=9 and split.tail_layers=1 do not fit"),
        (
            ["backbone=hf", "backbone.config=gpt2", "backbone.dtype=int4"],
            "backbone.dtype=int4 is not allowed: float32, bfloat16 or float16",
        ),
    ],
)
def test_errors_are_one_message(
    overrides: list[str], message: str, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["plan", *[item for item in tiny_overrides if not item.startswith("backbone.")], *overrides])
    assert done.value.code == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "unknown model_type 'None'; choose from: "),
        ("{}", "unknown model_type 'None'; choose from: "),
        ('{"model_type": "gpt-2"}', "unknown model_type 'gpt-2'; choose from: gpt2, "),
        ('{"model_type": "llama", "hidden_size": "large"}', "hidden_size"),
    ],
)
def test_invalid_configuration_files(content: str, message: str, tmp_path: Path) -> None:
    from fellrec.errors import BackboneError

    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(BackboneError, match=message):
        read_config(find_config(str(tmp_path)))


def test_train_needs_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "backbone=hf", "backbone.config=gpt2"])
    assert "backbone.path needs a value" in capsys.readouterr().err
