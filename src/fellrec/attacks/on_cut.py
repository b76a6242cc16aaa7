"""All attacks on the cut by name, and their figures on what was observed at one depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fellrec.attacks import BASELINES
from fellrec.attacks.attack import TargetAttack, TokenAttack
from fellrec.attacks.baselines import Chance, MostPopular
from fellrec.attacks.findings import Finding, target_metrics, token_metrics
from fellrec.attacks.lens import LogitLens
from fellrec.attacks.nearest import NearestEmbedding
from fellrec.attacks.observe import Observed
from fellrec.attacks.public import Public
from fellrec.attacks.targets import PublicTail

ON_TOKENS: Mapping[str, Callable[[Public], TokenAttack]] = {
    "nearest_embedding": NearestEmbedding,
    "logit_lens": LogitLens,
}
"""Attacks on the hidden states of the first cut."""
ON_TARGETS: Mapping[str, Callable[[Public], TargetAttack]] = {"public_tail": PublicTail}
"""Attacks on the hidden states of the second cut and their gradients."""

_BASELINES: Mapping[str, type[Chance | MostPopular]] = {"chance": Chance, "most_popular": MostPopular}


def findings_at(
    public: Public, observed: Sequence[Observed], names: Sequence[str], tokenizer: Any, num: int
) -> list[Finding]:
    """The figures of some attacks at the depth at which the public model is cut, and of the baselines.

    Args:
        public: What the attacker knows.
        observed: What the server has seen of some clients, at the same depth.
        names: Of the attacks.
        tokenizer: Of the backbone.
        num: Guesses for each token and target.
    """
    depth, objective = public.num_layers, public.objective
    num = min(num, len(public.item_counts), len(public.token_counts))
    found = []
    for name in names:
        metrics = {}
        if name in ON_TOKENS:
            on_tokens = ON_TOKENS[name](public)
            guesses = [[on_tokens.tokens(hidden, num) for hidden in one.first] for one in observed]
            metrics = token_metrics(guesses, observed, tokenizer, num)
        elif name in ON_TARGETS:
            on_targets = ON_TARGETS[name](public)
            metrics = target_metrics([on_targets.targets(one, num) for one in observed], observed, objective, num)
        found.append(Finding(name, metrics, depth))
    for name in BASELINES:
        baseline = _BASELINES[name](public)
        metrics = token_metrics([baseline.tokens(one, num) for one in observed], observed, tokenizer, num)
        metrics |= target_metrics([baseline.targets(one, num) for one in observed], observed, objective, num)
        found.append(Finding(name, metrics, depth))
    return found
