"""Adapters and backbones with a real pretrained model, and the bank of the clients' adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fellrec.errors import BackboneError, ConfigError
from fellrec.models.adapters import FullAdapter, LoraAdapter
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.settings import TinySettings
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny, build_tokenizer
from fellrec.state.bank import AdapterBank

TITLES = ["Amélie (2001)", "Léon: The Professional", "Toy Story 🚀", "WALL·E", "千と千尋の神隠し"]


@pytest.fixture
def stories(real_data: Path) -> Backbone:
    return load_hf(str(real_data / "stories260K-hf"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def disturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_the_pretrained_model_generates_its_known_text(stories: Backbone) -> None:
    ids = torch.tensor([[stories.tokenizer.bos_token_id]])
    generated = stories.model.generate(ids, max_new_tokens=60, do_sample=False)
    text = stories.tokenizer.decode(generated[0], skip_special_tokens=True)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
    assert stories.num_parameters == 260_032
    assert stories.tokenizer.pad_token_id is not None


def test_lora_is_saved_in_the_format_of_peft(stories: Backbone, real_data: Path, tmp_path: Path) -> None:
    adapter = LoraAdapter(rank=4, dropout=0.0)
    adapter.attach(stories.model, stories.arch, 0, lambda name: "body")
    trainable = adapter.trainable(stories.model)
    assert len(trainable) == 5 * 2 * 2
    assert [name for name, p in stories.model.named_parameters() if p.requires_grad] == [
        name for name, _ in stories.model.named_parameters() if "lora_" in name
    ]
    disturb(trainable)
    adapter.save(adapter.trainable(stories.model), stories, dict, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    fresh = AutoModelForCausalLM.from_pretrained(real_data / "stories260K-hf")
    before = logits(fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded), logits(stories.model))
    assert not torch.equal(before, logits(loaded))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(stories.model), atol=1e-4, rtol=1e-4)


def test_lora_is_initially_the_identity_and_depends_on_the_seed_only(stories: Backbone, real_data: Path) -> None:
    before = logits(stories.model)
    state = torch.get_rng_state()
    adapter = LoraAdapter()
    adapter.attach(stories.model, stories.arch, 3, lambda name: "body")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(stories.model), before)
    again, other = (load_hf(str(real_data / "stories260K-hf")) for _ in range(2))
    for backbone, seed in ((again, 3), (other, 4)):
        LoraAdapter().attach(backbone.model, backbone.arch, seed, lambda name: "body")
    mine = adapter.trainable(stories.model)
    assert all(torch.equal(mine[n], p) for n, p in adapter.trainable(again.model).items())
    assert not all(torch.equal(mine[n], p) for n, p in adapter.trainable(other.model).items())


def test_lora_in_the_parts_equals_the_whole_model(stories: Backbone) -> None:
    split = SplitModel(stories.model, 2, 1)
    adapter = LoraAdapter(dropout=0.0)
    adapter.attach(stories.model, stories.arch, 0, lambda name: "body")
    disturb(adapter.trainable(stories.model))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(split.eval().lm_head(split(ids)), stories.model(input_ids=ids, use_cache=False).logits)


def test_targets_that_match_no_module_are_refused() -> None:
    tiny = build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2))
    for target in ("q_prj", "self_attn.q_prj", "mlp.q_proj"):
        with pytest.raises(BackboneError, match=rf"'{target}' matches no module of the backbone; it has q_proj"):
            LoraAdapter(target_modules=[target]).attach(tiny.model, tiny.arch, 0, lambda name: "body")


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"], ["self_attn.q_proj"]])
def test_targets_match_suffixes_of_module_names(targets: str | list[str]) -> None:
    tiny = build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2))
    adapter = LoraAdapter(target_modules=targets)
    adapter.attach(tiny.model, tiny.arch, 0, lambda name: "body")
    assert {name.split(".lora_")[0] for name in adapter.trainable(tiny.model)} == {
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }


def test_building_a_model_or_an_adapter_does_not_reseed_the_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    torch.manual_seed(0)
    assert reseeded == [0], "torch.manual_seed reseeds the accelerators"
    tiny = build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2, seed=1))
    LoraAdapter().attach(tiny.model, tiny.arch, 2, lambda name: "body")
    assert reseeded == [0]


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 1.0}])
def test_lora_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="adapter"):
        LoraAdapter(**settings)  # type: ignore[arg-type]


def test_a_full_adapter_is_saved_as_a_transformers_model_folder(tmp_path: Path) -> None:
    tiny = build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2))
    adapter = FullAdapter()
    adapter.attach(tiny.model, tiny.arch, 0, lambda name: "body")
    assert list(adapter.trainable(tiny.model)) == sorted(name for name, _ in tiny.model.named_parameters())
    disturb(adapter.trainable(tiny.model))
    adapter.save(adapter.trainable(tiny.model), tiny, dict, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny.model))
    assert AutoTokenizer.from_pretrained(tmp_path)(TITLES)["input_ids"] == tiny.tokenizer(TITLES)["input_ids"]


def test_the_tokenizer_is_lossless() -> None:
    tokenizer = build_tokenizer(TITLES[:2], vocab_size=300)
    for title in TITLES:
        ids = tokenizer(title, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == title
    assert len(tokenizer) <= 300


def test_the_tiny_model_depends_on_its_seed_and_does_not_use_the_global_generator() -> None:
    state = torch.get_rng_state()
    first, same, other = (
        build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(first.model), logits(same.model))
    assert not torch.equal(logits(first.model), logits(other.model))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "backbone.hidden_size=30"),
        ({"vocab_size": 258}, "backbone.vocab_size=258 is not allowed: a whole number from 259 to 1048576"),
        ({"max_position_embeddings": 0}, "backbone.max_position_embeddings=0"),
    ],
)
def test_tiny_sizes_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tiny(TITLES, TinySettings(**sizes))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a directory"),
        ([], "has no config.json"),
        (["config.json"], "has no .*safetensors"),
        (["config.json", "model.safetensors"], "cannot be loaded"),
    ],
)
def test_incomplete_folders_are_refused(files: list[str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    with pytest.raises(BackboneError, match=message):
        load_hf(str(folder))


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    tiny = build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2))
    FullAdapter().save(dict(tiny.model.named_parameters()), tiny, dict, tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        kept = {key: value for key, value in json.loads((folder / name).read_text()).items() if key not in changes}
        new = {key: value for key, value in changes.items() if value is not None}
        (folder / name).write_text(json.dumps({**kept, **new}))

    return edit


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "cannot be loaded: .*header"),
        (drop_a_tensor, r"missing 1 \(model.layers.1.mlp.up_proj.weight\), of another shape 0"),
        (edit_json("config.json", num_hidden_layers=3), r"missing 9 \(model.layers.2."),
        (edit_json("config.json", intermediate_size=8), r"missing 0 \(\), of another shape 6 \(model.layers.0.mlp"),
        (edit_json("tokenizer_config.json", pad_token=None, eos_token=None), "no padding, end or unknown token"),
        (edit_json("tokenizer_config.json", pad_token="<new>"), "pad_token has id .* embeddings for ids 0 to"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(damage: Callable[[Path], None], message: str, tiny_folder: Path) -> None:
    load_hf(str(tiny_folder))
    damage(tiny_folder)
    with pytest.raises(BackboneError, match=message):
        load_hf(str(tiny_folder))


def test_a_folder_may_be_relative_or_in_the_home_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    monkeypatch.chdir(tiny_folder)
    assert [load_hf(path).name for path in ("~/tiny", ".", "../tiny/")] == ["tiny"] * 3


def test_a_saved_tokenizer_is_lossless(tiny_folder: Path) -> None:
    tokenizer = load_hf(str(tiny_folder)).tokenizer
    for title in [*TITLES, "two  spaces , and a comma"]:
        assert tokenizer.decode(tokenizer(title, add_special_tokens=False)["input_ids"]) == title


def test_unknown_architectures_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"unknown architecture \(model_type\) 'bloom'; choose from: .*gpt2"):
        load_hf(str(tmp_path))


def adapter(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value), "b": torch.full((4,), value)}


def test_the_bank_changes_only_the_given_clients() -> None:
    bank = AdapterBank.replicate(adapter(0.0), 4)
    bank.store(2, adapter(2.0))
    bank.replace((0, 3), {name: torch.stack([t, t + 1]) for name, t in adapter(5.0).items()})
    assert bank.tensors["b"][:, 0].tolist() == [5.0, 0.0, 2.0, 6.0]
    stack = bank.stack((3, 2))
    assert stack["a"][:, 0, 0].tolist() == [6.0, 2.0]
    stack["a"].zero_()
    assert bank.tensors["a"][3, 0, 0] == 6.0, "a stack is a copy"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": torch.zeros(2, 3)}, r"missing \['b'\]"),
        ({**adapter(0.0), "c": torch.zeros(1)}, r"unexpected \['c'\]"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, r"a has shape \[3, 2\], expected \[2, 3\]"),
    ],
)
def test_the_bank_refuses_other_names_and_shapes(wrong: dict[str, torch.Tensor], message: str) -> None:
    bank = AdapterBank.replicate(adapter(0.0), 2)
    with pytest.raises(BackboneError, match=message):
        bank.store(0, wrong)
    with pytest.raises(BackboneError, match=message):
        bank.replace((1,), {name: tensor[None] for name, tensor in wrong.items()})


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_stack_with_another_number_of_rows_is_refused(num_rows: int) -> None:
    bank = AdapterBank.replicate(adapter(0.0), 2)
    stack = {name: tensor.expand(num_rows, *tensor.shape) for name, tensor in adapter(1.0).items()}
    with pytest.raises(BackboneError, match=f"rows for {num_rows} clients, expected 2"):
        bank.replace((0, 1), stack)
    assert all(tensor.count_nonzero() == 0 for tensor in bank.tensors.values())
