"""Prompts of the generative family: one template per domain, the same for training and for inference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fellrec.errors import ConfigError, unknown


@dataclass(frozen=True)
class PromptTemplate:
    """An instruction, the history with one title a line, and the place where the answer begins.

    Attributes:
        version: Recorded with every run; a changed text needs a new one.
        before: Text before the history.
        after: Text after the history; the title of the next item follows. It ends with a line break: after a blank,
            tokenizers that put the blank into a word's token would see a title that begins unlike all others.
        line: One title of the history; ``{title}`` stands for it.
    """

    version: str
    before: str
    after: str
    line: str = "- {title}\n"

    def history_lines(self, titles: Sequence[str]) -> list[str]:
        """Each title as a line of the history."""
        return [self.line.replace("{title}", title) for title in titles]

    @property
    def line_end(self) -> str:
        """What follows a title in its line."""
        return self.line.partition("{title}")[2]

    @property
    def sha256(self) -> str:
        """Hash of the text, so that a text that changed without a new version is seen."""
        parts = (self.before, self.line, self.after)
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]

    def render(self, titles: Sequence[str]) -> str:
        """The whole prompt for a history, oldest title first.

        Example:
            >>> PromptTemplate("mine-1", before="Seen:\\n", after="Next:\\n").render(["Alien", "Heat"])
            'Seen:\\n- Alien\\n- Heat\\nNext:\\n'
        """
        return "".join([self.before, *self.history_lines(titles), self.after])


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
"""All templates by version. A version that runs were made with stays as it is; a better text is a new version."""


def prompt_template(version: str) -> PromptTemplate:
    """Look a template up.

    Raises:
        ConfigError: If there is none of this version; names those that there are.

    Example:
        >>> prompt_template("game-1").after
        'Next game:\\n'
    """
    if version not in TEMPLATES:
        raise ConfigError(unknown("objective.template", version, TEMPLATES))
    return TEMPLATES[version]
