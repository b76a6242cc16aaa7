"""The retrieval objective: the text of the history is encoded, and items are scored by similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.data.schema import Catalogue
from fellrec.data.text import TokenizedTexts, compact, repeat_row
from fellrec.errors import BackboneError, ConfigError
from fellrec.models.objectives.direction import order_and_pooling
from fellrec.models.objectives.groups import RowGroups
from fellrec.models.objectives.item_table import ItemTable
from fellrec.models.objectives.kept_vectors import KeptItemVectors
from fellrec.models.objectives.softmax import CatalogueSoftmax
from fellrec.models.objectives.vocabulary import check_tokens
from fellrec.models.settings import RetrievalSettings
from fellrec.models.split import SplitModel
from fellrec.models.streams import LayerStreams

_ITEMS_TOGETHER = 256
"""Item texts per forward pass for vectors of all items."""


class RetrievalObjective:
    """Cross-entropy of similarity / temperature over the whole catalogue, at every next-item position (METHOD §1).

    The history is a text with one title per line. With ``oldest_first``, the hidden state at the end of each line
    predicts the next item, so that one pass of a causal model trains all positions of a row. With ``newest_first``
    (RecFormer), a history is not a prefix of the next one, so a row has one target. Padding is on the right, so a
    causal model needs no mask; for an encoder the token ids of padding are negative.

    For an encoder, whose attention is bidirectional, only ``newest_first`` is valid. Its texts start with its first
    special token ([CLS] or ``<s>``), and with two towers item texts are pooled like histories.

    Args:
        tokenizer: Hugging Face tokenizer of the backbone.
        catalogue: The items.
        max_history: Longest history in items.
        settings: Texts, similarity, item vectors and softmax.
        item_counts: See ``CatalogueSoftmax``.
        is_causal: Whether the backbone is causal; else it is a bidirectional encoder.

    Raises:
        ConfigError: If settings conflict with the backbone or the catalogue.
        BackboneError: If ``pooling`` is ``"first"`` and the tokenizer has no first special token.
    """

    def __init__(
        self,
        tokenizer: Any,
        catalogue: Catalogue,
        max_history: int,
        settings: RetrievalSettings,
        item_counts: Sequence[int] | None = None,
        is_causal: bool = True,
    ) -> None:
        order, pooling = order_and_pooling(is_causal, settings.order, settings.pooling)
        self.tokenizer = tokenizer
        self.temperature = settings.temperature
        self.similarity = settings.similarity
        self.item_encoder = settings.item_encoder
        self.pooling = pooling
        self.is_causal = is_causal
        self.one_target_per_row = order == "newest_first"
        self.softmax = CatalogueSoftmax(len(catalogue), settings, item_counts)
        self.table = ItemTable(settings.refresh_items, settings.freeze_items_after)
        self._kept = KeptItemVectors()
        first = tokenizer.bos_token_id if is_causal or tokenizer.cls_token_id is None else tokenizer.cls_token_id
        if first is None and pooling == "first":
            raise BackboneError("objective.pooling=first needs a tokenizer with a [CLS] or BOS token; use mean")
        self.prefix = [] if first is None else [first]
        lines = [f"{line}\n" for line in catalogue.texts(settings.history_fields, settings.text)]
        self.history_text = TokenizedTexts(tokenizer, lines, settings.max_title_tokens)
        items = catalogue.texts(settings.item_fields, settings.text)
        before, max_title_tokens = self.prefix if self._pools_items else [], settings.max_title_tokens
        self.item_text = TokenizedTexts(tokenizer, items, max_title_tokens, prefix=before)
        self._all_texts = self._texts(torch.arange(len(catalogue)))
        self.max_tokens = int(self.history_text.lengths.max()) * max_history + len(self.prefix)

    def check(self, model: SplitModel) -> None:
        """Check that the backbone fits the objective.

        Raises:
            BackboneError: If the longest possible history exceeds the backbone's context, or a token has no embedding.
            ConfigError: If item vectors are cached and the body runs in another process.
        """
        if self.table.is_used and model.is_cut:
            raise ConfigError(
                f"objective.refresh_items={self.table.refresh}, objective.freeze_items_after={self.table.freeze_after} "
                "need split.transport=none: cached item vectors are computed without the server"
            )
        texts = torch.tensor(self.prefix, dtype=torch.long), self.history_text.tokens, self.item_text.tokens
        check_tokens(self.tokenizer, texts, model.num_embeddings)
        context = model.context
        if context is not None and self.max_tokens > context:
            raise BackboneError(
                f"a history can have {self.max_tokens} tokens, but the backbone's context is {context}; "
                "lower data.max_history or objective.max_title_tokens"
            )

    @property
    def _pools_items(self) -> bool:
        """Whether item texts are pooled like histories."""
        return self.item_encoder == "encoded" and not self.is_causal

    @property
    def metadata(self) -> dict[str, str]:
        """Empty: the texts are determined by the catalogue and the settings."""
        return {}

    def lengths(self, items: Tensor, is_target: Tensor) -> Tensor | None:
        """``None``: which rows are trained in one optimiser step does not depend on their lengths."""
        return None

    def history_lengths(self, histories: Tensor) -> Tensor:
        """Number of tokens ``[B]`` of the text of each history ``[B, H]``."""
        return self.history_text.lengths_of(histories) + len(self.prefix)

    def collate(self, items: Tensor, is_target: Tensor) -> dict[str, Tensor]:
        """Turn training rows into a batch.

        Args:
            items: ``[B, W + 1]`` int64, padded with -1 on the right.
            is_target: ``[B, W + 1]`` bool.

        Returns:
            ``input_ids [B, L]``, padded as in ``SplitModel.head``, and their ``lengths [B]``; the positions of the
            queries, ``rows [T]`` and ``columns [T]``; and the target items ``targets [T]``.
        """
        row, column = is_target[:, 1:].nonzero(as_tuple=True)
        history = items[:, :-1].masked_fill(items[:, 1:] < 0, -1)
        assert not self.one_target_per_row or len(row) == len(items), "with newest_first a row has one target"
        place = torch.arange(history.shape[1])
        last = torch.where(is_target[:, 1:], place, -1).amax(dim=1, keepdim=True)
        history = history.masked_fill(place > last, -1)  # what follows a row's last target predicts nothing
        ids, ends = self._history_tokens(history)
        lengths, columns = ends[:, -1] + 1, ends[row, -1 if self.one_target_per_row else column]
        return {
            "input_ids": ids,
            "lengths": lengths,
            "rows": row,
            "columns": columns,
            "targets": items[row, column + 1],
        }

    def _history_tokens(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, L]`` of histories ``[B, H]``, and the last position of each title in them ``[B, H]``."""
        items = items.flip(1) if self.one_target_per_row else items  # padding (-1) is removed below
        before, tokens = repeat_row(self.prefix, len(items)), self.history_text.of(items)
        ids, positions = compact(torch.cat([before[0], tokens[0]], dim=1), torch.cat([before[1], tokens[1]], dim=1))
        width = self.history_text.tokens.shape[1]
        ids = self._mark_padding(ids, torch.arange(ids.shape[1]) <= positions[:, -1:])
        return ids, positions[:, len(self.prefix) + width - 1 :: width]

    def _mark_padding(self, ids: Tensor, inside: Tensor) -> Tensor:
        """Set the token ids of padding to -1 for an encoder."""
        return ids if self.is_causal else ids.masked_fill(~inside, -1)

    def prepare_step(self, model: SplitModel, round_index: int, step: int) -> None:
        """Refresh the item table before optimiser step ``step`` of a client's round; both count from 0."""
        self.table.prepare(model, round_index, step, self.kept_item_vectors)

    def draw(self, batch: dict[str, Tensor], streams: LayerStreams) -> dict[str, Tensor]:
        """Add the sample of items to a batch, see ``CatalogueSoftmax.draw``, with the texts of these items."""
        sample = self.softmax.draw(batch["targets"], streams)
        return {**batch, **sample, **self._texts(sample["items"])} if sample else batch

    def _texts(self, items_N: Tensor) -> dict[str, Tensor]:
        """Inputs of the item vectors, on the device of the items.

        Returns:
            ``item_tokens``, all texts concatenated, and the start of each, ``item_offsets [N]``; with two towers
            ``item_ids [N, L]``, the model's input, and ``item_inside [N, L]``, true for tokens.
        """
        text, index = self.item_text, items_N.cpu()
        tokens, inside, lengths = text.tokens[index], text.inside[index], text.lengths[index]
        if self.item_encoder == "tokens":
            texts = {"item_tokens": tokens[inside], "item_offsets": lengths.cumsum(0) - lengths}
        else:
            texts = {"item_ids": self._mark_padding(tokens, inside), "item_inside": inside}
        return {name: tensor.to(items_N.device) for name, tensor in texts.items()}

    def _texts_for(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Texts of the items in the batch's sample, or of all items without a sample."""
        if "items" in batch:
            return batch
        return {name: tensor.to(batch["input_ids"].device) for name, tensor in self._all_texts.items()}

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Token ids of all forward passes: the histories, in groups of similar length, and with two towers the item
        texts, unless cached.
        """
        histories = RowGroups(batch["lengths"]).inputs(batch["input_ids"])
        if self.item_encoder == "tokens" or self.table.is_always_used:
            return histories
        return [*histories, self._texts_for(batch)["item_ids"]]

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood over the batch's targets, and their number."""
        batch = self.draw(batch, model.streams)
        inputs = self.inputs(batch)
        if self.table.vectors(model) is not None:
            inputs = inputs[: len(RowGroups(batch["lengths"]))]
        elif self.table.is_always_used:  # the table exists in federated rounds only
            inputs.append(self._texts_for(batch)["item_ids"])
        return self.loss_of(model, model.encode(inputs), batch)

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss from the final hidden states ``[B, L, D]`` of ``inputs``; uses only the model's embedding."""
        texts = hidden[len(RowGroups(batch["lengths"])) :]
        query_TD = self.queries_of(hidden, batch)
        kept_ID = self.table.vectors(model)
        if kept_ID is not None:
            items_ND = kept_ID[batch["items"]] if "items" in batch else kept_ID
        elif self.item_encoder == "tokens":
            items_ND = self._scaled(_mean_embeddings(model, self._texts_for(batch)))
        else:
            items_ND = self._scaled(self._item_vectors(texts[0], self._texts_for(batch)["item_inside"]))
        total = self.softmax.loss(query_TD / self.temperature, items_ND, batch["targets"], batch)
        return total, len(batch["targets"])

    def queries_of(self, hidden: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Query vectors of a batch's targets ``[T, D]`` from the final hidden states ``[B, L, D]`` of ``inputs``."""
        groups = RowGroups(batch["lengths"])
        return self._scaled(groups.at(hidden[: len(groups)], batch["rows"], batch["columns"], self._pool))

    def item_vectors(self, model: SplitModel) -> Tensor:
        """Vectors of all items, ``[I, D]`` float32, differentiable; normalised with the cosine similarity."""
        device = model.model.get_input_embeddings().weight.device
        texts = {name: tensor.to(device) for name, tensor in self._all_texts.items()}
        if self.item_encoder == "tokens":
            return self._scaled(_mean_embeddings(model, texts))
        lengths, vectors = self.item_text.lengths, []
        by_length = lengths.argsort(descending=True, stable=True)
        for rows in by_length.split(self.softmax.chunk_items or _ITEMS_TOGETHER):
            kept = rows.to(device), slice(int(lengths[rows].max()))
            vectors.append(self._item_vectors(model(texts["item_ids"][kept]), texts["item_inside"][kept]))
        return self._scaled(torch.cat(vectors)[by_length.argsort().to(device)])

    def kept_item_vectors(self, model: SplitModel) -> Tensor:
        """`item_vectors` without gradients, computed once for each state of the weights; see ``KeptItemVectors``."""
        if self.item_encoder == "tokens" or model.is_cut:  # cheap, or the body's weights are not known here
            return self.item_vectors(model)
        return self._kept.of(model, lambda: self.item_vectors(model))

    def _pool(self, hidden_BLD: Tensor, rows_T: Tensor, columns_T: Tensor) -> Tensor:
        """Vectors ``[T, D]`` of the histories that end at the given positions; later tokens are not used."""
        if self.pooling != "mean":
            return hidden_BLD[rows_T, columns_T if self.pooling == "last" else 0].float()
        return hidden_BLD.float().cumsum(dim=1)[rows_T, columns_T] / (columns_T + 1)[:, None]

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def _item_vectors(self, hidden_ILD: Tensor, inside_IL: Tensor) -> Tensor:
        is_first = self._pools_items and self.pooling == "first"
        return hidden_ILD[:, 0].float() if is_first else _mean(hidden_ILD, inside_IL)

    def queries(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Query vectors for the next item after each history, ``[B, D]`` float32; see ``item_vectors``.

        Args:
            model: The backbone with a client's adapter in it.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right, at least one item per row.
        """
        ids, ends = self._history_tokens(histories.cpu())
        device = model.model.get_input_embeddings().weight.device
        ids, last = ids.to(device), ends[:, -1].to(device)
        rows = torch.arange(len(last), device=device)
        if model.is_cut:  # one message for each batch
            return self._scaled(self._pool(model(ids), rows, last))
        groups = RowGroups(last + 1)
        return self._scaled(groups.at([model(some) for some in groups.inputs(ids)], rows, last, self._pool))


def _mean_embeddings(model: SplitModel, texts: dict[str, Tensor]) -> Tensor:
    weight = model.model.get_input_embeddings().weight
    return F.embedding_bag(texts["item_tokens"], weight.float(), texts["item_offsets"], mode="mean")


def _mean(hidden_BLD: Tensor, inside_BL: Tensor) -> Tensor:
    inside = inside_BL.to(hidden_BLD.device)[:, :, None].float()
    return (hidden_BLD.float() * inside).sum(dim=1) / inside.sum(dim=1)
