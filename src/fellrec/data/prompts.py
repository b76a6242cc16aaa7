"""Prompts of the generative family: one template for training and for inference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptTemplate:
    """An instruction, the history with one title a line, and the place where the answer begins.

    Attributes:
        version: Recorded with every run; a changed text needs a new one.
        before: Text before the history.
        line: One title of the history; ``{title}`` stands for it.
        after: Text after the history; the title of the next item follows.
    """

    version: str = "plain-1"
    before: str = "Task: name the title that this person will choose next.\nChosen so far, oldest first:\n"
    line: str = "- {title}\n"
    after: str = "Next title: "

    @property
    def facts(self) -> dict[str, str]:
        """What runs record: the version, and a hash of the texts, which tells when one changed without the other."""
        texts = "\x00".join((self.before, self.line, self.after))
        return {"version": self.version, "digest": hashlib.sha256(texts.encode()).hexdigest()[:16]}

    def history_lines(self, titles: Sequence[str]) -> list[str]:
        """Each title as a line of the history."""
        return [self.line.format(title=title) for title in titles]

    def render(self, titles: Sequence[str]) -> str:
        """The whole prompt for a history, oldest title first.

        Example:
            >>> PromptTemplate(before="Seen:\\n", after="Next: ").render(["Alien", "Heat"])
            'Seen:\\n- Alien\\n- Heat\\nNext: '
        """
        return "".join([self.before, *self.history_lines(titles), self.after])
