"""Grounding: the model writes a title, and the items whose titles lie nearest to it come first (BIGRec)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fellrec.data.text import TokenizedTexts, pad_left
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.split import SplitModel


class GroundingRanker:
    """Negative L2 distance between the embedding of the generated text and that of every title, in float32.

    A text's embedding is the last layer's hidden state at its last token. With LoRA it is the frozen backbone's, the
    adapter switched off; with ``adapter=full`` there is no frozen backbone, and the trained model embeds both sides.

    Args:
        objective: The objective that the model was trained with; it makes the prompts.
        max_new_tokens: Longest generated title.
        num_beams: 1 is greedy.
        batch_size: Texts that are embedded at once.

    Attributes:
        statistics: Counts since the last ``refresh``: ``generated``, ``empty``, ``in_catalogue``.
    """

    def __init__(
        self, objective: GenerativeObjective, max_new_tokens: int = 32, num_beams: int = 1, batch_size: int = 256
    ) -> None:
        self.objective = objective
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.batch_size = batch_size
        self.statistics: dict[str, int] = {}
        self._known = set(objective.catalogue.titles)
        self._titles_ID: Tensor | None = None

    @torch.no_grad()
    def refresh(self, model: SplitModel) -> None:
        """Embed all titles; a frozen backbone's embeddings are kept."""
        self.statistics = {"generated": 0, "empty": 0, "in_catalogue": 0}
        if self._titles_ID is None or not model.lora_layers():
            self._titles_ID = self.embed(model, self.objective.catalogue.titles)

    @torch.no_grad()
    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items for each history.

        Args:
            model: The backbone with a client's adapter in it.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            ``[B, I]`` float32, higher is better.
        """
        assert self._titles_ID is not None, "refresh comes before scores"
        texts = self.generate(model, histories)
        self.statistics["generated"] += len(texts)
        self.statistics["empty"] += sum(not text for text in texts)
        self.statistics["in_catalogue"] += sum(text in self._known for text in texts)
        return -torch.cdist(self.embed(model, texts), self._titles_ID, compute_mode="donot_use_mm_for_euclid_dist")

    @torch.no_grad()
    def generate(self, model: SplitModel, histories: Tensor) -> list[str]:
        """The titles that the model writes, one per history."""
        device = model.model.get_input_embeddings().weight.device
        ids, lengths = self.objective.prompts(histories.cpu())
        ids, mask = pad_left(ids, lengths)
        tokenizer, cache = self.objective.tokenizer, model.new_cache()
        written = model.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            past_key_values=cache,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model.drop_cache(cache)
        texts: list[str] = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def embed(self, model: SplitModel, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[n, D]`` float32; an empty text is embedded as the beginning-of-text token alone."""
        tokenizer = self.objective.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        encoded = _WithStart(tokenizer, start)
        tokens = TokenizedTexts(encoded, texts, self.max_new_tokens + 8)
        device = model.model.get_input_embeddings().weight.device
        parts = []
        with model.without_lora():
            for first in range(0, len(texts), self.batch_size):
                rows = slice(first, first + self.batch_size)
                hidden_BLD = model(tokens.tokens[rows].to(device))
                last = tokens.lengths[rows].to(device) - 1
                parts.append(hidden_BLD[torch.arange(len(last), device=device), last].float())
        return torch.cat(parts)


class _WithStart:
    """A tokenizer that puts one token before every text."""

    def __init__(self, tokenizer: object, start: int) -> None:
        self._tokenizer, self._start = tokenizer, start

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        encoded = self._tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]  # type: ignore[operator]
        return {"input_ids": [[self._start, *ids] for ids in encoded]}
