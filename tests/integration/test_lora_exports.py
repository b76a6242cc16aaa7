"""A rule that changes the base exports what plain PEFT and Transformers load with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from last_round import IDS, ExportsTheLast
from peft import PeftModel
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

from fellrec.cli.main import main
from fellrec.models.tiny import build_tokenizer


@pytest.mark.parametrize("rule", ["flora", "fedex_lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_loads_the_changed_base_with_the_same_logits(
    name: str, rule: str, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's Linear and GPT-2's Conv1D, whose c_attn is ``[32, 96]``; the scale is 5 / 2."""
    monkeypatch.chdir(tmp_path)
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "vocab_size": 259})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    build_tokenizer(["a"], vocab_size=259).save_pretrained(tmp_path / "model")
    given = [item for item in tiny_overrides if not item.startswith("backbone.")]
    given += ["backbone=hf", "backbone.path=model", "adapter.rank=2", "adapter.alpha=5", "objective=retrieval"]
    given += ["trainer.max_local_steps=2", "trainer.learning_rate=0.05", "references.show=[]", "run_dir=run"]
    main(["train", *given, f"aggregation={rule}", "+callbacks.last._target_=last_round.ExportsTheLast"])
    folder = tmp_path / "run" / "last" / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).name == "base_02"
    model = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        found = loaded(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, ExportsTheLast.logits, rtol=0, atol=1e-5)
    assert (found - ExportsTheLast.start).abs().max() > 1e-2, "the rounds changed the model"
