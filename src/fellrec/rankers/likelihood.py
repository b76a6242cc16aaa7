"""Title likelihood: every title of the catalogue is scored as the answer to the prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from fellrec.data.text import pad_left
from fellrec.models.objectives.generative import GenerativeObjective, check_generative
from fellrec.models.split import SplitModel
from fellrec.rankers.settings import LikelihoodSettings
from fellrec.rankers.title_tree import TitleTree, title_trees

_TITLES_TOGETHER = 64
"""Titles in one forward pass, as one sequence."""


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
        **model.cache_argument(cache),
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


class LikelihoodRanker:
    """Log-likelihood of each title's tokens after the prompt.

    A prompt is read once for all titles, and what titles have in common once for these, see `TitleTree`. Through the
    executed cut, and for backbones whose attention has a window, every title is read by itself.

    Args:
        objective: The objective of the training, for its prompts.
        settings: See `LikelihoodSettings`.
    """

    def __init__(self, objective: GenerativeObjective, settings: LikelihoodSettings) -> None:
        check_generative(objective, "likelihood")
        self.objective = objective
        self.normalise = settings.normalise
        self.max_batch_tokens = settings.max_batch_tokens
        titles = objective.titles
        together = min(_TITLES_TOGETHER, max(1, settings.max_batch_tokens // titles.tokens.shape[1]))
        self.trees, self._title_of_item = title_trees(titles.tokens, titles.inside, together)

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
        reads_trees = not model.is_cut and not model.has_window
        ids, lengths = self.objective.prompts(histories.cpu())
        num_items, width = self.objective.titles.tokens.shape
        rows = max(1, self.max_batch_tokens // (ids.shape[1] + width))
        longest = max(len(tree.token) for tree in self.trees)
        users = max(1, self.max_batch_tokens // (ids.shape[1] + longest) if reads_trees else rows // num_items)
        parts = []
        for first in range(0, len(ids), users):
            prompt, mask = pad_left(ids[first : first + users], lengths[first : first + users])
            prompt, mask = prompt.to(device), mask.to(device)
            parts.append(
                self._by_tree(model, prompt, mask) if reads_trees else self._score_users(model, prompt, mask, rows)
            )
        return torch.cat(parts)

    def _by_tree(self, model: SplitModel, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores ``[b, I]`` for a batch of left-padded prompts ``[b, L]``."""
        cache = DynamicCache(config=model.model.config)
        end_bV = next_logits(model, cache, ids, mask).log_softmax(dim=-1)
        scores = [self._score_tree(model, cache, mask, end_bV, tree.to(ids.device)) for tree in self.trees]
        return torch.cat(scores, dim=1)[:, self._title_of_item.to(ids.device)]

    def _score_tree(
        self, model: SplitModel, cache: DynamicCache, mask: Tensor, end_bV: Tensor, tree: TitleTree
    ) -> Tensor:
        """Scores ``[b, m]`` of a tree's titles after each of ``b`` cached prompts, whose end predicts ``[b, V]``."""
        first_bmT = end_bV[:, tree.titles]  # what the prompt's end predicts
        if len(tree.token):
            sees = tree.sees(mask)
            logits_bnV = model.model(
                input_ids=tree.token.expand(len(mask), -1),
                attention_mask=sees if model.attention == "sdpa" else _as_bias(sees, end_bV),
                position_ids=mask.sum(dim=1, keepdim=True) + tree.depth,
                **model.cache_argument(cache),
                use_cache=True,
            ).logits
            cache.crop(-len(tree.token))
            # the logits of the tokens that are asked for, less the normaliser of the place
            normaliser_bn = logits_bnV.float().logsumexp(dim=-1)
            place = (tree.before - 1).clamp(min=0)
            later_bmT = logits_bnV[:, place, tree.titles].float() - normaliser_bn[:, place]
            first_bmT = torch.where(tree.before == 0, first_bmT, later_bmT)
        total_bm = first_bmT.masked_fill(~tree.inside, 0.0).sum(dim=2)
        return total_bm / tree.inside.sum(dim=1) if self.normalise == "mean" else total_bm

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
            **model.cache_argument(cache),
            use_cache=True,
        ).logits
        model.drop_cache(cache)
        later = logits.float().log_softmax(dim=-1).gather(2, inputs[:, 1:, None])[:, :, 0]
        first = first_logp[:, titles[:, 0]].reshape(-1, 1)
        logp = torch.cat([first, later], dim=1).masked_fill(~inside_all, 0.0).sum(dim=1)
        if self.normalise == "mean":
            logp = logp / inside_all.sum(dim=1)
        return logp.reshape(num_users, num_titles)


def _as_bias(sees: Tensor, like: Tensor) -> Tensor:
    """What is added to attention scores, for attention that is computed step by step."""
    return torch.zeros_like(sees, dtype=like.dtype).masked_fill(~sees, torch.finfo(like.dtype).min)
