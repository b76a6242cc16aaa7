"""The retrieval family: the history's text is encoded and every item is scored by similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.data.schema import Catalogue
from fellrec.data.text import TokenizedTexts, compact, repeat_row
from fellrec.errors import BackboneError, ConfigError, unknown
from fellrec.models.split import SplitModel

ITEM_ENCODERS = ("tokens", "encoded")
SIMILARITIES = ("cosine", "dot")


class RetrievalObjective:
    """Cross-entropy over the whole catalogue of similarity / temperature, at every next-item position.

    The history is the text of its titles, oldest first, one title a line; the hidden state at the end of each line
    predicts the next item. Padding is on the right, so a causal model needs no mask.

    Args:
        tokenizer: Hugging Face tokenizer of the backbone.
        catalogue: The items.
        max_history: Longest history in items.
        temperature: Divides the similarity, METHOD §1.
        similarity: ``"cosine"``, or ``"dot"``: the vectors' lengths count too.
        history_fields: Catalogue fields written into the history.
        item_fields: Catalogue fields that an item vector is made from.
        item_encoder: ``"tokens"`` (mean of the text's token embeddings) or ``"encoded"`` (mean of the model's
            hidden states over the text; two towers, slower by a forward pass over the catalogue a step).
        max_title_tokens: Longest item text in tokens.

    Raises:
        ConfigError: For an unknown ``item_encoder`` or ``similarity``, or a temperature that is not positive.
    """

    one_target_per_row = False

    def __init__(
        self,
        tokenizer: Any,
        catalogue: Catalogue,
        max_history: int = 10,
        temperature: float = 0.05,
        similarity: str = "cosine",
        history_fields: Sequence[str] = ("title",),
        item_fields: Sequence[str] = ("title", "genre"),
        item_encoder: str = "tokens",
        max_title_tokens: int = 24,
    ) -> None:
        if item_encoder not in ITEM_ENCODERS:
            raise ConfigError(unknown("objective.item_encoder", item_encoder, ITEM_ENCODERS))
        if similarity not in SIMILARITIES:
            raise ConfigError(unknown("objective.similarity", similarity, SIMILARITIES))
        if not temperature > 0:
            raise ConfigError(f"objective.temperature={temperature} must be above 0")
        self.temperature = temperature
        self.similarity = similarity
        self.item_encoder = item_encoder
        self.prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        lines = [f"{text}\n" for text in catalogue.texts(history_fields)]
        self.history_text = TokenizedTexts(tokenizer, lines, max_title_tokens)
        self.item_text = TokenizedTexts(tokenizer, catalogue.texts(item_fields), max_title_tokens)
        self.max_tokens = int(self.history_text.lengths.max()) * max_history + len(self.prefix)

    def check(self, model: SplitModel) -> None:
        """Refuse a backbone whose context is too short for the longest possible history.

        Raises:
            BackboneError: With both numbers.
        """
        context = getattr(model.model.config, "max_position_embeddings", None)
        if context is not None and self.max_tokens > context:
            raise BackboneError(
                f"a history can have {self.max_tokens} tokens, the backbone's context is {context}; "
                "lower data.max_history or objective.max_title_tokens"
            )

    @property
    def facts(self) -> dict[str, str]:
        """Nothing: its texts are the catalogue's, and the rest is settings."""
        return {}

    def lengths(self, items: Tensor, is_target: Tensor) -> Tensor | None:
        """Batches are shuffled and no more: most windows are full, and there is little padding to save."""
        return None

    def collate(self, items: Tensor, is_target: Tensor) -> dict[str, Tensor]:
        """Turn training rows into a batch.

        Args:
            items: ``[B, W + 1]`` int64, padded with -1 on the right.
            is_target: ``[B, W + 1]`` bool.

        Returns:
            ``input_ids [B, L]`` and their ``lengths [B]``, the positions of the queries ``rows [T]`` and
            ``columns [T]``, and the items to be predicted ``targets [T]``.
        """
        history = items[:, :-1].masked_fill(items[:, 1:] < 0, -1)
        ids, ends = self._history_tokens(history)
        row, column = is_target[:, 1:].nonzero(as_tuple=True)
        lengths, columns = ends[:, -1] + 1, ends[row, column]
        return {
            "input_ids": ids,
            "lengths": lengths,
            "rows": row,
            "columns": columns,
            "targets": items[row, column + 1],
        }

    def _history_tokens(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, L]`` of histories ``[B, H]``, and where each title ends in them ``[B, H]``."""
        before, tokens = repeat_row(self.prefix, len(items)), self.history_text.of(items)
        ids, positions = compact(torch.cat([before[0], tokens[0]], dim=1), torch.cat([before[1], tokens[1]], dim=1))
        width = self.history_text.tokens.shape[1]
        return ids, positions[:, len(self.prefix) + width - 1 :: width]

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood over the batch's targets, and their number."""
        return self.loss_of(model, [model(ids) for ids in self.inputs(batch)], batch)

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Token ids that go through the whole model: the histories, and with two towers the items' texts."""
        if self.item_encoder == "tokens":
            return [batch["input_ids"]]
        return [batch["input_ids"], self.item_text.tokens.to(batch["input_ids"].device)]

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss for the final hidden states ``[B, L, D]`` of ``inputs``; only the embedding is used of the model."""
        query_TD = self._scaled(hidden[0][batch["rows"], batch["columns"]].float())
        vectors = self._mean_embeddings(model) if self.item_encoder == "tokens" else self._mean_hidden(hidden[1])
        logits_TI = (query_TD / self.temperature) @ self._scaled(vectors).T
        return F.cross_entropy(logits_TI, batch["targets"], reduction="sum"), len(batch["targets"])

    def item_vectors(self, model: SplitModel) -> Tensor:
        """Vectors of all items, ``[I, D]`` float32, differentiable; of length 1 with the cosine similarity."""
        if self.item_encoder == "tokens":
            return self._scaled(self._mean_embeddings(model))
        device = model.model.get_input_embeddings().weight.device
        return self._scaled(self._mean_hidden(model(self.item_text.tokens.to(device))))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def _mean_embeddings(self, model: SplitModel) -> Tensor:
        weight = model.model.get_input_embeddings().weight
        text = self.item_text
        flat = text.tokens[text.inside].to(weight.device)
        offsets = (text.lengths.cumsum(0) - text.lengths).to(weight.device)
        return F.embedding_bag(flat, weight.float(), offsets, mode="mean")

    def _mean_hidden(self, hidden_ILD: Tensor) -> Tensor:
        inside = self.item_text.inside.to(hidden_ILD.device)[:, :, None].float()
        return (hidden_ILD.float() * inside).sum(dim=1) / inside.sum(dim=1)

    def queries(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Query vectors for the next item after each history, ``[B, D]`` float32; see ``item_vectors``.

        Args:
            model: The backbone with a client's adapter in it.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right, at least one item a row.
        """
        ids, ends = self._history_tokens(histories.cpu())
        device = model.model.get_input_embeddings().weight.device
        hidden_BLD = model(ids.to(device))
        last = ends[:, -1].to(device)  # the end of the newest title: padding adds nothing
        return self._scaled(hidden_BLD[torch.arange(len(last), device=device), last].float())
