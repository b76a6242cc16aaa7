"""Private runs from the command line: what they guarantee, what they export, and what is refused before anything else."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from last_round import IDS, ExportsTheLast
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import norm
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

from fellrec.cli.main import main
from fellrec.cli.plan import plan
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_rule
from fellrec.experiment.run import build
from fellrec.models.tiny import build_tokenizer

PRIVATE = ["aggregation=fedavg", "partition=per_user", "privacy=user_level", "privacy.epsilon=8", "privacy.delta=1e-5"]


def test_after_private_rounds_of_ffa_lora_plain_peft_gives_the_logits_of_the_run(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A is as it was drawn and all noise is in B; ε is that of the analytic Gaussian mechanism (Balle and Wang 2018)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "vocab_size": 259})
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    build_tokenizer(["a"], vocab_size=259).save_pretrained("model")
    given = [item for item in tiny_overrides if not item.startswith(("backbone.", "partition.", "data.reader.num_u"))]
    given += ["data.reader.num_users=12", "backbone=hf", "backbone.path=model", "adapter.rank=2", "adapter.alpha=5"]
    given += ["objective=retrieval", "trainer.max_local_steps=2", "trainer.learning_rate=0.05", "references.show=[]"]
    given += ["tracking.uri=null", "~callbacks.matrices", "~callbacks.model", "run_dir=run"]
    main(["train", *given, *PRIVATE, "aggregation=ffa_lora", "+callbacks.last._target_=last_round.ExportsTheLast"])
    assert "noise multiplier" in capsys.readouterr().err

    folder = tmp_path / "run" / "last" / "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    moved = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert all(tensor.abs().min() > 0 for tensor in moved), "noise is in every entry of B"
    assert all(tensor.abs().max() < 1 for name, tensor in weights.items() if "lora_A" in name)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), str(folder)).eval()
    with torch.no_grad():
        found = loaded(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, ExportsTheLast.logits, rtol=0, atol=1e-5)
    assert (found - ExportsTheLast.start).abs().max() > 1e-2, "the rounds changed the model"

    private = json.loads(Path("run/results.json").read_text())["privacy"]
    epsilon, std = private["epsilon"], private["noise_multiplier"] / math.sqrt(private["num_rounds"])
    delta = norm.cdf(0.5 / std - epsilon * std) - np.exp(epsilon) * norm.cdf(-0.5 / std - epsilon * std)
    assert delta == pytest.approx(1e-5, rel=1e-4)
    assert epsilon == pytest.approx(8.0, rel=1e-6)
    assert (private["unit"], private["event"], private["num_rounds"]) == ("user", "GaussianDpEvent", 2)
    assert "privacy of each user's data: ε=8 with δ=1e-05" in Path("run/report.md").read_text()


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as found:
        build_rule(compose([*PRIVATE, *overrides]))
    return str(found.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["aggregation=fellrec"], "aggregation fellrec needs the adapter of every client, and only the noised mean"),
        (["aggregation=local"], "no update leaves a client with aggregation local"),
        (["aggregation=term"], "aggregation term reads the clients' losses, which are not released"),
        (["aggregation=scaffold"], "aggregation scaffold reads the clients' tensors control"),
        (["aggregation=fednova"], "aggregation fednova reads the clients' numbers of steps"),
        (["aggregation=fedbuff"], "aggregation fedbuff has no rounds with a cohort"),
        (
            ["partition=kmeans"],
            "a client with several users sends one update, in which no single user's part is bounded",
        ),
        (["split=executed"], "split.transport=inprocess sends hidden states of every step to the server"),
        (["trainer.patience=3"], "trainer.patience=3 ends the run by validation data"),
        (["participation=by_size"], "participation.sampler=BySizeSampler draws clients with unknown probabilities"),
        (["participation.rate=0.5", "participation.over_selection=1.5"], "keeps the clients that are fast"),
        (["participation.rate=0.5", "participation.dropout=0.1"], "with cohorts of fixed size changes who is drawn"),
    ],
)
def test_where_the_guarantee_would_not_hold_a_run_is_refused(overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


def test_clients_with_several_users_are_protected_as_a_whole() -> None:
    build_rule(compose(["aggregation=fedavg", "privacy=client_level"]))


def test_a_missing_accountant_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have the package, so its absence is what is simulated."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "fellrec.federated.accountant.find_spec", lambda name: None if name == "dp_accounting" else found(name)
    )
    assert "need the package dp-accounting, which is not installed: pip install" in refused()


def test_plan_shows_the_noise_and_a_budget_that_cannot_be_kept_is_refused_before_a_model_is_made(
    lean_overrides: list[str], tmp_path: Path
) -> None:
    given = [item for item in lean_overrides if not item.startswith("partition.")]
    row = plan([*given, *PRIVATE])[0]
    assert row.plan.noise_multiplier is not None
    assert f"noise multiplier {row.plan.noise_multiplier:.4g}" in row.plan.privacy
    assert plan(lean_overrides)[0].plan.noise_multiplier is None
    fresh = [item for item in given if not item.startswith("cache_dir")]
    small = ["participation=poisson", "participation.rate=0.1", "privacy.epsilon=1", f"cache_dir={tmp_path}"]
    with pytest.raises(ConfigError, match="raise participation.rate, or use participation=default"):
        build(compose([*fresh, *PRIVATE, *small, "tracking.uri=null"]))
    assert not (tmp_path / "backbones").exists()
