"""Numbers of the quickstart: shapes, steps and rates, tuned on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megashear.shape import ModelShape

VOCABULARY = 2048
"""SentencePiece pieces, byte fallback included."""

SOURCE = ModelShape(
    num_layers=6,
    hidden_size=192,
    num_attention_heads=6,
    num_query_groups=6,
    head_dim=32,
    ffn_hidden_size=512,
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
)
"""Shape of the source: 3.4 M parameters."""
TARGET = replace(
    SOURCE,
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    ffn_hidden_size=320,
)
"""Shape of the pruned model: 1.3 M parameters, smaller in all four dimensions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Steps and rates; every step reads ``global_batch_size * seq_length`` tokens."""

    source_iters: int = 600
    """Steps of the source model, from fresh weights."""
    prune_iters: int = 60
    """Steps of pruning: few, for they cost most, and the tokens serve recovery as well."""
    recover_iters: int = 180
    """Steps of continued pretraining after the cut."""
    seq_length: int = 128
    """Tokens per sequence."""
    global_batch_size: int = 8
    """Sequences per step."""
    source_lr: float = 2e-3
    prune_lr: float = 2e-3
    recover_lr: float = 2e-3
    init_method_std: float = 0.05
    """Standard deviation of fresh weights; with 0.02 a model of this width learns far slower."""
    sparsity_warmup_iters: int = 12
    """Steps over which the target sparsity rises: a fifth of pruning, as in the recipes."""
    noise_streams: int = 4
    """Independent draws of the masks per step."""
    score_sequences: int = 256
    """Sequences from which the importance of units is measured for the one-shot model."""
    eval_interval: int = 20
    """Steps between the evaluations that move the mixture."""
    eval_sequences: int = 16
    """Held-out sequences per domain in each evaluation."""
    eval_batch_size: int = 16
    """Sequences in one forward pass of an evaluation."""
    held_out_fraction: float = 0.02


FULL = Recipe()
SHORT = replace(
    FULL,
    source_iters=40,
    prune_iters=16,
    recover_iters=16,
    sparsity_warmup_iters=4,
    score_sequences=16,
    eval_interval=8,
    eval_sequences=2,
    held_out_fraction=0.005,
)
"""Steps to check that everything runs, in a fraction of the time; too few to compare models."""
