"""The generative objective: a causal LM generates the title of the next item from an instruction and the history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.data.prompts import PromptTemplate, as_chat, prompt_template, with_wording
from fellrec.data.schema import Catalogue
from fellrec.data.text import TokenizedTexts, compact, repeat_row
from fellrec.errors import BackboneError, ConfigError
from fellrec.functional.trie import Trie, build_trie
from fellrec.models.objectives.vocabulary import check_tokens
from fellrec.models.settings import GenerativeSettings
from fellrec.models.split import SplitModel


class GenerativeObjective:
    """Mean negative log-likelihood of the tokens of the target title and its end token (METHOD §1).

    Prompts are concatenated from separately tokenised parts: the instruction, one line per title, and the beginning of
    the answer. Training and inference use the same function.

    Args:
        tokenizer: Hugging Face tokenizer of the backbone.
        catalogue: The items.
        max_history: Longest history in items.
        settings: Texts of the prompts, training targets and softmax.
        is_causal: Whether the backbone is causal; else it is a bidirectional encoder, which cannot generate text.

    Raises:
        ConfigError: If the backbone is an encoder, ``max_tokens`` leaves no room for one title of history, the
            template is unknown, or all titles are equal.
        BackboneError: If the tokenizer has no end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        catalogue: Catalogue,
        max_history: int,
        settings: GenerativeSettings,
        is_causal: bool = True,
    ) -> None:
        if not is_causal:
            raise ConfigError(
                "objective=generative needs a causal backbone, but this one is an encoder; "
                "use objective=retrieval, or a causal LM as backbone.path"
            )
        if tokenizer.eos_token_id is None:
            raise BackboneError("objective=generative needs a tokenizer with an end-of-sequence token")
        self.tokenizer = tokenizer
        self.catalogue = catalogue
        self.template = _template_of(settings, tokenizer)
        self.group_by_length = settings.group_by_length
        self.one_target_per_row = settings.one_target_per_row
        self.softmax = settings.softmax
        self.max_history = max_history
        self.max_tokens = max_tokens = settings.max_tokens
        has_own_begin = settings.chat_template or tokenizer.bos_token_id is None
        bos = [] if has_own_begin else [tokenizer.bos_token_id]
        self.before = bos + tokenizer(self.template.before, add_special_tokens=False)["input_ids"]
        self.after = tokenizer(self.template.after, add_special_tokens=False)["input_ids"]
        line_end = tokenizer(self.template.line_end, add_special_tokens=False)["input_ids"]
        lines = self.template.history_lines(catalogue.titles)
        max_title_tokens = settings.max_title_tokens
        around = len(tokenizer(self.template.line.replace("{title}", ""), add_special_tokens=False)["input_ids"])
        self.lines = TokenizedTexts(tokenizer, lines, max_title_tokens + max(8, around), line_end)
        self.titles = TokenizedTexts(tokenizer, catalogue.titles, max_title_tokens, suffix=[tokenizer.eos_token_id])
        self._room = max_tokens - len(self.before) - len(self.after) - int(self.titles.lengths.max())
        if self._room < int(self.lines.lengths.max()):
            raise ConfigError(
                f"objective.max_tokens={max_tokens} leaves {self._room} tokens for the history beside instruction and "
                f"answer, but one title can have {int(self.lines.lengths.max())}"
            )
        self._choices = _Choices(self.titles, self.lines) if self.softmax == "catalogue" else None

    def check(self, model: SplitModel) -> None:
        """Check that the backbone can read and generate the texts.

        Raises:
            BackboneError: If the longest possible prompt exceeds its context, a token has no embedding, or its files
                have no LM head.
        """
        if missing := model.missing_head:
            raise BackboneError(
                f"backbone.path={model.model.config.name_or_path}: the weights do not match config.json; missing "
                f"{len(missing)} ({', '.join(missing)}): objective=generative needs an LM head, objective=retrieval "
                "does not"
            )
        fixed = torch.tensor([*self.before, *self.after])
        check_tokens(self.tokenizer, (fixed, self.lines.tokens, self.titles.tokens), model.num_embeddings)
        context = model.context
        longest = self.max_tokens - self._room + min(self._room, self.max_history * int(self.lines.lengths.max()))
        if context is not None and longest > context:
            raise BackboneError(
                f"a prompt with its answer can have {longest} tokens, but the backbone's context is {context}; "
                f"lower objective.max_tokens to {context} or less"
            )

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata that is recorded with a run beside the settings: version and hash of the prompt template."""
        return {"prompt_template": self.template.version, "prompt_sha256": self.template.sha256}

    def lengths(self, items: Tensor, is_target: Tensor) -> Tensor | None:
        """Number of tokens ``[B]`` of each training row in ``collate``; ``None`` to not group rows by length."""
        if not self.group_by_length:
            return None
        answer, histories = _last_target(items, is_target)
        return self.history_lengths(histories) + self.titles.lengths[answer]

    def history_lengths(self, histories: Tensor) -> Tensor:
        """Number of tokens ``[B]`` of the prompt of each history ``[B, H]``."""
        return self.lines.lengths_of(self._drop_oldest(histories)) + len(self.before) + len(self.after)

    def decoded_titles(self) -> list[str]:
        """The training targets as text, one per item: titles truncated to ``max_title_tokens``."""
        ids = self.titles.tokens.masked_fill(~self.titles.inside, self.tokenizer.eos_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def prompts(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts without answers.

        Args:
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            Token ids ``[B, L]``, right-padded with 0, and lengths ``[B]``.
        """
        pieces = self._prompt_pieces(self._drop_oldest(histories))
        ids, positions = compact(*(torch.cat(parts, dim=1) for parts in zip(*pieces)))
        return ids, positions[:, -1] + 1

    def collate(self, items: Tensor, is_target: Tensor) -> dict[str, Tensor]:
        """Turn training rows into a batch.

        Args:
            items: ``[B, W + 1]`` int64, padded with -1 on the right; the last item is the target.
            is_target: ``[B, W + 1]`` bool, true for that item.

        Returns:
            ``input_ids [B, L]`` and their ``lengths [B]``; the positions ``rows [T]``, ``columns [T]`` whose next token
            is predicted, and these tokens ``targets [T]``. With ``softmax="catalogue"``, ``targets`` are indices among
            the allowed tokens, which are the children of the trie's ``nodes [T]``.
        """
        answer, histories = _last_target(items, is_target)
        histories = self._drop_oldest(histories)
        (before, lines, after), end = self._prompt_pieces(histories), self.titles.of(answer[:, None])
        in_target = is_target[:, :, None].expand(*is_target.shape, self.lines.tokens.shape[1]).flatten(1)
        tokens, inside = (torch.cat(parts, dim=1) for parts in zip(before, lines, after, end))
        nowhere, not_after = torch.zeros_like(before[1]), torch.zeros_like(after[1])
        predicted = torch.cat([nowhere, lines[1] & in_target, not_after, end[1]], dim=1)
        nodes, targets = None, tokens
        if self._choices is not None:
            nodes, targets = self._choices.of(histories, answer, len(self.before), len(self.after))
            predicted &= self._choices.is_predicted(nodes)
        ids, positions = compact(tokens, inside)
        rows, column = predicted.nonzero(as_tuple=True)
        batch = {
            "input_ids": ids,
            "lengths": positions[:, -1] + 1,
            "rows": rows,
            "columns": positions[rows, column] - 1,
            "targets": targets[rows, column],
        }
        return batch if nodes is None else {**batch, "nodes": nodes[rows, column]}

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood of the target tokens, and their number."""
        return self.loss_of(model, model.encode(self.inputs(batch)), batch)

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Token ids of the forward pass: the prompts with their answers."""
        return [batch["input_ids"]]

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss from the final hidden states ``[B, L, D]`` of ``inputs``; uses only the model's LM head."""
        logits = model.lm_head(hidden[0][batch["rows"], batch["columns"]]).float()
        if self._choices is not None:
            logits = self._choices.logits(logits, batch["nodes"])
        return F.cross_entropy(logits, batch["targets"], reduction="sum"), len(batch["targets"])

    def continuations(self, trie: Trie, nodes: Tensor, logits: Tensor) -> Tensor:
        """Log-probabilities of the tokens that continue prefixes of titles.

        Args:
            trie: Trie of the titles.
            nodes: ``[n]`` int64 nodes of the prefixes.
            logits: ``[n, V]`` float32 logits of the token after each prefix.

        Returns:
            ``[c]`` float32, one for each of ``trie.children(nodes)``.
        """
        if self.softmax == "vocabulary":
            logits = logits.log_softmax(dim=-1)
        of_children, is_child = trie.of_children(logits, nodes)
        if self.softmax == "catalogue":
            of_children = of_children.log_softmax(dim=-1)
        return of_children[is_child]

    def titles_of_nodes(self, trie: Trie) -> Tensor:
        """Index of the title whose likelihood is determined at each node of a trie of titles, ``[N]``; -1 for none."""
        return trie.end if self.softmax == "vocabulary" else trie.only_end

    def _prompt_pieces(self, histories: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tokens and masks of the instruction, the history lines and the beginning of the answer."""
        lines = self.lines.of(histories)
        return [repeat_row(self.before, len(histories)), lines, repeat_row(self.after, len(histories))]

    def _drop_oldest(self, histories: Tensor) -> Tensor:
        """Remove the oldest items whose lines do not fit into the prompt."""
        lengths = torch.where(histories >= 0, self.lines.lengths[histories.clamp(min=0)], 0)
        from_newest = lengths.flip(1).cumsum(dim=1).flip(1)
        return histories.masked_fill(from_newest > self._room, -1)


class _Choices:
    """The allowed tokens at each position of a prompt with its answer, if only titles can be generated.

    One trie has two roots: titles as answers, and titles in lines of the history.
    """

    def __init__(self, titles: TokenizedTexts, lines: TokenizedTexts) -> None:
        width = max(titles.tokens.shape[1], lines.tokens.shape[1])
        texts = [F.pad(text.tokens, (0, width - text.tokens.shape[1])) for text in (titles, lines)]
        inside = [F.pad(text.inside, (0, width - text.inside.shape[1])) for text in (titles, lines)]
        roots = torch.arange(2).repeat_interleave(len(titles.tokens))
        trie = build_trie(torch.cat(texts), torch.cat(inside), roots)
        if int(trie.num_children.max()) < 2:
            raise ConfigError("objective.softmax=catalogue needs at least two different titles")
        self._trie = trie
        of_titles, of_lines = slice(0, len(titles.tokens)), slice(len(titles.tokens), None)
        ends = titles.tokens.shape[1], lines.tokens.shape[1]
        self._of_titles = trie.path[of_titles, : ends[0]], trie.place[of_titles, : ends[0]]
        self._of_lines = trie.path[of_lines, : ends[1]], trie.place[of_lines, : ends[1]]
        self._num_children = trie.num_children

    def of(self, histories: Tensor, answers: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        """Node before each token of a prompt with its answer, and the token's index among the node's children.

        Both are ``[B, N]`` int64 and 0 outside of titles.
        """
        known = histories.clamp(min=0)
        nodes, places = (
            torch.cat([F.pad(line[known].flatten(1), (before, after)), title[answers]], dim=1)
            for line, title in zip(self._of_lines, self._of_titles)
        )
        return nodes, places

    def is_predicted(self, nodes: Tensor) -> Tensor:
        """Whether several tokens can follow a node. Always true at the start of an answer, for ``check_prompts``."""
        return (self._num_children[nodes] > 1) | (nodes == 0)

    def logits(self, logits: Tensor, nodes: Tensor) -> Tensor:
        """Logits ``[n, C]`` of the tokens that can follow each node, padded with -inf, from all logits ``[n, V]``."""
        if self._trie.token.device != logits.device:
            self._trie = self._trie.to(logits.device)
        return self._trie.of_children(logits, nodes)[0]


def _template_of(settings: GenerativeSettings, tokenizer: Any) -> PromptTemplate:
    """The prompt template of the settings, with the user's own wording, in the tokenizer's chat template if wanted."""
    own = with_wording(prompt_template(settings.template), settings.before, settings.line, settings.after)
    return as_chat(own, tokenizer) if settings.chat_template else own


def _last_target(items: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """The last target ``[B]`` of each row, and the items before it ``[B, W + 1]``, padded with -1."""
    column = torch.arange(items.shape[1])
    last = torch.where(is_target, column, -1).amax(dim=1)
    return items[torch.arange(len(items)), last], items.masked_fill(column >= last[:, None], -1)


def check_generative(objective: object, ranker: str) -> None:
    """Check that a ranker supports the objective.

    Args:
        objective: The run's objective.
        ranker: Name of the ranker in the configuration.

    Raises:
        ConfigError: If it has no prompts, or its softmax needs another ranker; lists the supported choices.
    """
    if not hasattr(objective, "prompts"):
        raise ConfigError(
            f"ranker={ranker} needs objective=generative; with objective=retrieval choose from: similarity"
        )
    if ranker != "constrained" and getattr(objective, "softmax", None) == "catalogue":
        raise ConfigError(
            f"ranker={ranker} needs likelihoods over the whole vocabulary, but objective.softmax=catalogue trains only "
            "tokens that continue a title; choose ranker=constrained"
        )
