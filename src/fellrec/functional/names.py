"""What the dotted name of a parameter says."""

from __future__ import annotations

OWN, REST = "lora_own_", "lora_rest_"
"""With ``adapter=lora_mixed``, how the last parts of the names of factors begin: a client's own, and those that it
receives."""


def last_part(name: str) -> str:
    """The last part of a dotted name.

    Example:
        >>> last_part("h.0.attn.c_attn.lora_own_a")
        'lora_own_a'
    """
    return name.rpartition(".")[2]


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter belongs to; ``None`` for embeddings, the last norm and such.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj.lora_A.default.weight"), layer_of("model.norm.weight")
        (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_lora_b(name: str) -> bool:
    """Whether a parameter is the factor B of LoRA.

    Example:
        >>> is_lora_b("h.0.attn.c_attn.lora_B.default.weight"), is_lora_b("h.0.attn.c_attn.lora_A.default.weight")
        (True, False)
    """
    return "lora_B" in name.split(".")
