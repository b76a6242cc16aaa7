"""Title likelihood: every title of the catalogue is scored as the answer to the prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from fellrec.data.text import pad_left
from fellrec.errors import ConfigError, unknown
from fellrec.models.objectives.generative import GenerativeObjective, check_generative
from fellrec.models.split import SplitModel

NORMALISE = ("mean", "sum")


def next_logits(model: SplitModel, cache: Cache, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of the next token after cached prefixes and new tokens, which are added to the cache.

    Args:
        model: The backbone with a client's adapter.
        cache: Key-value cache of the prefixes.
        tokens: ``[n, l]`` int64 new tokens.
        mask: ``[n, seen + l]`` int64, 1 for tokens and 0 for padding on the left.

    Returns:
        ``[n, V]`` float32.
    """
    output = model.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


class LikelihoodRanker:
    """Log-likelihood of each title's tokens after the prompt, with one key-value cache per prompt for all titles.

    Args:
        objective: The objective of the training, for its prompts.
        normalise: ``"mean"`` over a title's tokens, or their ``"sum"``, which favours short titles.
        max_batch_tokens: Maximum number of tokens in one forward pass.

    Raises:
        ConfigError: For an unknown ``normalise``.
    """

    def __init__(self, objective: GenerativeObjective, normalise: str = "mean", max_batch_tokens: int = 65536) -> None:
        check_generative(objective, "likelihood")
        if normalise not in NORMALISE:
            raise ConfigError(unknown("ranker.normalise", normalise, NORMALISE))
        self.objective = objective
        self.normalise = normalise
        self.max_batch_tokens = max_batch_tokens

    def refresh(self, model: SplitModel) -> None:
        """No state depends on the adapter."""

    @torch.no_grad()
    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items for each history.

        Args:
            model: The backbone with a client's adapter.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            ``[B, I]`` float32, higher is better.
        """
        device = model.model.get_input_embeddings().weight.device
        ids, lengths = self.objective.prompts(histories.cpu())
        num_items, width = self.objective.titles.tokens.shape
        rows = max(1, self.max_batch_tokens // (ids.shape[1] + width))
        users = max(1, rows // num_items)
        parts = []
        for first in range(0, len(ids), users):
            prompt, mask = pad_left(ids[first : first + users], lengths[first : first + users])
            parts.append(self._score_users(model, prompt.to(device), mask.to(device), rows))
        return torch.cat(parts)

    def _score_users(self, model: SplitModel, ids: Tensor, mask: Tensor, rows: int) -> Tensor:
        """Scores ``[b, I]`` for a batch of left-padded prompts ``[b, L]``."""
        cache = model.new_cache()
        first_logp_bV = next_logits(model, cache, ids, mask).log_softmax(dim=-1)
        chunk = max(1, rows // len(ids))
        titles = self.objective.titles
        scores = [
            self._score_titles(
                model,
                model.copy_cache(cache),
                mask,
                first_logp_bV,
                titles.tokens[start : start + chunk].to(ids.device),
                titles.inside[start : start + chunk].to(ids.device),
            )
            for start in range(0, len(titles.tokens), chunk)
        ]
        model.drop_cache(cache)
        return torch.cat(scores, dim=1)

    def _score_titles(
        self, model: SplitModel, cache: Cache, mask: Tensor, first_logp: Tensor, titles: Tensor, inside: Tensor
    ) -> Tensor:
        """Scores ``[b, n]`` of ``n`` titles after each of ``b`` cached prompts."""
        num_users, num_titles = len(mask), len(titles)
        cache.batch_repeat_interleave(num_titles)
        inputs, inside_all = titles.repeat(num_users, 1), inside.repeat(num_users, 1)
        full_mask = torch.cat([mask.repeat_interleave(num_titles, dim=0), inside_all.long()], dim=1)
        position_ids = (full_mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] :]
        # The last token of a title predicts no scored token, so it is not an input.
        logits = model.model(
            input_ids=inputs[:, :-1],
            attention_mask=full_mask[:, :-1],
            position_ids=position_ids[:, :-1],
            past_key_values=cache,
            use_cache=True,
        ).logits
        model.drop_cache(cache)
        later = logits.float().log_softmax(dim=-1).gather(2, inputs[:, 1:, None])[:, :, 0]
        first = first_logp[:, titles[:, 0]].reshape(-1, 1)
        logp = torch.cat([first, later], dim=1).masked_fill(~inside_all, 0.0).sum(dim=1)
        if self.normalise == "mean":
            logp = logp / inside_all.sum(dim=1)
        return logp.reshape(num_users, num_titles)
