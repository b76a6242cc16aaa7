"""The generative family: a causal LM writes the title of the next item after an instruction and the history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.data.prompts import PromptTemplate, prompt_template
from fellrec.data.schema import Catalogue
from fellrec.data.text import TokenizedTexts, compact, repeat_row
from fellrec.errors import BackboneError, ConfigError
from fellrec.models.split import SplitModel


class GenerativeObjective:
    """Mean negative log-likelihood of the target title's tokens and its end, and of nothing else (METHOD §1).

    Prompts are put together from pieces that are tokenised once: the instruction, one line per title, the answer's
    beginning. The same function makes them for training and for inference.

    Args:
        tokenizer: Hugging Face tokenizer of the backbone.
        catalogue: The items.
        max_history: Longest history in items.
        max_tokens: Longest prompt with its answer in tokens; the oldest titles are dropped, never the instruction.
        max_title_tokens: Longest title in tokens.
        template: Wording of the prompt, or its version.
        group_by_length: Whether training rows of similar length come into one batch, which saves padding.
        is_causal: Whether the backbone is; else it is a bidirectional encoder, and cannot write.

    Raises:
        ConfigError: If the backbone is an encoder, ``max_tokens`` leaves no room for a single title of history, or
            there is no such template.
        BackboneError: If the tokenizer has no end token.
    """

    one_target_per_row = True

    def __init__(
        self,
        tokenizer: Any,
        catalogue: Catalogue,
        max_history: int = 10,
        max_tokens: int = 512,
        max_title_tokens: int = 24,
        template: PromptTemplate | str = "product-1",
        group_by_length: bool = True,
        is_causal: bool = True,
    ) -> None:
        if not is_causal:
            raise ConfigError(
                "objective=generative needs a causal backbone, which writes text, and this one is an encoder; "
                "give objective=retrieval, or a causal LM as backbone.path"
            )
        if tokenizer.eos_token_id is None:
            raise BackboneError("objective=generative needs a tokenizer with an end-of-sequence token")
        self.tokenizer = tokenizer
        self.catalogue = catalogue
        self.template = prompt_template(template) if isinstance(template, str) else template
        self.group_by_length = group_by_length
        self.max_history = max_history
        self.max_tokens = max_tokens
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.before = bos + tokenizer(self.template.before, add_special_tokens=False)["input_ids"]
        self.after = tokenizer(self.template.after, add_special_tokens=False)["input_ids"]
        line_end = tokenizer(self.template.line_end, add_special_tokens=False)["input_ids"]
        lines = self.template.history_lines(catalogue.titles)
        self.lines = TokenizedTexts(tokenizer, lines, max_title_tokens + 8, line_end)
        self.titles = _with_end(TokenizedTexts(tokenizer, catalogue.titles, max_title_tokens), tokenizer.eos_token_id)
        self._room = max_tokens - len(self.before) - len(self.after) - int(self.titles.lengths.max())
        if self._room < int(self.lines.lengths.max()):
            raise ConfigError(
                f"objective.max_tokens={max_tokens} leaves {self._room} tokens for the history beside instruction and "
                f"answer; one title can take {int(self.lines.lengths.max())}"
            )

    def check(self, model: SplitModel) -> None:
        """Refuse a backbone whose context is too short for the longest possible prompt.

        Raises:
            BackboneError: With both numbers.
        """
        context = model.context
        longest = self.max_tokens - self._room + min(self._room, self.max_history * int(self.lines.lengths.max()))
        if context is not None and longest > context:
            raise BackboneError(
                f"a prompt with its answer can have {longest} tokens, the backbone's context is {context}; "
                f"lower objective.max_tokens to {context} or less"
            )

    @property
    def facts(self) -> dict[str, str]:
        """What of the objective is recorded with a run beside its settings."""
        return {"prompt_template": self.template.version, "prompt_sha256": self.template.sha256}

    def lengths(self, items: Tensor, is_target: Tensor) -> Tensor | None:
        """Tokens ``[B]`` of each training row, as ``collate`` makes them; ``None`` if batches are not to go by them."""
        if not self.group_by_length:
            return None
        histories = self._drop_oldest(items.masked_fill(is_target, -1))
        in_history = torch.where(histories >= 0, self.lines.lengths[histories.clamp(min=0)], 0).sum(dim=1)
        target = items.masked_fill(~is_target, 0).sum(dim=1)
        return in_history + self.titles.lengths[target] + len(self.before) + len(self.after)

    def learnt_titles(self) -> list[str]:
        """The titles as the model is trained to write them, one per item: long ones are cut to ``max_title_tokens``."""
        ids = self.titles.tokens.masked_fill(~self.titles.inside, self.tokenizer.eos_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def prompts(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts up to where the answer begins.

        Args:
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            Token ids ``[B, L]``, right-padded with 0, and lengths ``[B]``.
        """
        tokens, inside = self._prompt_pieces(histories)
        ids, positions = compact(tokens, inside)
        return ids, positions[:, -1] + 1

    def collate(self, items: Tensor, is_target: Tensor) -> dict[str, Tensor]:
        """Turn training rows into a batch.

        Args:
            items: ``[B, W + 1]`` int64, padded with -1 on the right; the last item is the target.
            is_target: ``[B, W + 1]`` bool, true for that item.

        Returns:
            ``input_ids [B, L]`` and their ``lengths [B]``; the positions ``rows [T]``, ``columns [T]`` whose next token
            is one of the target title, and these tokens ``targets [T]``.
        """
        row = torch.arange(len(items))
        last = is_target.long().argmax(dim=1)
        answer, answer_inside = self.titles.of(items[row, last][:, None])
        tokens, inside = self._prompt_pieces(items.masked_fill(is_target, -1))
        ids, positions = compact(torch.cat([tokens, answer], dim=1), torch.cat([inside, answer_inside], dim=1))
        rows, column = answer_inside.nonzero(as_tuple=True)
        columns = positions[rows, tokens.shape[1] + column]
        lengths, targets = positions[:, -1] + 1, answer[rows, column]
        return {"input_ids": ids, "lengths": lengths, "rows": rows, "columns": columns - 1, "targets": targets}

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood of the target titles' tokens, and their number."""
        return self.loss_of(model, [model(ids) for ids in self.inputs(batch)], batch)

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Token ids that go through the whole model: the prompts with their answers."""
        return [batch["input_ids"]]

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss for the final hidden states ``[B, L, D]`` of ``inputs``; only the LM head is used of the model."""
        logits_TV = model.lm_head(hidden[0][batch["rows"], batch["columns"]]).float()
        return F.cross_entropy(logits_TV, batch["targets"], reduction="sum"), len(batch["targets"])

    def _prompt_pieces(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        histories = self._drop_oldest(histories)
        pieces = [repeat_row(self.before, len(histories)), self.lines.of(histories)]
        pieces.append(repeat_row(self.after, len(histories)))
        return torch.cat([tokens for tokens, _ in pieces], dim=1), torch.cat([inside for _, inside in pieces], dim=1)

    def _drop_oldest(self, histories: Tensor) -> Tensor:
        """Forget the oldest titles that do not fit."""
        lengths = torch.where(histories >= 0, self.lines.lengths[histories.clamp(min=0)], 0)
        from_newest = lengths.flip(1).cumsum(dim=1).flip(1)
        return histories.masked_fill(from_newest > self._room, -1)


def _with_end(texts: TokenizedTexts, end: int) -> TokenizedTexts:
    """The same texts, each with the end token after it."""
    texts.tokens = F.pad(texts.tokens, (0, 1))
    texts.tokens[torch.arange(len(texts.lengths)), texts.lengths] = end
    texts.lengths = texts.lengths + 1
    texts.inside = torch.arange(texts.tokens.shape[1])[None, :] < texts.lengths[:, None]
    return texts


def check_writes(objective: object, ranker: str) -> None:
    """Refuse an objective that makes no prompts, for a ranker that needs them.

    Args:
        objective: The run's.
        ranker: The ranker's name in the configuration.

    Raises:
        ConfigError: If it makes none.
    """
    if not hasattr(objective, "prompts"):
        raise ConfigError(
            f"ranker={ranker} needs objective=generative, whose prompts it goes on with; with objective=retrieval "
            "choose from: similarity"
        )
