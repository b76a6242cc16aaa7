"""Grounding (BIGRec): the model generates a title, and items are ranked by the distance of their titles to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fellrec.data.ragged import Ragged
from fellrec.data.text import TokenizedTexts, pad_left
from fellrec.functional.grounding import weighted_distances
from fellrec.models.objectives.generative import GenerativeObjective, check_generative
from fellrec.models.split import SplitModel
from fellrec.rankers.reference import REFERENCE_DECAY, MarkovRanker, PopularityRanker, ReferenceRanker
from fellrec.rankers.report import REPORTED, generation_figures, report_texts
from fellrec.rankers.settings import GroundingSettings


class GroundingRanker:
    """Negative L2 distance between the embedding of the generated text and that of every title, in float32.

    The embedding of a text is the last hidden state at its last token, computed by the frozen backbone. With
    ``adapter=full`` there is no frozen backbone, and the trained model computes it.

    Distances can be weighted by the items' popularity in training, or by their number of transitions from the user's
    last items; see ``fellrec.functional.grounding.weighted_distances``.

    Args:
        objective: The objective of the training, for its prompts.
        settings: See `GroundingSettings`.
        train: Training sequences, one row per user, oldest first; for the weights.

    Attributes:
        gammas: The exponents, ascending.
        choices: The exponents to select from; empty if there is only one, or no weight.
        reported: See ``fellrec.rankers.report``.
    """

    reported = REPORTED

    def __init__(
        self, objective: GenerativeObjective, settings: GroundingSettings, train: Ragged | None = None
    ) -> None:
        check_generative(objective, "grounding")
        self.objective = objective
        self.max_new_tokens = settings.max_new_tokens
        self.num_beams = settings.num_beams
        self.batch_size = settings.batch_size
        given = [settings.gamma] if isinstance(settings.gamma, int | float) else settings.gamma
        self.gammas = tuple(sorted({float(gamma) for gamma in given}))
        self.choices = self.gammas if settings.reweight != "none" and len(self.gammas) > 1 else ()
        self._prior = _prior(settings.reweight, train, len(objective.catalogue))
        self._titles = objective.decoded_titles()
        self._known = {*objective.catalogue.titles, *self._titles}
        self._titles_ID: Tensor | None = None
        self._report = torch.empty(0, len(REPORTED), dtype=torch.float64)

    @torch.no_grad()
    def refresh(self, model: SplitModel) -> None:
        """Embed all titles; only once if the backbone is frozen."""
        if self._titles_ID is None or not model.lora_layers():
            self._titles_ID = self.embed(model, self._titles)

    @torch.no_grad()
    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items for each history.

        Args:
            model: The backbone with a client's adapter.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            ``[B, I]`` float32, higher is better; with several ``choices`` ``[G, B, I]``.
        """
        assert self._titles_ID is not None, "call refresh before scores"
        texts = self.generate(model, histories)
        self._report = report_texts(texts, self._known)
        vectors = self.embed(model, texts)
        distances = torch.cdist(vectors, self._titles_ID, compute_mode="donot_use_mm_for_euclid_dist")
        if self._prior is None:
            return -distances
        scores = -weighted_distances(distances, self._prior.scores(histories), self.gammas)
        return scores if self.choices else scores[0]

    def take_report(self) -> Tensor:
        """Report of the texts of the last ``scores``, ``[B, 3]`` float64, columns as in ``reported``."""
        return self._report

    def figures(self, reported: Mapping[str, Tensor], choice: int) -> dict[str, float]:
        """Metrics of the texts, see ``generation_figures``, and the exponent ``generation/gamma``."""
        figures = generation_figures(reported)
        return figures if self._prior is None else {**figures, "generation/gamma": self.gammas[choice]}

    @torch.no_grad()
    def generate(self, model: SplitModel, histories: Tensor) -> list[str]:
        """Generate one title per history."""
        num_rows = max(1, self.batch_size // self.num_beams)
        return [text for rows in histories.cpu().split(num_rows) for text in self._generate(model, rows)]

    def _generate(self, model: SplitModel, histories: Tensor) -> list[str]:
        device = model.model.get_input_embeddings().weight.device
        ids, mask = pad_left(*self.objective.prompts(histories))
        tokenizer, cache = self.objective.tokenizer, model.new_cache()
        written = model.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            **model.cache_argument(cache),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model.drop_cache(cache)
        texts: list[str] = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def embed(self, model: SplitModel, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[n, D]`` float32; an empty text has only the BOS token."""
        tokenizer = self.objective.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        tokens = TokenizedTexts(tokenizer, texts, self.max_new_tokens + 7, prefix=[start], allow_empty=True)
        device = model.model.get_input_embeddings().weight.device
        by_length, parts = tokens.lengths.argsort(descending=True, stable=True), []
        with model.without_lora():
            for rows in by_length.split(self.batch_size):
                lengths = tokens.lengths[rows].to(device)
                hidden_BLD = model(tokens.tokens[rows, : int(lengths.max())].to(device))
                parts.append(hidden_BLD[torch.arange(len(rows), device=device), lengths - 1].float())
        return torch.cat(parts)[by_length.argsort().to(device)]


def _prior(reweight: str, train: Ragged | None, num_items: int) -> ReferenceRanker | None:
    """The ranker whose scores weight the distances; ``None`` for no weights."""
    if reweight == "none":
        return None
    assert train is not None, "weights need the training sequences"
    if reweight == "popularity":
        return PopularityRanker.fit(train, num_items)
    return MarkovRanker.fit(train, num_items, decay=REFERENCE_DECAY)
