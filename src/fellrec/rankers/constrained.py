"""Constrained decoding: beam search that generates only titles of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fellrec.data.text import pad_left
from fellrec.errors import ConfigError
from fellrec.functional.trie import Trie, build_trie, is_among_best
from fellrec.models.objectives.generative import GenerativeObjective, check_generative
from fellrec.models.split import SplitModel
from fellrec.rankers.likelihood import next_logits
from fellrec.rankers.report import REPORTED, generation_figures, report_texts


@dataclass(frozen=True)
class SearchResult:
    """Result of a beam search for b users.

    Attributes:
        logp: ``[b, E]`` float32 log-likelihood of each distinct title with its end token; -inf if it was not reached.
        bound: ``[b]`` float32 upper bound on the log-likelihood of the titles that were not reached; -inf if all were.
    """

    logp: Tensor
    bound: Tensor


class ConstrainedRanker:
    """Log-likelihood of the titles that a beam search over the trie of all titles reaches.

    A complete title is removed from the beam. With ``objective.softmax=catalogue`` a prefix counts as complete as soon
    as only one title can follow, because the remaining tokens have probability 1. Titles that are not reached have the
    same score, below all others, and are therefore tied. Items with the same title, also after truncation to
    ``objective.max_title_tokens``, have the same score.

    With at least as many beams as titles, the search is exhaustive and the ranking is that by log-likelihood. With
    fewer beams, the likelihood of a pruned prefix bounds that of its titles. The titles above all bounds have the same
    rank as in the exhaustive ranking; their number is reported.

    Args:
        objective: The objective of the training, for its prompts.
        num_beams: Number of prefixes per user in the beam.
        max_batch_tokens: Maximum number of tokens, over all beams, in one forward pass.

    Attributes:
        reported: Columns of ``fellrec.rankers.report``; whether the search was exhaustive; number of first titles with
            certain ranks.

    Raises:
        ConfigError: If ``num_beams`` or ``max_batch_tokens`` is below 1.
    """

    reported = (*REPORTED, "is_exhaustive", "num_certain")
    choices: tuple[float, ...] = ()

    def __init__(self, objective: GenerativeObjective, num_beams: int = 20, max_batch_tokens: int = 65536) -> None:
        check_generative(objective, "constrained")
        for name, value in (("num_beams", num_beams), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise ConfigError(f"ranker.{name}={value} must be an integer of at least 1")
        self.objective = objective
        self.max_batch_tokens = max_batch_tokens
        self.trie = build_trie(objective.titles.tokens, objective.titles.inside)
        self.num_beams = min(num_beams, self.trie.num_ends)
        self._title_of_end = dict(zip(self.trie.end_of_row.tolist(), objective.decoded_titles()))
        self._report = torch.empty(0, len(self.reported), dtype=torch.float64)

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
        self.trie = self.trie.to(device)
        ids, lengths = self.objective.prompts(histories.cpu())
        width = ids.shape[1] + self.objective.titles.tokens.shape[1]
        users = max(1, self.max_batch_tokens // (self.num_beams * width))
        found = []
        for first in range(0, len(ids), users):
            prompt, mask = pad_left(ids[first : first + users], lengths[first : first + users])
            found.append(self._search(model, self.trie, prompt.to(device), mask.to(device)))
        logp_BE = torch.cat([part.logp for part in found])
        self._report = self._report_of(logp_BE, torch.cat([part.bound for part in found]))
        is_reached = logp_BE > -torch.inf
        below_all = logp_BE.masked_fill(~is_reached, torch.inf).amin(dim=1, keepdim=True) - 1
        return torch.where(is_reached, logp_BE, below_all)[:, self.trie.end_of_row]

    def take_report(self) -> Tensor:
        """Report of the last ``scores``, ``[B, 5]`` float64, columns as in ``reported``."""
        return self._report

    def figures(self, reported: Mapping[str, Tensor], choice: int) -> dict[str, float]:
        """Metrics of each user's most likely title, and of the searches.

        Returns:
            The metrics of ``generation_figures``; ``generation/exhaustive_rate``, fraction of users with an exhaustive
            search; ``generation/certain_titles``, mean number of first titles with certain ranks.
        """
        return {
            **generation_figures(reported),
            "generation/exhaustive_rate": float(reported["is_exhaustive"].mean()),
            "generation/certain_titles": float(reported["num_certain"].mean()),
        }

    def _report_of(self, logp: Tensor, bound: Tensor) -> Tensor:
        texts = [self._title_of_end[end] for end in logp.argmax(dim=1).tolist()]
        is_exhaustive = bound == -torch.inf
        num_certain = (logp > bound[:, None]).sum(dim=1)
        searches = torch.stack([is_exhaustive.double(), num_certain.double()], dim=1)
        return torch.cat([report_texts(texts, set(texts)), searches.cpu()], dim=1)

    def _search(self, model: SplitModel, trie: Trie, ids: Tensor, mask: Tensor) -> SearchResult:
        """Search for left-padded prompts ``[b, L]``; all users' beams form one batch, grouped by user."""
        logp_bE = torch.full((len(ids), trie.num_ends), -torch.inf, device=ids.device)
        bound = torch.full((len(ids),), -torch.inf, device=ids.device)
        user = torch.arange(len(ids), device=ids.device)
        node, logp = torch.zeros_like(user), torch.zeros_like(bound)
        cache, tokens = model.new_cache(), ids
        title_of_node = self.objective.titles_of_nodes(trie)
        while len(node):
            next_nV = next_logits(model, cache, tokens, mask)
            parent, child = trie.children(node)
            extended, owner = logp[parent] + self.objective.continuations(trie, node, next_nV), user[parent]
            ends = title_of_node[child]
            is_end = ends >= 0
            logp_bE[owner[is_end], ends[is_end]] = extended[is_end]
            open_ = is_end.logical_not().nonzero()[:, 0]
            kept = is_among_best(extended[open_], owner[open_], self.num_beams)
            left_out, open_ = open_[~kept], open_[kept]
            bound = bound.scatter_reduce(0, owner[left_out], extended[left_out], "amax")
            user, node, logp, parent = owner[open_], child[open_], extended[open_], parent[open_]
            tokens = trie.token[node][:, None]
            mask = torch.cat([mask[parent], torch.ones_like(tokens)], dim=1)
            if len(node):
                cache.reorder_cache(parent)  # type: ignore[arg-type]
        model.drop_cache(cache)
        return SearchResult(logp_bE, bound)
