"""Attacks on the hidden states of the first cut: nearly total at depth 0, chance against a secret head."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fellrec.attacks.attack import best_rows
from fellrec.attacks.lens import LogitLens
from fellrec.attacks.nearest import NearestEmbedding
from fellrec.attacks.on_cut import ON_TOKENS
from fellrec.attacks.public import Public
from fellrec.attacks.settings import AttackSettings
from fellrec.attacks.titles import title_numbers
from fellrec.errors import ConfigError
from fellrec.models.split import SplitModel

ROWS, LENGTH, SIGMAS, SECRETS = 40, 25, 4, 30


SETTINGS = AttackSettings(inverter_steps=100)


def drawn(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[torch.randint(len(tokens), (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))]


def of_titles(public: Public) -> torch.Tensor:
    """The tokens that occur in public text: an inverter knows no others."""
    return public.token_counts.nonzero()[:, 0]


def head(model: SplitModel, ids: torch.Tensor, depth: int) -> torch.Tensor:
    with torch.no_grad(), model.at_depth(depth):
        return model.head(ids)


def recovery(guesses: torch.Tensor, ids: torch.Tensor) -> float:
    return float((guesses[:, :, 0] == ids).double().mean())


@pytest.mark.parametrize("name", ON_TOKENS)
def test_at_depth_0_recovery_is_nearly_total(public: Public, name: str) -> None:
    """The hidden state is the embedding; with a tied LM head its logit is largest for the token itself."""
    ids = drawn(of_titles(public))
    attack = ON_TOKENS[name](public, SETTINGS)
    assert recovery(attack.tokens(head(public.model, ids, 0), 3), ids) > 0.95


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("name", ON_TOKENS)
def test_a_random_head_and_a_secret_permutation_leave_chance(
    public: Public, secret_head: Callable[[torch.Tensor, int], torch.Tensor], name: str, depth: int
) -> None:
    """Under a uniform secret permutation of n tokens, a guess is right for one token in the mean, as of all fixed points.

    The number of fixed points has variance 1; the mean over many permutations is within 4 of its standard deviations.
    """
    tokens = of_titles(public)
    places = torch.randint(len(tokens), (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    with public.model.at_depth(depth):
        attack = ON_TOKENS[name](public, SETTINGS)
        found = [
            recovery(attack.tokens(secret_head(tokens[secret][places], depth), 3), tokens[places])
            for secret in (torch.randperm(len(tokens), generator=draw) for _ in range(SECRETS))
        ]
    assert sum(found) / SECRETS <= (1 + SIGMAS / math.sqrt(SECRETS)) / len(tokens)


def test_learned_positions_are_subtracted() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    model = SplitModel(GPT2LMHeadModel(config), (0, 1), 1).eval()
    with torch.no_grad():
        model.model.transformer.wpe.weight.mul_(50)  # far larger than the embeddings of tokens
    ids = drawn(torch.arange(97))
    own = Public(model, None, torch.ones(1), torch.ones(97), [], 0)  # type: ignore[arg-type]
    assert recovery(NearestEmbedding(own).tokens(head(model, ids, 0), 1), ids) == 1.0


def test_an_encoder_has_no_logit_lens() -> None:
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    model = SplitModel(BertModel(config, add_pooling_layer=False), (0, 1), 1)
    with pytest.raises(ConfigError, match="logit_lens needs a backbone with a final norm and an LM head"):
        LogitLens(Public(model, None, torch.ones(1), torch.ones(97), [], 0))  # type: ignore[arg-type]


def test_the_best_rows_in_chunks_are_those_of_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, table = torch.randn(7, 4), torch.randn(11, 4)
    expected = (queries @ table.T).topk(3).indices
    monkeypatch.setattr("fellrec.attacks.attack._SCORES_TOGETHER", 20)
    assert torch.equal(best_rows(queries, table, 3), expected)


def test_the_tokens_of_titles_are_found_without_what_all_titles_share(public: Public) -> None:
    """The line break at the end of every title is not private."""
    objective = public.objective
    items = torch.tensor([[3, 20, 4], [3, 3, 5]])
    batch = objective.collate(
        torch.cat([items, torch.full((2, 1), 7)], dim=1), torch.tensor([[False] * 3 + [True]] * 2)
    )
    numbers = title_numbers(objective, batch["input_ids"], items)
    found = [
        public.objective.tokenizer.decode(batch["input_ids"][row][numbers[row] == number])  # type: ignore[attr-defined]
        for row, number in [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    ]
    assert found == ["amber saw", "blue anvil", "amber tent", "amber saw", "amber saw", "amber vase"]
    assert int(numbers.max()) == 5
