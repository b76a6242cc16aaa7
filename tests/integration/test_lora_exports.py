"""A rule that changes the base exports what plain PEFT and Transformers load with the same logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

from fellrec.cli.main import main
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.records import RoundRecord, ScoreJob
from fellrec.models.tiny import build_tokenizer

IDS = torch.arange(3, 30).reshape(3, 9)


class ExportsTheLast(FederatedCallback):
    """Exports the first client's adapter after the last round, whatever validation selects, and keeps its logits."""

    logits: torch.Tensor
    start: torch.Tensor

    def __init__(self, run_dir: Path, population: Any, recommender: Any, save_adapter: Callable[..., None]) -> None:
        self.folder = run_dir / "last" / "adapter"
        self.population, self.recommender, self.save_adapter = population, recommender, save_adapter

    def on_round_end(self, record: RoundRecord) -> None:
        if record.is_last:
            kind, population = type(self), self.population
            kind.logits = self._logits(population.bank.versions[0], population.base)
            kind.start = self._logits(population.initial, ())
            self.save_adapter(population.bank.row(0), population.base, self.folder)

    @torch.no_grad()
    def _logits(self, adapter: Any, base: Any) -> torch.Tensor:
        recommender = self.recommender
        model = WholeClientModel(recommender.module, recommender.base)
        recommender.module.eval()
        with model.evaluating(ScoreJob(0, adapter, (0,), base), "val", 0):
            found: torch.Tensor = recommender.backbone.model(input_ids=IDS, use_cache=False).logits
        return found


@pytest.mark.parametrize("rule", ["flora", "fedex_lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_loads_the_changed_base_with_the_same_logits(
    name: str, rule: str, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's Linear and GPT-2's Conv1D, whose c_attn is ``[32, 96]``; the scale is 5 / 2."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "vocab_size": 259})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    build_tokenizer(["a"], vocab_size=259).save_pretrained(tmp_path / "model")
    given = [item for item in tiny_overrides if not item.startswith("backbone.")]
    given += ["backbone=hf", "backbone.path=model", "adapter.rank=2", "adapter.alpha=5", "objective=retrieval"]
    given += ["trainer.max_local_steps=2", "trainer.learning_rate=0.05", "references.show=[]", "run_dir=run"]
    main(["train", *given, f"aggregation={rule}", f"+callbacks.last._target_={__name__}.ExportsTheLast"])
    folder = tmp_path / "run" / "last" / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).name == "base_02"
    model = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        found = loaded(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, ExportsTheLast.logits, rtol=0, atol=1e-5)
    assert (found - ExportsTheLast.start).abs().max() > 1e-2, "the rounds changed the model"
