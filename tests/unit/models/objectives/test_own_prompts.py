"""Prompts in a user's own words, and in the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from fellrec.config.compose import compose
from fellrec.config.instantiate import instantiate
from fellrec.data.guards import check_template
from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.settings import GenerativeSettings
from fellrec.models.tiny import build_tokenizer

TITLES = ("Alien", "Heat", "Up and away")
CATALOGUE = Catalogue(tuple("abc"), TITLES, pd.DataFrame(index=range(3)))
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer([f"{title}\n" for title in TITLES], vocab_size=300)


def prompt(tokenizer: Any, **settings: Any) -> str:
    """The prompt of a history of two items, as text."""
    objective = GenerativeObjective(tokenizer, CATALOGUE, 3, GenerativeSettings(**settings))
    ids, lengths = objective.prompts(torch.tensor([[0, 2, -1]]))
    text: str = tokenizer.decode(ids[0, : lengths[0]], clean_up_tokenization_spaces=False)
    return text


def test_a_prompt_has_the_users_words(tokenizer: Any) -> None:
    """A backslash with n is a line break, as on a command line; what is not given stays the template's."""
    start = tokenizer.bos_token or ""
    own = {"before": "Films I liked:\\n", "line": "* {title};\n", "after": "I want to see:\\n"}
    assert prompt(tokenizer, **own) == f"{start}Films I liked:\n* Alien;\n* Up and away;\nI want to see:\n"
    assert prompt(tokenizer, line="* {title}\\n").endswith("* Alien\n* Up and away\nNext product:\n")


def test_a_prompt_in_the_chat_template_is_the_tokenizers_own(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    own = {"before": "Films I liked:\n", "after": "What next?"}
    message = [{"role": "user", "content": "Films I liked:\n- Alien\n- Up and away\nWhat next?"}]
    expected = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert prompt(tokenizer, chat_template=True, **own) == expected
    assert expected.endswith("What next?</turn>\n<assistant>\n")


def test_a_run_records_its_wording(tokenizer: Any) -> None:
    first, second = (
        GenerativeObjective(tokenizer, CATALOGUE, 3, GenerativeSettings(before=text)).metadata
        for text in ("a\n", "b\n")
    )
    assert first["prompt_template"] == second["prompt_template"] == "own"
    check_template(first, first, "run")
    with pytest.raises(ConfigError, match="run was trained with prompt template own"):
        check_template(first, second, "run")


def test_the_wording_is_a_setting(tokenizer: Any) -> None:
    config = compose(["objective=generative", 'objective.line="* {title}\\n"', "objective.chat_template=false"])
    objective = instantiate(config.objective, "objective", tokenizer=tokenizer, catalogue=CATALOGUE, max_history=3)
    assert objective.template.history_lines(["Heat"]) == ["* Heat\n"]


@pytest.mark.parametrize("line", ["no title", "{title} {title}", ""])
def test_a_line_without_a_place_for_the_title_is_refused(line: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"objective.line=.* is not allowed: a text with \{title\} once"):
        prompt(tokenizer, line=line)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs a tokenizer with a chat template"),
        ("{{ raise_exception('no users') }}", "chat template failed: no users"),
        ("{{ 1 // 0 }}", "chat template failed"),
        ("nothing", "does not repeat a user's message once"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "does not repeat a user's message once"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template: str | None, message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        prompt(tokenizer, chat_template=True)
