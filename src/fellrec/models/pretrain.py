"""Pre-training of the tiny backbone on catalogue texts and public users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.data.text import plain_tokens
from fellrec.functional.rng import derive_seed
from fellrec.models.module import Objective
from fellrec.models.settings import PretrainSettings
from fellrec.models.split import SplitModel


def pretrain(
    model: SplitModel,
    objective: Objective,
    public_batches: Callable[[int], Iterable[dict[str, Tensor]]] | None,
    catalogue_tokens: Tensor,
    settings: PretrainSettings,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train all parameters of the backbone in place.

    Args:
        model: The backbone before an adapter is attached.
        objective: The run's objective, applied to public users' histories.
        public_batches: Seed → batches of public users for one epoch; ``None`` if there are no public users.
        catalogue_tokens: ``[I, L]`` int64 token ids of the catalogue's texts, padded with -100.
        settings: Settings of the pre-training.
        seed: Seed of the order of the batches, and of dropout.
        on_step: Called with the loss of every step.
    """
    device = model.model.get_input_embeddings().weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, settings.steps))
    batches = _endless(public_batches, seed) if public_batches is not None else None
    text_order = torch.Generator().manual_seed(derive_seed(seed, "catalogue"))
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "pretrain"))
        for _ in range(settings.steps):
            texts = torch.randint(len(catalogue_tokens), (settings.text_batch_size,), generator=text_order)
            loss = settings.text_weight * _text_loss(model, catalogue_tokens[texts].to(device))
            if batches is not None:
                batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
                total, num_targets = objective.loss(model, batch)
                loss = loss + total / num_targets
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            on_step(float(loss.detach()))


def catalogue_tokens(tokenizer: Any, texts: list[str], max_tokens: int = 64) -> Tensor:
    """Token ids ``[I, L]`` int64 of each text, with BOS and EOS if the tokenizer has them, padded with -100."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [torch.tensor(before + ids[:max_tokens] + after) for ids in plain_tokens(tokenizer, texts)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def _text_loss(model: SplitModel, tokens: Tensor) -> Tensor:
    logits = model.lm_head(model(tokens.clamp(min=0))[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)


def _endless(batches: Callable[[int], Iterable[dict[str, Tensor]]], seed: int) -> Iterator[dict[str, Tensor]]:
    epoch = 0
    while True:
        yield from batches(derive_seed(seed, "public", epoch))
        epoch += 1


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * (1.0 - 0.9 * step / max(1, steps))
