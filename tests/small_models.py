"""A small configuration of every architecture, and masks of every kind."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LongformerConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

LAYERS = 5
TOKENS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2_sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=4),
    "gemma3_text": Gemma3TextConfig(**SHAPE, sliding_window=4),
    "gpt2": GPT2Config(**TOKENS, n_embd=32, n_layer=LAYERS, n_head=4),
    "gpt_neox": GPTNeoXConfig(
        **TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4
    ),
    "opt": OPTConfig(
        **TOKENS,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "phi3": Phi3Config(**SHAPE, sliding_window=4),
}
ENCODER_SHAPE = {
    **{name: SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    **TOKENS,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ENCODERS = {
    "bert": BertConfig(**ENCODER_SHAPE),
    "roberta": RobertaConfig(**{**ENCODER_SHAPE, "pad_token_id": 1, "bos_token_id": 0}),
    "longformer": LongformerConfig(
        **{**ENCODER_SHAPE, "pad_token_id": 1, "bos_token_id": 0}, attention_window=[4, 4, 8, 4, 4]
    ),
    "xlm-roberta": XLMRobertaConfig(**{**ENCODER_SHAPE, "pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": DistilBertConfig(
        **TOKENS,
        dim=32,
        hidden_dim=48,
        n_layers=LAYERS,
        n_heads=4,
        max_position_embeddings=66,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "mpnet": MPNetConfig(**{**ENCODER_SHAPE, "pad_token_id": 1, "bos_token_id": 0}),
    "modernbert": ModernBertConfig(
        **TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=66,
        local_attention=4,
        global_attn_every_n_layers=3,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
WITHOUT_POOLER: dict[str, dict[str, bool]] = {
    name: {} if name in ("distilbert", "modernbert") else {"add_pooling_layer": False} for name in ENCODERS
}
"""Arguments of each encoder's class that leave out the pooler; two have none."""


def masks() -> dict[str, torch.Tensor | None]:
    left, right = torch.ones(3, 9, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)
    left[0, :3] = 0
    right[2, 6:] = 0
    return {"none": None, "left": left, "right": right}
