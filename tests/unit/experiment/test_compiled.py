"""``trainer.compile``: the same losses and gradients up to rounding; what it cannot be combined with."""

from __future__ import annotations

import pytest
import torch

from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_data, build_recommender, build_rule

SMALL = [
    "data=synthetic", "data.reader.num_users=40", "data.reader.num_items=50", "data.max_history=4",
    "backbone.num_layers=2", "backbone.hidden_size=16", "backbone.pretrain.steps=2",
]  # fmt: skip


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    """Losses and the gradient of every weight, for batches of two shapes."""
    found: dict[str, list[tuple[torch.Tensor, dict[str, torch.Tensor]]]] = {"false": [], "true": []}
    for compiled, steps in found.items():
        config = compose([*SMALL, f"trainer.compile={compiled}"])
        recommender = build_recommender(config, build_data(config))
        module = recommender.module.train()
        whole = next(iter(recommender.datamodule.train_loader(0, 0)))
        for histories in (whole, next(iter(recommender.datamodule.train_loader(4, 0)))):
            module.zero_grad()
            loss = module.training_step(dict(histories), 0)["loss"]
            loss.backward()
            steps.append((loss.detach(), {name: p.grad.clone() for name, p in module.trainable.items()}))
    for (loss, gradients), (other, others) in zip(found["false"], found["true"], strict=True):
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("split=executed", "needs split.transport=none"),
        ("trainer.clients_per_step=2", "needs trainer.clients_per_step=1, it is 2"),
    ],
)
def test_what_cannot_be_compiled_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_rule(compose([*SMALL, "trainer.compile=true", setting]))


def test_without_a_compiler_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = compose([*SMALL, "trainer.compile=true"])
    with pytest.raises(ConfigError, match="no-such-compiler is not installed"):
        build_recommender(config, build_data(config))
