"""The generative family: users per second of its rankers, and padding of batches with and without grouping by length.
length.

    python benchmarks/generative.py data=ml_1m data.root=ml-1m [OVERRIDES…] [--users 64]

Each ranker scores the same users once, after one warm-up user. ``generate`` is transformers' beam search with the
same titles as ``prefix_allowed_tokens_fn``; it returns the best titles only. Only the tiny backbone is pre-trained,
for a few steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fellrec.config.compose import compose
from fellrec.data.text import pad_left
from fellrec.experiment.build import build_data, build_recommender
from fellrec.models.split import SplitModel
from fellrec.rankers.constrained import ConstrainedRanker
from fellrec.rankers.grounding import GroundingRanker

DEFAULT = ("objective=generative", "backbone.pretrain.steps=100", "trainer.cutoffs=[10]", "trainer.metric=ndcg_at_10")
RANKERS = {
    "likelihood, all titles": ("ranker=likelihood",),
    "grounding, greedy": ("ranker=grounding",),
    "grounding, 4 beams": ("ranker=grounding", "ranker.num_beams=4"),
    "constrained, 10 beams": ("ranker=constrained", "ranker.num_beams=10"),
    "constrained, 20 beams, catalogue's softmax": (
        "ranker=constrained",
        "ranker.num_beams=20",
        "objective.softmax=catalogue",
    ),
    "constrained, 20 beams": ("ranker=constrained", "ranker.num_beams=20"),
}


def config_of(overrides: list[str], *more: str) -> DictConfig:
    return compose([*DEFAULT, *overrides, *more])


def seconds(work: Callable[[Tensor], object], histories: Tensor) -> float:
    work(histories[:1])
    started = time.perf_counter()
    work(histories)
    return time.perf_counter() - started


def measure(overrides: list[str], num_users: int) -> dict[str, float]:
    """Users per second by ranker; likelihood is measured on an eighth of the users."""
    data, found = build_data(config_of(overrides)), {}
    for name, more in RANKERS.items():
        recommender = build_recommender(config_of(overrides, f"trainer.eval_batch_size={num_users}", *more), data)
        module = recommender.module.eval()
        histories = next(iter(recommender.datamodule.eval_loader("val")))["histories"]
        histories = histories[: num_users // 8] if "likelihood" in name else histories
        module.ranker.refresh(module.model)
        found[name] = len(histories) / seconds(partial(module.ranker.scores, module.model), histories)
        if isinstance(module.ranker, GroundingRanker):
            words = [len(text.split()) for text in module.ranker.generate(module.model, histories)]
            print(f"{name}: {sum(words) / len(words):.1f} words per text")
    ranker = module.ranker
    assert isinstance(ranker, ConstrainedRanker)
    found["generate, 20 beams"] = len(histories) / seconds(constrained_generate(module.model, ranker, 20), histories)
    return found


def constrained_generate(model: SplitModel, ranker: ConstrainedRanker, num_beams: int) -> Callable[[Tensor], object]:
    """Constrained beam search of transformers, from histories to tokens."""
    titles, end = ranker.objective.titles, [ranker.objective.tokenizer.eos_token_id]
    allowed: dict[tuple[int, ...], set[int]] = {}
    for row in (tokens[inside].tolist() for tokens, inside in zip(titles.tokens, titles.inside, strict=True)):
        for place, token in enumerate(row):
            allowed.setdefault(tuple(row[:place]), set()).add(token)
    choices = {beginning: list(tokens) for beginning, tokens in allowed.items()}

    @torch.no_grad()
    def generate(histories: Tensor) -> object:
        ids, mask = pad_left(*ranker.objective.prompts(histories))
        return model.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=titles.tokens.shape[1],
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, sent: choices.get(tuple(sent[ids.shape[1] :].tolist()), end),
        )

    return generate


def padding(overrides: list[str]) -> dict[str, int]:
    """Tokens of one epoch of every client, with and without padding."""
    counts = {"without padding": 0, "by length": 0, "shuffled": 0}
    config = config_of(overrides)
    datamodule = build_recommender(config, build_data(config)).datamodule
    for name in ("by length", "shuffled"):
        if name == "shuffled":
            datamodule.lengths = lambda items, is_target: None
        for client in range(datamodule.data.num_clients):
            for batch in datamodule.train_loader(client, seed=client):
                counts[name] += batch["input_ids"].numel()
                counts["without padding"] += int(batch["lengths"].sum()) if name == "shuffled" else 0
    return counts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=64)
    options, overrides = parser.parse_known_args()
    console, table = Console(), Table("ranker", "users/s")
    counts = padding(overrides)
    for name, number in counts.items():
        console.print(f"tokens of an epoch, {name}: {number:,}")
    for name, rate in measure(overrides, options.users).items():
        table.add_row(name, f"{rate:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
