"""All attacks on the cut by name, and their figures on what was observed at one depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fellrec.attacks import BASELINES
from fellrec.attacks.attack import TargetAttack, TokenAttack
from fellrec.attacks.baselines import Chance, MostPopular
from fellrec.attacks.findings import Finding, target_metrics, token_metrics
from fellrec.attacks.gradient import GradientMatching
from fellrec.attacks.inverter import CausalLayer, Inverter
from fellrec.attacks.lens import LogitLens
from fellrec.attacks.nearest import NearestEmbedding
from fellrec.attacks.observe import Observed
from fellrec.attacks.public import Public
from fellrec.attacks.settings import AttackSettings
from fellrec.attacks.targets import PublicTail

ON_TOKENS: Mapping[str, Callable[[Public, AttackSettings], TokenAttack]] = {
    "nearest_embedding": lambda public, settings: NearestEmbedding(public),
    "logit_lens": lambda public, settings: LogitLens(public),
    "inverter": lambda public, settings: Inverter(public, nn.Linear, settings.inverter_steps),
    "transformer_inverter": lambda public, settings: Inverter(public, CausalLayer, settings.inverter_steps),
}
"""Attacks on the hidden states of the first cut."""
ON_TARGETS: Mapping[str, Callable[[Public, AttackSettings], TargetAttack]] = {
    "public_tail": lambda public, settings: PublicTail(public),
    "gradient": lambda public, settings: GradientMatching(public, settings.gradient_steps),
}
"""Attacks on the hidden states of the second cut and their gradients."""

_BASELINES: Mapping[str, type[Chance | MostPopular]] = {"chance": Chance, "most_popular": MostPopular}


def findings_at(
    public: Public, observed: Sequence[Observed], names: Sequence[str], tokenizer: Any, settings: AttackSettings
) -> list[Finding]:
    """The figures of some attacks at the depth at which the public model is cut, and of the baselines.

    Args:
        public: What the attacker knows.
        observed: What the server has seen of some clients, at the same depth.
        names: Of the attacks.
        tokenizer: Of the backbone.
        settings: How hard is attacked.
    """
    depth, objective = public.num_layers, public.objective
    num = min(settings.guesses, len(public.item_counts), len(public.token_counts))
    found = []
    for name in names:
        metrics = {}
        if name in ON_TOKENS:
            on_tokens = ON_TOKENS[name](public, settings)
            guesses = [[on_tokens.tokens(hidden, num) for hidden in one.first] for one in observed]
            metrics = token_metrics(guesses, observed, tokenizer, num)
        elif name in ON_TARGETS:
            on_targets = ON_TARGETS[name](public, settings)
            metrics = target_metrics([on_targets.targets(one, num) for one in observed], observed, objective, num)
        found.append(Finding(name, metrics, depth))
    for name in BASELINES:
        baseline = _BASELINES[name](public)
        metrics = token_metrics([baseline.tokens(one, num) for one in observed], observed, tokenizer, num)
        metrics |= target_metrics([baseline.targets(one, num) for one in observed], observed, objective, num)
        found.append(Finding(name, metrics, depth))
    return found
