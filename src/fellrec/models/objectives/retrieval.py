"""The retrieval family: the history's text is encoded and every item is scored by similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.data.schema import Catalogue
from fellrec.data.text import TokenizedTexts, compact, repeat_row
from fellrec.errors import BackboneError, ConfigError
from fellrec.models.objectives.direction import reading
from fellrec.models.objectives.item_table import ItemTable
from fellrec.models.objectives.softmax import CatalogueSoftmax
from fellrec.models.settings import RetrievalSettings
from fellrec.models.split import SplitModel
from fellrec.models.streams import LayerStreams


class RetrievalObjective:
    """Cross-entropy over the whole catalogue of similarity / temperature, at every next-item position.

    The history is the text of its titles, one title a line. Oldest first, the hidden state at the end of each line
    predicts the next item, and one pass of a causal model trains all positions of a row. Newest first (RecFormer), the
    text of a history is no beginning of the next one's: a row has one target, which is read at the end of the text.
    Padding is on the right, so a causal model needs no mask; for an encoder its token ids are negative.

    An encoder sees both directions, so newest first is the only order that hides the target from it. Its texts begin
    with its first token ([CLS] or ``<s>``), and with two towers an item's text is read as a history's is.

    Args:
        tokenizer: Hugging Face tokenizer of the backbone.
        catalogue: The items.
        max_history: Longest history in items.
        settings: How the texts are written and read, and what a target is told from.
        item_counts: See ``CatalogueSoftmax``.
        is_causal: Whether the backbone is; else it is a bidirectional encoder.

    Raises:
        ConfigError: If settings do not fit the backbone or the catalogue.
        BackboneError: If an encoder's first token is to be read, and its tokenizer has none.
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
        order, pooling = reading(is_causal, settings.order, settings.pooling)
        self.temperature = settings.temperature
        self.similarity = settings.similarity
        self.item_encoder = settings.item_encoder
        self.pooling = pooling
        self.is_causal = is_causal
        self.one_target_per_row = order == "newest_first"
        self.softmax = CatalogueSoftmax(len(catalogue), settings, item_counts)
        self.table = ItemTable(settings.refresh_items, settings.freeze_items_after)
        first = tokenizer.bos_token_id if is_causal or tokenizer.cls_token_id is None else tokenizer.cls_token_id
        if first is None and pooling == "first":
            raise BackboneError("objective.pooling=first needs a tokenizer with a [CLS] or beginning token; give mean")
        self.prefix = [] if first is None else [first]
        lines = [f"{line}\n" for line in catalogue.texts(settings.history_fields, settings.text)]
        self.history_text = TokenizedTexts(tokenizer, lines, settings.max_title_tokens)
        items = catalogue.texts(settings.item_fields, settings.text)
        before, max_title_tokens = self.prefix if self._pools_items else [], settings.max_title_tokens
        self.item_text = TokenizedTexts(tokenizer, items, max_title_tokens, prefix=before)
        self._all_texts = self._texts(torch.arange(len(catalogue)))
        self.max_tokens = int(self.history_text.lengths.max()) * max_history + len(self.prefix)

    def check(self, model: SplitModel) -> None:
        """Refuse a backbone whose context is too short for the longest possible history, or whose cut is executed.

        Raises:
            BackboneError: With both numbers.
            ConfigError: If item vectors are kept, which is only possible in one process.
        """
        if self.table.is_used and model.is_cut:
            raise ConfigError(
                f"objective.refresh_items={self.table.refresh}, objective.freeze_items_after={self.table.freeze_after} "
                "need split.transport=none: item vectors that are kept are made without the server"
            )
        context = model.context
        if context is not None and self.max_tokens > context:
            raise BackboneError(
                f"a history can have {self.max_tokens} tokens, the backbone's context is {context}; "
                "lower data.max_history or objective.max_title_tokens"
            )

    @property
    def _pools_items(self) -> bool:
        """Whether items' texts are read as histories are."""
        return self.item_encoder == "encoded" and not self.is_causal

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
            ``input_ids [B, L]``, padded as ``SplitModel.head`` says, and their ``lengths [B]``, the positions of the
            queries ``rows [T]`` and ``columns [T]``, and the items to be predicted ``targets [T]``.
        """
        row, column = is_target[:, 1:].nonzero(as_tuple=True)
        history = items[:, :-1].masked_fill(items[:, 1:] < 0, -1)
        if self.one_target_per_row:
            assert len(row) == len(items), "newest first, a row has one target"
            history = history.masked_fill(torch.arange(history.shape[1]) > column[:, None], -1)
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
        """Token ids ``[B, L]`` of histories ``[B, H]``, and where each title ends in them ``[B, H]``, as written."""
        items = items.flip(1) if self.one_target_per_row else items  # what is no item is left out, wherever it is
        before, tokens = repeat_row(self.prefix, len(items)), self.history_text.of(items)
        ids, positions = compact(torch.cat([before[0], tokens[0]], dim=1), torch.cat([before[1], tokens[1]], dim=1))
        width = self.history_text.tokens.shape[1]
        ids = self._marked(ids, torch.arange(ids.shape[1]) <= positions[:, -1:])
        return ids, positions[:, len(self.prefix) + width - 1 :: width]

    def _marked(self, ids: Tensor, inside: Tensor) -> Tensor:
        """Token ids that an encoder knows padding by."""
        return ids if self.is_causal else ids.masked_fill(~inside, -1)

    def prepare_step(self, model: SplitModel, round_index: int, step: int) -> None:
        """Called before a client's optimiser step ``step`` of a round (both from 0): item vectors that are kept."""
        self.table.prepare(model, round_index, step, self.item_vectors)

    def draw(self, batch: dict[str, Tensor], streams: LayerStreams) -> dict[str, Tensor]:
        """The batch with its sample of items, see ``CatalogueSoftmax.draw``, and these items' texts."""
        sample = self.softmax.draw(batch["targets"], streams)
        return {**batch, **sample, **self._texts(sample["items"])} if sample else batch

    def _texts(self, items_N: Tensor) -> dict[str, Tensor]:
        """What the items' vectors are made from, on the items' device.

        Returns:
            ``item_tokens``, one text after the other, and where each begins, ``item_offsets [N]``; with two towers
            ``item_ids [N, L]`` as the model takes them, and ``item_inside [N, L]``, true for tokens.
        """
        text, places = self.item_text, items_N.cpu()
        tokens, inside, lengths = text.tokens[places], text.inside[places], text.lengths[places]
        if self.item_encoder == "tokens":
            made = {"item_tokens": tokens[inside], "item_offsets": lengths.cumsum(0) - lengths}
        else:
            made = {"item_ids": self._marked(tokens, inside), "item_inside": inside}
        return {name: tensor.to(items_N.device) for name, tensor in made.items()}

    def _texts_for(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The texts of the items that were drawn for a batch; of all, if none were."""
        if "items" in batch:
            return batch
        return {name: tensor.to(batch["input_ids"].device) for name, tensor in self._all_texts.items()}

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Token ids that go through the whole model: the histories, and with two towers the items' texts.

        In every step, that is: not those of item vectors that are kept in all rounds.
        """
        if self.item_encoder == "tokens" or self.table.is_always_used:
            return [batch["input_ids"]]
        return [batch["input_ids"], self._texts_for(batch)["item_ids"]]

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood over the batch's targets, and their number."""
        batch = self.draw(batch, model.streams)
        inputs = self.inputs(batch)
        if self.table.vectors(model) is not None:
            inputs = inputs[:1]
        elif self.table.is_always_used:  # outside of rounds, as Lightning's trainer is, nothing was kept
            inputs.append(self._texts_for(batch)["item_ids"])
        return self.loss_of(model, [model(ids) for ids in inputs], batch)

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss for the final hidden states ``[B, L, D]`` of ``inputs``; only the embedding is used of the model."""
        query_TD = self._scaled(self._read(hidden[0], batch["rows"], batch["columns"]))
        kept_ID = self.table.vectors(model)
        if kept_ID is not None:
            items_ND = kept_ID[batch["items"]] if "items" in batch else kept_ID
        elif self.item_encoder == "tokens":
            items_ND = self._scaled(_mean_embeddings(model, self._texts_for(batch)))
        else:
            items_ND = self._scaled(self._item_vectors(hidden[1], self._texts_for(batch)["item_inside"]))
        total = self.softmax.loss(query_TD / self.temperature, items_ND, batch["targets"], batch)
        return total, len(batch["targets"])

    def item_vectors(self, model: SplitModel) -> Tensor:
        """Vectors of all items, ``[I, D]`` float32, differentiable; of length 1 with the cosine similarity."""
        device = model.model.get_input_embeddings().weight.device
        texts = {name: tensor.to(device) for name, tensor in self._all_texts.items()}
        if self.item_encoder == "tokens":
            return self._scaled(_mean_embeddings(model, texts))
        size = self.softmax.chunk_items or len(self.item_text.lengths)
        chunks = zip(texts["item_ids"].split(size), texts["item_inside"].split(size), strict=True)
        return self._scaled(torch.cat([self._item_vectors(model(some), which) for some, which in chunks]))

    def _read(self, hidden_BLD: Tensor, rows_T: Tensor, columns_T: Tensor) -> Tensor:
        """The vectors ``[T, D]`` of the histories that end at these places; no token after them counts."""
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
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right, at least one item a row.
        """
        ids, ends = self._history_tokens(histories.cpu())
        device = model.model.get_input_embeddings().weight.device
        hidden_BLD = model(ids.to(device))
        last = ends[:, -1].to(device)  # the end of the last title: padding adds nothing
        return self._scaled(self._read(hidden_BLD, torch.arange(len(last), device=device), last))


def _mean_embeddings(model: SplitModel, texts: dict[str, Tensor]) -> Tensor:
    weight = model.model.get_input_embeddings().weight
    return F.embedding_bag(texts["item_tokens"], weight.float(), texts["item_offsets"], mode="mean")


def _mean(hidden_BLD: Tensor, inside_BL: Tensor) -> Tensor:
    inside = inside_BL.to(hidden_BLD.device)[:, :, None].float()
    return (hidden_BLD.float() * inside).sum(dim=1) / inside.sum(dim=1)
