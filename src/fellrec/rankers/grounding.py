"""Grounding: the model writes a title, and the items whose titles lie nearest to it come first (BIGRec)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fellrec.data.ragged import Ragged
from fellrec.data.text import TokenizedTexts, pad_left
from fellrec.functional.grounding import weighed_distances
from fellrec.models.objectives.generative import GenerativeObjective, check_writes
from fellrec.models.split import SplitModel
from fellrec.rankers.reference import REFERENCE_DECAY, MarkovRanker, PopularityRanker, ReferenceRanker
from fellrec.rankers.report import REPORTED, generation_figures, report_texts
from fellrec.rankers.settings import GroundingSettings


class GroundingRanker:
    """Negative L2 distance between the embedding of the generated text and that of every title, in float32.

    A text's embedding is the last layer's hidden state at its last token. With LoRA it is the frozen backbone's, the
    adapter switched off; with ``adapter=full`` there is no frozen backbone, and the trained model embeds both sides.

    The distances can be weighed by how often items occur, or how often they followed the user's last items, in
    training; see ``fellrec.functional.grounding.weighed_distances``.

    Args:
        objective: The objective that the model was trained with; it makes the prompts.
        settings: See `GroundingSettings`.
        train: Training sequences, one row per user, oldest first; for the weights.

    Attributes:
        gammas: The exponents, ascending.
        choices: The same if there are several to choose from, else nothing.
        reported: See ``fellrec.rankers.report``.
    """

    reported = REPORTED

    def __init__(
        self, objective: GenerativeObjective, settings: GroundingSettings, train: Ragged | None = None
    ) -> None:
        check_writes(objective, "grounding")
        self.objective = objective
        self.max_new_tokens = settings.max_new_tokens
        self.num_beams = settings.num_beams
        self.batch_size = settings.batch_size
        given = [settings.gamma] if isinstance(settings.gamma, int | float) else settings.gamma
        self.gammas = tuple(sorted({float(gamma) for gamma in given}))
        self.choices = self.gammas if settings.reweight != "none" and len(self.gammas) > 1 else ()
        self._prior = _prior(settings.reweight, train, len(objective.catalogue))
        self._titles = objective.learnt_titles()
        self._known = {*objective.catalogue.titles, *self._titles}
        self._titles_ID: Tensor | None = None
        self._report = torch.empty(0, len(REPORTED), dtype=torch.float64)

    @torch.no_grad()
    def refresh(self, model: SplitModel) -> None:
        """Embed all titles; a frozen backbone's embeddings are kept."""
        if self._titles_ID is None or not model.lora_layers():
            self._titles_ID = self.embed(model, self._titles)

    @torch.no_grad()
    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items for each history.

        Args:
            model: The backbone with a client's adapter in it.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            ``[B, I]`` float32, higher is better; with several ``choices`` ``[G, B, I]``.
        """
        assert self._titles_ID is not None, "refresh comes before scores"
        texts = self.generate(model, histories)
        self._report = report_texts(texts, self._known)
        vectors = self.embed(model, texts)
        distances = torch.cdist(vectors, self._titles_ID, compute_mode="donot_use_mm_for_euclid_dist")
        if self._prior is None:
            return -distances
        scores = -weighed_distances(distances, self._prior.scores(histories), self.gammas)
        return scores if self.choices else scores[0]

    def take_report(self) -> Tensor:
        """Of the texts that ``scores`` had written last, ``[B, 3]`` float64."""
        return self._report

    def figures(self, reported: Mapping[str, Tensor], choice: int) -> dict[str, float]:
        """Figures of the texts, see ``generation_figures``, and ``generation/gamma``, the exponent that was used."""
        figures = generation_figures(reported)
        return figures if self._prior is None else {**figures, "generation/gamma": self.gammas[choice]}

    @torch.no_grad()
    def generate(self, model: SplitModel, histories: Tensor) -> list[str]:
        """The titles that the model writes, one per history."""
        together = max(1, self.batch_size // self.num_beams)
        return [text for rows in histories.cpu().split(together) for text in self._generate(model, rows)]

    def _generate(self, model: SplitModel, histories: Tensor) -> list[str]:
        device = model.model.get_input_embeddings().weight.device
        ids, mask = pad_left(*self.objective.prompts(histories))
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


def _prior(reweight: str, train: Ragged | None, num_items: int) -> ReferenceRanker | None:
    """What says how likely items are without their titles; ``None`` for nothing."""
    if reweight == "none":
        return None
    assert train is not None, "the weights are counted in training"
    if reweight == "popularity":
        return PopularityRanker.fit(train, num_items)
    return MarkovRanker.fit(train, num_items, decay=REFERENCE_DECAY)


class _WithStart:
    """A tokenizer that puts one token before every text."""

    def __init__(self, tokenizer: object, start: int) -> None:
        self._tokenizer, self._start = tokenizer, start

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        encoded = self._tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]  # type: ignore[operator]
        return {"input_ids": [[self._start, *ids] for ids in encoded]}
