"""Trouble with backbones and adapters that users reported: each is solved, or refused by one message before a run starts.

The models are small Llamas with random weights, and the data are 12 users and 10 items of our own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.errors import BackboneError, ConfigError
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.experiment.precision import check_precision
from fellrec.models.backbone import load_hf
from fellrec.models.partial import load_partial
from fellrec.models.tiny import build_tokenizer
from fellrec.state.tensor_store import map_tensors, write_tensors

TITLES = [f"{colour} {thing}" for colour in ("Amber", "Blue") for thing in ("kettle", "lamp", "chair", "spoon", "vase")]
Edit = Callable[[Path], None]


def write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [f"u{user}\ti{(user + step) % 10}\t{1000 + 100 * step + user}" for user in range(12) for step in range(6)]
    (folder / "data.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    lines = [f"i{item}\t{title}" for item, title in enumerate(TITLES)]
    (folder / "data.item").write_text("\n".join(["item_id:token\titem_name:token_seq", *lines, ""]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data`` and ``model``."""
    folder = tmp_path_factory.mktemp("source")
    write_data(folder / "data")
    tokenizer = build_tokenizer([f"{title}\n" for title in TITLES], vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def case(source: Path, tmp_path: Path, cache: Path) -> list[str]:
    """Overrides of a short run in ``tmp_path`` on a copy of the model that a test may change."""
    shutil.copytree(source / "model", tmp_path / "model")
    return [
        "data=atomic",
        f"data.root={source / 'data'}",
        "data.public_user_rate=0",
        "partition=random",
        "partition.num_clients=2",
        "trainer.cutoffs=[3]",
        "trainer.metric=ndcg_at_3",
        "trainer.num_rounds=1",
        "trainer.max_local_steps=2",
        "references.show=[popularity]",
        "backbone=hf",
        f"backbone.path={tmp_path / 'model'}",
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
        f"run_dir={tmp_path / 'run'}",
        f"cache_dir={cache}",
    ]


def in_config(**changes: Any) -> Edit:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def in_tokenizer_config(**changes: Any) -> Edit:
    def edit(model: Path) -> None:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def add_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["kettle", "[ITEM]"])
    tokenizer.save_pretrained(model)


def add_adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def make_adapter(model: Path) -> None:
    add_adapter(model)
    (model / "config.json").unlink()


def drop_tokenizer_json(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"pieces")


def in_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Edit:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def as_type(dtype: torch.dtype) -> Edit:
    return in_weights(lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def make_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")


def in_another_format(name: str, keep: tuple[str, ...] = ()) -> Edit:
    def edit(model: Path) -> None:
        for path in model.iterdir():
            if path.name not in keep:
                path.unlink()
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"{}")

    return edit


def drop_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def refused(overrides: list[str], capsys: pytest.CaptureFixture[str], verb: str = "train") -> str:
    """The only line that a command prints which is refused before its run directory exists."""
    with pytest.raises(SystemExit) as done:
        main([verb, *overrides])
    assert done.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    run_dir = Path(next(item for item in overrides if item.startswith("run_dir=")).removeprefix("run_dir="))
    assert not run_dir.exists()
    return line


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (add_tokens, r"use token \d+ \('kettle'\), but the model has embeddings for 0 to \d+ only"),
        (
            in_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "quantised.*bitsandbytes",
        ),
        (in_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised checkpoint.*gptq"),
        (in_config(rms_norm_eps=1), "config.json is not valid: .*rms_norm_eps.*expected float, got int"),
        (in_config(num_attention_heads=0), "config.json is not valid"),
        (in_config(num_attention_heads=7), "config.json is not valid: .*multiple of the number of attention heads"),
        (in_config(vocab_size=-1), "no model has the sizes in config.json"),
        (in_config(hidden_act="nope"), "no model has the sizes in config.json .KeyError: 'nope'"),
        (in_config(num_hidden_layers=1_000_000), "num_hidden_layers=1000000 in config.json is not allowed: .* to 1000"),
        (in_config(num_hidden_layers=0), "num_hidden_layers=0 in config.json is not allowed"),
        (in_config(num_hidden_layers=20), r"missing \d+ \(model.layers.10"),
        (in_config(vocab_size=10**12), r"of another shape 1 \(model.embed_tokens.weight\)"),
        (in_config(model_type="t5"), "model_type t5 is an encoder-decoder, which is not supported; use a causal LM"),
        (in_config(model_type="bloom"), "unknown architecture .model_type. 'bloom'; choose from: "),
        (in_tokenizer_config(model_max_length="x"), "the tokenizer cannot be loaded"),
        (in_config(compression_config={"format": "int-quantized"}), "quantised checkpoint"),
        (as_type(torch.int8), r"\d+ tensors are stored as other numbers than F64, F32, F16, BF16, such as .* as I8"),
        (as_type(torch.float8_e4m3fn), "as F8_E4M3: a quantised checkpoint is not supported"),
        (
            in_weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
            "backbone.path=.*: model.norm.weight has values that are not finite",
        ),
        (cut, "model.safetensors: .*; was it copied or downloaded completely"),
        (make_pointer, "model.safetensors: it is a pointer of Git LFS, not the file itself; get it by git lfs pull"),
        (drop_tokenizer, "has no tokenizer, such as tokenizer.json"),
        (in_another_format("model.gguf"), "has no config.json; .*; there is model.gguf"),
        (
            in_another_format("pytorch_model.bin", ("config.json",)),
            "has no .*safetensors files; .* is pytorch_model.bin",
        ),
        (
            in_another_format("0_Transformer/config.json"),
            "has no config.json; .*; there is one in .*model/0_Transformer",
        ),
        (in_another_format("snapshots/config.json"), "has no config.json; .*; there is one in .*model/snapshots"),
        (add_adapter, "has an adapter beside the model .adapter_config.json.; move the adapter"),
        (make_adapter, r"is a PEFT adapter .* give its base model \(some/base\) as backbone.path, .* as adapter.path"),
    ],
)
def test_folders_that_cannot_be_trained_are_refused_by_one_line(
    edit: Edit, message: str, case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tmp_path / "model")
    line = refused(case, capsys)
    assert line.startswith("fellrec train: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (in_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quantised checkpoint"),
        (in_config(rms_norm_eps=1), "rms_norm_eps"),
        (in_config(num_hidden_layers=1_000_000), "num_hidden_layers=1000000"),
        (add_tokens, "('kettle'), but the model has embeddings"),
    ],
)
def test_plan_says_it_too(
    edit: Edit, message: str, case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tmp_path / "model")
    assert message in refused(case, capsys, "plan")


def test_a_missing_package_of_the_tokenizer_is_named(
    case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_tokenizer_json(tmp_path / "model")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find_spec(name))
    assert "tokenizer in tokenizer.model needs the package sentencepiece, which is not" in refused(case, capsys)


def test_a_sentencepiece_model_alone_gives_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    """Also where the files name no tokenizer class: transformers would leave out the space before the first word."""
    pieces = pytest.importorskip("sentencepiece")
    (tmp_path / "titles.txt").write_text("\n".join(TITLES))
    pieces.SentencePieceTrainer.train(
        input=str(tmp_path / "titles.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    from fellrec.models.hf_folder import read_tokenizer

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    expected = pieces.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = read_tokenizer("backbone.path=x", str(tmp_path))
    for title in TITLES:
        assert tokenizer(title, add_special_tokens=False)["input_ids"] == expected.encode(title)


@pytest.fixture
def without_head(source: Path, tmp_path: Path, case: list[str]) -> list[str]:
    """An embedding model: its files have no LM head, and it is not tied."""
    in_config(tie_word_embeddings=False)(tmp_path / "model")
    config = LlamaConfig.from_pretrained(tmp_path / "model")
    LlamaModel(config).save_pretrained(tmp_path / "model")
    return case


@pytest.mark.parametrize("more", [[], ["adapter=full"], ["split.transport=inprocess"]])
def test_a_model_without_an_lm_head_trains_for_retrieval(
    without_head: list[str], more: list[str], tmp_path: Path
) -> None:
    recommender = build_recommender(config := compose([*without_head, *more]), build_data(config))
    model = recommender.backbone.model
    assert not any("lm_head" in name for name, _ in model.named_parameters()), "no memory for what is not used"
    expected = LlamaModel.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 4, 5]])
    if not more:
        hidden = recommender.module.model.eval()(ids)
        torch.testing.assert_close(hidden, expected(ids).last_hidden_state)


def test_the_client_of_a_cut_model_without_an_lm_head_loads(without_head: list[str], tmp_path: Path) -> None:
    client = load_hf(str(tmp_path / "model"), client_cut=(1, 1))
    assert not any("lm_head" in name for name, _ in client.model.named_parameters())


def test_a_model_without_an_lm_head_generates_nothing(
    without_head: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([*without_head, "objective=generative"], capsys)
    assert "missing 1 (lm_head.weight): objective=generative needs an LM head" in line


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_of_another_run(case: list[str], tmp_path: Path) -> None:
    """Its first adapter is the other's last one, to the last bit; through the cut as well."""
    main(["train", *case, "aggregation=fedavg"])
    folder = tmp_path / "run" / "adapters" / "client_00"
    saved = load_file(folder / "adapter_model.safetensors")
    for more in ([], ["split.transport=inprocess"]):
        config = compose([*case, f"adapter.path={folder}", *more])
        recommender = build_recommender(config, build_data(config))
        initial = recommender.initial | (recommender.server.initial if recommender.server else {})
        assert {f"base_model.model.{name.replace('.default.', '.')}" for name in initial} == saved.keys()
        for name, tensor in initial.items():
            assert torch.equal(tensor, saved[f"base_model.model.{name.replace('.default.', '.')}"])
    for more, message in [
        ("adapter.rank=4", "its r is 8, and this run's is 4"),
        ("adapter.alpha=8", "its lora_alpha is 16, and this run's is 8"),
        ("adapter.target_modules=[k_proj,v_proj]", "3 of this run's tensors|adapts other modules"),
        ("adapter.layers=body+tail", "adapts other modules .* 4 are in the adapter only"),
        ("adapter.modules_to_save=[norm]", "1 of this run's tensors are missing .model.norm.weight"),
    ]:
        config = compose([*case, f"adapter.path={folder}", more])
        with pytest.raises(BackboneError, match=message):
            build_recommender(config, build_data(config))
    name = next(iter(saved))
    save_file({**saved, name: saved[name] * float("nan")}, folder / "adapter_model.safetensors")
    config = compose([*case, f"adapter.path={folder}"])
    with pytest.raises(BackboneError, match=f"{name} has values that are not finite"):
        build_recommender(config, build_data(config))


def test_an_adapter_that_is_not_there_is_named(case: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*case, "adapter.path=nowhere"], capsys)
    assert "adapter.path=nowhere is not a directory" in line


@pytest.mark.parametrize(
    ("more", "device", "message"),
    [
        (["quantize=8bit"], "cpu", "backbone.quantize=8bit needs the package bitsandbytes, which is not installed"),
        (["quantize=4bit"], "cpu", "needs a GPU: on the CPU bitsandbytes gives no gradients"),
        (["quantize=8bit", "adapter=full"], "cuda", "needs adapter=lora: quantised weights cannot be trained"),
        (["quantize=4bit", "split.transport=inprocess"], "cuda", "needs split.transport=none, it is inprocess"),
        (["quantize=2bit"], "cuda", "backbone.quantize=2bit is not allowed: 8bit or 4bit, or null"),
    ],
)
def test_a_base_that_cannot_be_quantised_is_refused(
    more: list[str], device: str, message: str, case: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_package = "is not installed" not in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_package else None)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_precision(compose([*case, f"backbone.{more[0]}", *more[1:]]), torch.device(device))


@pytest.mark.parametrize(
    ("adapter", "rule", "starts_as_0"),
    [
        ("lora", "local", "lora_B"),
        ("lora_heads", "ravan", "lora_cores"),
        ("lora_sb", "fed_sb", "lora_cores"),
        ("lora_mixed", "fedalt", "lora_own_b"),
    ],
)
def test_a_client_trains_on_a_base_in_eight_bits(case: list[str], adapter: str, rule: str, starts_as_0: str) -> None:
    config = compose([*case, f"adapter={adapter}", "adapter.rank=2", "backbone.quantize=8bit", f"aggregation={rule}"])
    recommender = build_recommender(config, build_data(config))
    parameters = dict(recommender.backbone.model.named_parameters())
    assert parameters["model.layers.0.self_attn.q_proj.base_layer.weight"].dtype == torch.int8
    loop = build_loop(config, recommender)
    loop.run()
    changed = loop.population.bank.row(0)
    assert all(bool(tensor.any()) for name, tensor in changed.items() if starts_as_0 in name), "it has left zero"


@pytest.fixture
def finished(case: list[str], tmp_path: Path) -> Path:
    """A finished run, and its overrides' model, which a test may change."""
    main(["train", *case, "aggregation=fedavg"])
    return tmp_path / "run"


def scale_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_another_backbone_or_adapter_than_that_of_the_training_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, copy = tmp_path / "model", tmp_path / "copy"
    shutil.copytree(model, copy)
    for edit, message in (
        (scale_weights, r"another backbone than this model; they differ in 29 of 29 weights \("),
        (in_config(rms_norm_eps=0.5), "they differ in config.json$"),
        (in_config(rope_parameters={"rope_theta": 5.0, "rope_type": "default"}), "they differ in config.json$"),
    ):
        edit(model)
        for command in (["evaluate", str(finished)], ["train", f"resume={finished}"]):
            with pytest.raises(SystemExit):
                main(command)
            assert re.search(message, capsys.readouterr().err.splitlines()[0]), command
        shutil.rmtree(model)
        shutil.copytree(copy, model)
    main(["evaluate", str(finished)])
    capsys.readouterr()
    poison(finished / "checkpoints" / "tensors")
    with pytest.raises(SystemExit):
        main(["evaluate", str(finished)])
    assert re.search("lora_A.default.weight has values that are not finite", capsys.readouterr().err)


def poison(folder: Path) -> None:
    """Write NaN into every adapter, with the checksum that belongs to it."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in map_tensors(path).items()}
        if any(name.endswith("lora_A.default.weight") for name in tensors):
            path.unlink()
            write_tensors(path, {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()})


def _as_shards(folder: Path) -> dict[str, Any]:
    """Save the model in several files; returns the index, which is written by `_write_index`."""
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    return dict(index)


def _write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_older_shards(folder: Path) -> None:
    """An index and shards with other weights, left beside a newer single file."""
    shutil.copytree(folder, folder / "new")
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(folder)
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    _as_shards(folder)
    shutil.move(folder / "new" / "model.safetensors", folder)


def _index_of_lost_shards(folder: Path) -> None:
    _write_index(folder, {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})


def _index_with_wrong_shards(folder: Path) -> None:
    index = _as_shards(folder)
    files = sorted(set(index["weight_map"].values()))
    following = dict(zip(files, [*files[1:], files[0]], strict=True))
    _write_index(folder, index | {"weight_map": {name: following[file] for name, file in index["weight_map"].items()}})


def _change_index(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda folder: _write_index(folder, change(_as_shards(folder)))


INDEXES: dict[str, tuple[Edit, str]] = {
    "older shards": (_index_of_older_shards, ""),
    "lost shards beside a file": (_index_of_lost_shards, ""),
    "wrong shards": (_index_with_wrong_shards, ""),
    "lost shards": (
        lambda folder: (_index_of_lost_shards(folder), (folder / "model.safetensors").unlink())[0],
        "has no *.safetensors files",
    ),
    "another folder": (
        _change_index(lambda index: index | {"weight_map": {"lm_head.weight": "../model/model.safetensors"}}),
        "which is not a file of the folder",
    ),
    "a number": (_change_index(lambda index: index | {"weight_map": {"lm_head.weight": 5}}), "is not a file of the"),
    "a list": (_change_index(lambda index: [index]), "needs the mappings weight_map and metadata"),
    "files in a list": (_change_index(lambda index: index | {"weight_map": []}), "needs the mappings weight_map"),
    "no metadata": (_change_index(lambda index: {"weight_map": index["weight_map"]}), "needs the mappings weight_map"),
    "no JSON": (
        lambda folder: (_as_shards(folder), (folder / "model.safetensors.index.json").write_text("{"))[0],
        "index.json: Expecting",
    ),
    "another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
        "it has neither model.safetensors nor model.safetensors.index.json",
    ),
    "a name in config.json": (
        in_config(transformers_weights="other.safetensors"),
        "transformers_weights=other.safetensors in config.json is not supported",
    ),
}


@pytest.mark.parametrize("index", INDEXES)
def test_one_process_and_two_load_the_same_files(source: Path, tmp_path: Path, index: str) -> None:
    """One process loads by transformers and two load their parts: an older index was taken by one and not by two."""
    folder = tmp_path / "model"
    shutil.copytree(source / "model", folder)
    expected = dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())
    change, message = INDEXES[index]
    change(folder)
    if message:
        refusals = []
        for cut in (None, (1, 1)):
            with pytest.raises(BackboneError, match=re.escape(message)) as raised:
                load_hf(str(folder), client_cut=cut)
            refusals.append(str(raised.value))
        assert refusals[0] == refusals[1]
        return
    parts = [load_hf(str(folder), client_cut=(1, 1)).model, load_partial(folder, "server", 1, 1, torch.float32)]
    whole = dict(load_hf(str(folder)).model.named_parameters())
    found = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    assert whole.keys() == found.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.onnx",
            "model.onnx is an ONNX file; expected a Hugging Face model folder, with config.json, a tokenizer",
        ),
        ("model/model.safetensors", "model.safetensors is a file of weights; expected a Hugging Face model folder"),
        ("model/config.json", "config.json is not a directory but a file; its directory is"),
        ("model.zip", "model.zip is not a directory but an archive; decompress it"),
        ("modle", "modle is not a directory; similar: "),
    ],
)
def test_a_path_that_is_not_a_folder_is_named_for_what_it_is(
    name: str, message: str, case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "modle":
        (tmp_path / name).touch()
    assert message in refused([*case, f"backbone.path={tmp_path / name}"], capsys)


def test_a_path_with_one_slash_in_a_folder_that_exists_is_not_a_name_on_the_hub(
    case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a mistyped path waits for the network."""
    monkeypatch.chdir(tmp_path.parent)
    given = f"{tmp_path.name}/modle"
    assert f"{given} is not a directory; similar: {tmp_path.name}/model" in refused(
        [*case, f"backbone.path={given}"], capsys
    )


def test_modules_of_a_pipeline_that_are_not_applied_are_named(
    case: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As sentence-transformers saves them."""
    kinds = ("Transformer", "Pooling", "Dense")
    modules = [{"idx": k, "path": "", "type": f"sentence_transformers.models.{kind}"} for k, kind in enumerate(kinds)]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    load_hf(str(tmp_path / "model"))
    assert "objective.similarity decide how hidden states become a vector, not its Pooling, Dense" in caplog.text
