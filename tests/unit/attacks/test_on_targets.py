"""Attacks on the second cut: where the client's tail is the public one, its gradient gives the targets away."""

from __future__ import annotations

import pytest
import torch

from fellrec.attacks.findings import target_metrics
from fellrec.attacks.gradient import GradientMatching
from fellrec.attacks.observe import Observed, groups_of
from fellrec.attacks.public import Public
from fellrec.attacks.targets import PublicTail, true_targets
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.settings import GenerativeSettings
from tests.unit.attacks.conftest import CATALOGUE


def seen_by_the_server(public: Public) -> Observed:
    """What crosses the second cut in the training of an untrained client, computed with autograd alone."""
    model, objective = public.model, public.objective
    draw = torch.Generator().manual_seed(5)
    items = torch.stack([torch.randperm(len(CATALOGUE), generator=draw)[:6] for _ in range(3)])
    is_target = torch.zeros_like(items, dtype=torch.bool)
    is_target[:, -1] = True
    batch = objective.collate(items, is_target)
    ids = groups_of(batch)[0] if "lengths" in batch else [batch["input_ids"]]
    if isinstance(objective, GenerativeObjective):
        ids = [batch["input_ids"]]
    with model.at_depth(2):
        second = [model.body(model.head(some)).detach().requires_grad_() for some in ids]
        loss, count = objective.loss_of(model, [model.tail(hidden) for hidden in second], batch)
    gradients = torch.autograd.grad(loss / count, second)
    return Observed(0, [], [hidden.detach() for hidden in second], [], list(gradients), ids, [], batch)


@pytest.fixture
def generative(public: Public) -> Public:
    objective = GenerativeObjective(
        public.objective.tokenizer,  # type: ignore[attr-defined]
        CATALOGUE,
        10,
        GenerativeSettings(template="product-1"),
    )
    return Public(public.model, objective, public.item_counts, public.token_counts, public.texts, 0)


@pytest.mark.parametrize("kind", ["public", "generative"])
def test_the_gradient_of_a_public_tail_gives_all_targets(kind: str, request: pytest.FixtureRequest) -> None:
    own: Public = request.getfixturevalue(kind)
    observed = seen_by_the_server(own)
    guesses = GradientMatching(own, steps=100).targets(observed, 3)
    metrics = target_metrics([guesses], [observed], own.objective, 3)
    assert metrics["target_at_1"] > 0.9
    assert own.model.attention == "sdpa"


def test_a_gradient_of_other_targets_gives_those(public: Public) -> None:
    """The guess follows the gradient, not the batch: with the gradient of other targets it is the other targets."""
    observed = seen_by_the_server(public)
    others = {**observed.batch, "targets": (observed.batch["targets"] + 7) % len(CATALOGUE)}
    second = [hidden.clone().requires_grad_() for hidden in observed.second]
    loss, count = public.objective.loss_of(public.model, [public.model.tail(h) for h in second], others)
    gradients = list(torch.autograd.grad(loss / count, second))
    swapped = Observed(0, [], observed.second, [], gradients, observed.ids, [], observed.batch)
    guesses = GradientMatching(public, steps=100).targets(swapped, 1)
    assert guesses[:, 0].tolist() == others["targets"].tolist()


def test_the_public_tail_ranks_as_the_model_does(public: Public) -> None:
    """With an untrained client these are the scores of the model itself, by its own similarity."""
    observed = seen_by_the_server(public)
    with torch.no_grad():
        final = [public.model(ids) for ids in observed.ids]
        queries = public.objective.queries_of(final, observed.batch)  # type: ignore[attr-defined]
        scores = queries @ public.objective.item_vectors(public.model).T  # type: ignore[attr-defined]
    assert torch.equal(PublicTail(public).targets(observed, 5), scores.topk(5).indices)


def test_true_targets_of_a_generative_batch_are_the_tokens_of_titles(generative: Public) -> None:
    batch = seen_by_the_server(generative).batch
    assert true_targets(generative.objective, batch).tolist() == batch["targets"].tolist()
