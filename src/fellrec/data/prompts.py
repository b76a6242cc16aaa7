"""Prompt templates of the generative objective: one per domain, used for training and for inference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
