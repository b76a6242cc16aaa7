"""Prompt templates of the generative objective: one per domain, used for training and for inference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fellrec.errors import ConfigError, unknown


@dataclass(frozen=True)
class PromptTemplate:
    """An instruction, the history with one title per line, and the beginning of the answer.

    Attributes:
        version: Name that is recorded with every run. A changed text needs a new version.
        before: Text before the history.
        after: Text after the history; the title of the next item follows. It must end with a line break: many
            tokenizers merge a preceding space into the first token of a title, which would then differ from the first
            token of the same title in the history.
        line: One line of the history, with the placeholder ``{title}``.
    """

    version: str
    before: str
    after: str
    line: str = "- {title}\n"

    def history_lines(self, titles: Sequence[str]) -> list[str]:
        """Format each title as a line of the history."""
        return [self.line.replace("{title}", title) for title in titles]

    @property
    def line_end(self) -> str:
        """Text after the title in a history line."""
        return self.line.partition("{title}")[2]

    @property
    def sha256(self) -> str:
        """Hash of the text, which detects a changed text under an unchanged version."""
        parts = (self.before, self.line, self.after)
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def _template(version: str, noun: str, verb: str, done: str) -> PromptTemplate:
    before = f"Task: name the {noun} that this person will {verb} next.\n{done} so far, oldest first:\n"
    return PromptTemplate(version, before, f"Next {noun}:\n")


_HISTORY = "\ue000"
"""Stands for the history while a chat template is applied: a character without a meaning, which no text has."""

TEMPLATES = {
    template.version: template
    for template in (
        _template("movie-1", "movie", "watch", "Watched"),
        _template("game-1", "game", "play", "Played"),
        _template("product-1", "product", "buy", "Bought"),
        _template("video-1", "video", "watch", "Watched"),
    )
}
"""All templates by version. Never change the text of a released version; add a new version instead."""


def prompt_template(version: str) -> PromptTemplate:
    """Return the template of a version.

    Raises:
        ConfigError: If the version is unknown; lists the known versions.

    Example:
        >>> prompt_template("game-1").after
        'Next game:\\n'
    """
    if version not in TEMPLATES:
        raise ConfigError(unknown("objective.template", version, TEMPLATES))
    return TEMPLATES[version]


def with_wording(
    template: PromptTemplate, before: str | None = None, line: str | None = None, after: str | None = None
) -> PromptTemplate:
    """Replace parts of a template by a user's own; its version is then ``own``, and the hash tells texts apart.

    Args:
        template: Whose parts stay where nothing is given.
        before: Text before the history; in all texts a backslash with n is a line break.
        line: One line of the history, with ``{title}``.
        after: Text after the history.

    Raises:
        ConfigError: If ``line`` does not have ``{title}`` exactly once.

    Example:
        >>> with_wording(TEMPLATES["game-1"], line="* {title};").history_lines(["Go", "Nim"])
        ['* Go;', '* Nim;']
    """
    given = {"before": before, "line": line, "after": after}
    own = {name: text.replace("\\n", "\n") for name, text in given.items() if text is not None}
    if "line" in own and own["line"].count("{title}") != 1:
        raise ConfigError(
            f"objective.line={line!r} is not allowed: a text with {{title}} once, such as '- {{title}}\\n'"
        )
    return replace(template, version="own", **own) if own else template


def as_chat(template: PromptTemplate, tokenizer: Any) -> PromptTemplate:
    """Write a template as a user's message in the tokenizer's chat template, after which the model answers.

    Args:
        template: Its text around the history becomes the message.
        tokenizer: A Hugging Face tokenizer with a chat template.

    Returns:
        The template; ``before`` begins with whatever the chat template begins with, special tokens included.

    Raises:
        ConfigError: If the tokenizer has no chat template, or the message is not in its output once.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("objective.chat_template=true needs a tokenizer with a chat template, and this one has none")
    message = [{"role": "user", "content": f"{template.before}{_HISTORY}{template.after}"}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the tokenizer's author
        raise ConfigError(f"the tokenizer's chat template failed: {' '.join(str(error).split())}") from error
    if text.count(_HISTORY) != 1:
        raise ConfigError("the tokenizer's chat template does not repeat a user's message once")
    before, _, after = text.partition(_HISTORY)
    return replace(template, version=f"{template.version}, chat", before=before, after=after)
