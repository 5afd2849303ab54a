"""One tiny model of every family, with every part that one family has and another lacks."""

from __future__ import annotations

from dataclasses import replace

from megashear.shape import ModelShape, RopeScaling
from tests.tiny import SOURCE, TARGET

# the original context is short, so that tiny heads have waves to keep, to blend and to stretch
LLAMA3_SCALING = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=24,
)

FAMILIES: dict[str, ModelShape] = {
    "llama2": SOURCE,
    "llama2-mha": replace(SOURCE, num_query_groups=SOURCE.num_attention_heads),
    "llama2-linear": replace(SOURCE, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "llama3": replace(SOURCE, rotary_base=500000.0),
    "llama3.1": replace(SOURCE, rotary_base=500000.0, rope_scaling=LLAMA3_SCALING),
    "llama3.2": replace(
        SOURCE, rotary_base=500000.0, rope_scaling=LLAMA3_SCALING, tied_embeddings=True
    ),
    "mistral": replace(SOURCE, family="mistral", sliding_window=24),
    "qwen2": replace(SOURCE, family="qwen2", norm_epsilon=1e-6, rotary_base=1e6, qkv_bias=True),
    "qwen2-tied": replace(
        SOURCE, family="qwen2", norm_epsilon=1e-6, qkv_bias=True, tied_embeddings=True
    ),
    "qwen3": replace(SOURCE, family="qwen3", norm_epsilon=1e-6, rotary_base=1e6, qk_norm=True),
    "qwen3-tied": replace(
        SOURCE, family="qwen3", norm_epsilon=1e-6, qk_norm=True, tied_embeddings=True
    ),
}
"""By name: what each family computes, at the same unequal extents."""


def pruned(shape: ModelShape) -> ModelShape:
    """A smaller model of the same family, whose head_dim is not hidden_size / heads."""
    grouped = shape.heads_per_group > 1
    # where heads come in groups, two of four groups go, and one of the two heads in each other
    heads = TARGET.num_query_groups if grouped else TARGET.num_attention_heads
    return replace(
        shape,
        num_layers=TARGET.num_layers,
        hidden_size=TARGET.hidden_size,
        num_attention_heads=heads,
        num_query_groups=heads,
        ffn_hidden_size=TARGET.ffn_hidden_size,
    )
