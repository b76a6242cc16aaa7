"""Settings of the model: ``backbone`` with its pre-training, ``adapter``, ``objective``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fellrec.data.settings import DataSettings
from fellrec.functional.ranges import (
    Allowed,
    Count,
    Natural,
    NotNegative,
    Positive,
    RateBelow1,
    check,
    listed,
    refuse,
    whole,
)

PARTS = ("head", "body", "tail")
"""Parts of a model that is cut twice."""
EVERY_STEP, ROUND = "every_step", "round"
"""``objective.refresh_items`` beside a number of steps."""


def parts_of(layers: str) -> tuple[str, ...]:
    """The parts that ``adapter.layers`` names, in their own order.

    Example:
        >>> parts_of("tail+body")
        ('body', 'tail')
    """
    return tuple(part for part in PARTS if part in layers.split("+"))


def _are_parts(layers: Any) -> bool:
    return isinstance(layers, str) and all(part in PARTS for part in layers.split("+"))


Layers = Annotated[str, Allowed(_are_parts, "head, body or tail, or several of them joined by +")]


@dataclass(frozen=True)
class PretrainSettings:
    """Pre-training of the tiny backbone on catalogue text and public users, once per data set, then cached."""

    steps: Count = 300
    """Optimiser steps; each takes one batch of public users and one of catalogue text."""
    batch_size: Count = 64
    """Public users' training rows a step."""
    text_batch_size: Count = 32
    """Catalogue texts a step."""
    text_weight: NotNegative = 0.1
    """Weight of the catalogue text's language-model loss beside the objective's."""
    learning_rate: Positive = 3.0e-3
    """Peak of AdamW's step size: 5 % linear warm-up, then linear decay to a tenth."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "backbone.pretrain")


@dataclass(frozen=True)
class TinySettings:
    """A small Llama, made and pre-trained here."""

    hidden_size: Count = 64
    """D, a multiple of ``2 · num_heads``."""
    num_layers: Count = 4
    """Decoder layers."""
    num_heads: Count = 2
    """Attention heads."""
    vocab_size: Annotated[int, whole(259)] = 4000
    """Pieces of the tokenizer at most: 256 bytes, 3 special tokens and more; small catalogues give fewer."""
    max_position_embeddings: Count = 512
    """Longest input in tokens."""
    seed: int = 0
    """Of the weights, and of the order of batches in pre-training."""
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    """How it is pre-trained."""

    def __post_init__(self) -> None:
        """Check all ranges, and that the sizes fit together."""
        check(self, "backbone")
        refuse(_wrong_heads(self.hidden_size, self.num_heads, 2))


@dataclass(frozen=True)
class SasrecSettings:
    """SASRec: one token for each item, learned positions, causal self-attention. Nothing is pre-trained."""

    hidden_size: Count = 64
    """D, a multiple of ``num_heads``; the feed-forward layers have this size too."""
    num_layers: Count = 2
    """Blocks."""
    num_heads: Count = 1
    """Attention heads."""
    dropout: RateBelow1 = 0.2
    """Of embeddings, attention and blocks."""
    max_position_embeddings: Count = DataSettings.max_history
    """Longest history in items."""
    seed: int = 0
    """Of the weights."""

    def __post_init__(self) -> None:
        """Check all ranges, and that the sizes fit together."""
        check(self, "backbone")
        refuse(_wrong_heads(self.hidden_size, self.num_heads, 1))


def _wrong_heads(hidden_size: int, num_heads: int, multiple: int) -> str | None:
    factor = "" if multiple == 1 else f"{multiple} · "
    text = f"backbone.hidden_size={hidden_size} must be a multiple of {factor}backbone.num_heads={num_heads}"
    return text if hidden_size % (multiple * num_heads) else None


@dataclass(frozen=True)
class HfSettings:
    """A causal LM or an encoder in Hugging Face's format."""

    path: str
    """A local folder, or a name on the hub, with safetensors."""
    config: str | None = None
    """For ``fellrec plan``, instead of ``path``: a config.json, a folder with one, or a name in conf/model_configs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "backbone")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters through PEFT; the backbone is frozen."""

    rank: Count = 8
    """Rank r of the update B·A."""
    alpha: Count = 16
    """The update is scaled by alpha / r."""
    dropout: RateBelow1 = 0.05
    """Dropout on the adapter's input."""
    target_modules: str | Sequence[str] | None = None
    """Modules to adapt, matched at the end of their full names; null: those of the architecture, such as
    [q_proj, v_proj]."""
    layers: Layers = "head+body+tail"
    """Parts with an adapter; body+tail leaves the head frozen."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "adapter")


@dataclass(frozen=True)
class FullSettings:
    """All parameters of the backbone are trained and exchanged; for small backbones."""

    layers: Layers = "head+body+tail"
    """Parts that are trained; body+tail leaves embedding and head frozen."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "adapter")


@dataclass(frozen=True)
class GenerativeSettings:
    """The backbone writes the title of the next item (METHOD §1, BIGRec)."""

    max_tokens: Count = 512
    """Longest prompt with its answer in tokens; the oldest titles are dropped, never the instruction."""
    max_title_tokens: Count = 24
    """Longest title in tokens."""
    template: str = f"{DataSettings.domain}-1"
    """Version of the prompt's wording: movie-1, game-1, product-1, video-1."""
    group_by_length: bool = True
    """Whether training rows of similar length share a batch, which saves padding; every row is used once an epoch."""
    one_target_per_row: bool = True
    """Whether a row is one history with one target (BIGRec); else each title of the history is a target, too, after
    those before it: many targets for one forward pass."""
    softmax: Literal["vocabulary", "catalogue"] = "vocabulary"
    """What a token competes with: all tokens (BIGRec), or those that continue some title, in training and in
    ranker=constrained. With the latter the likelihoods of all titles sum to 1, a token that no other title has in its
    place is not a target, and only constrained decoding can read the model."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "objective")


@dataclass(frozen=True)
class RetrievalSettings:
    """The history's vector is compared with every item's (METHOD §1)."""

    temperature: Positive = 0.05
    """Divides the similarity."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """cosine, or dot: the vectors' lengths count too."""
    history_fields: Annotated[Sequence[str], listed("a list, such as [title]")] = ("title",)
    """Catalogue fields that are written into the history."""
    item_fields: Annotated[Sequence[str], listed("a list, such as [title,genre]")] = ("title", "genre")
    """Catalogue fields that an item vector is made from."""
    item_encoder: Literal["tokens", "encoded"] = "tokens"
    """tokens: mean of the text's token embeddings. encoded: two towers, mean of the model's hidden states over the
    text, an encoder's by ``pooling``; slower by a forward pass over the catalogue a step."""
    max_title_tokens: Count = 24
    """Longest item text in tokens."""
    text: Literal["plain", "key_value"] = "plain"
    """How fields are written, for history and items: values only, or ``title: Heat genre: Crime``."""
    order: Literal["oldest_first", "newest_first"] | None = None
    """Of the history; newest_first has one target a row. null: oldest_first, for an encoder newest_first."""
    pooling: Literal["last", "mean", "first"] | None = None
    """Which hidden states are a history's vector: of its last token, the mean, or of an encoder's first; null: last,
    for an encoder first."""
    chunk_items: Count | None = None
    """Items whose logits are held, and whose texts are encoded, at a time, with the same result; null: all."""
    num_negatives: Count | None = None
    """Items drawn for a step's softmax, with the logQ correction; null: all items."""
    negatives: Literal["uniform", "popularity"] = "uniform"
    """How they are drawn: popularity is by the public users' interactions, if there are any, plus 1."""
    refresh_items: Literal["every_step", "round"] | Count = "every_step"
    """With ``item_encoder=encoded``: how often item vectors are made: in every step, after a number of steps, or once a
    round; in the last two cases they are kept, without gradients."""
    freeze_items_after: Natural | None = None
    """With ``item_encoder=encoded``: round (from 0) from which on item vectors are made once a round; null: never."""

    def __post_init__(self) -> None:
        """Check all ranges, and that settings do not exclude each other."""
        check(self, "objective")
        refuse(self._two_softmaxes, self._no_table, self._frozen_twice)

    @property
    def _two_softmaxes(self) -> str | None:
        if self.num_negatives is None or self.chunk_items is None:
            return None
        return (
            f"objective.chunk_items={self.chunk_items} is for the softmax over all items, "
            f"objective.num_negatives={self.num_negatives} takes a sample; one of them must be null"
        )

    @property
    def _no_table(self) -> str | None:
        is_used = self.refresh_items != EVERY_STEP or self.freeze_items_after is not None
        if not is_used or self.item_encoder == "encoded":
            return None
        return (
            f"objective.refresh_items={self.refresh_items}, objective.freeze_items_after={self.freeze_items_after} "
            f"need objective.item_encoder=encoded, it is {self.item_encoder}"
        )

    @property
    def _frozen_twice(self) -> str | None:
        if self.freeze_items_after is None or self.refresh_items != ROUND:
            return None
        return (
            f"objective.freeze_items_after={self.freeze_items_after} changes nothing with objective.refresh_items=round"
        )
