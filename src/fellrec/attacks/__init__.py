"""Attacks on what an honest-but-curious server receives; one attack, one file. See docs/attacks.md.

This module is cheap to import: the command line lists attacks without loading torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from fellrec.errors import ConfigError, unknown

ON_CUT = {
    "nearest_embedding": "each hidden state of the first cut is compared with the public token embeddings",
    "logit_lens": "the public final norm and LM head read the hidden states of the first cut",
    "inverter": "a linear layer, trained on public text through the public head, reads the states of the first cut",
    "transformer_inverter": "the same with one small transformer layer",
    "public_tail": "the public copy of tail and LM head reads the targets off the hidden states of the second cut",
    "gradient": "labels are optimised until their gradient at the second cut is the one that the client sent",
}
"""Attacks on hidden states and gradients at the two cuts → what they do, in one sentence."""
ON_UPDATE = {
    "update_rows": "the items of training are those whose embedding rows moved unlike the others in the first update",
    "update_scores": "they are those that the updated model ranks higher than the initial one, for public histories",
}
"""Attacks on the update of a client, by number of users a client."""
ON_ADAPTER = {
    "membership": "an interaction with a small loss under a client's adapter is guessed to have been trained on",
    "client_inference": "a user is guessed to be of the client whose adapter gives the user's items the smallest loss",
}
"""Attacks on the adapters that the run has selected."""
ATTACKS = {**ON_CUT, **ON_UPDATE, **ON_ADAPTER}
"""All attacks."""
BASELINES = {
    "chance": "tokens and items drawn by how frequent they are in the public data",
    "most_popular": "the most frequent tokens, titles and items of the public data",
}
"""What is known without an attack; reported beside every attack."""


def check_names(names: Sequence[str]) -> None:
    """Refuse attacks that do not exist.

    Raises:
        ConfigError: Saying which.
    """
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(unknown("attack", name, ATTACKS))


def defaults(backbone: str) -> list[str]:
    """The attacks of a run where none are named: cheap ones that fit its backbone.

    Args:
        backbone: Name of the backbone in the configuration.
    """
    return list(ON_UPDATE) if backbone == "sasrec" else ["nearest_embedding", "logit_lens", "public_tail"]
