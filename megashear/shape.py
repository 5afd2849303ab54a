"""Extents of a LLaMA-family model, published presets, parameter counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Everything that fixes the function a LLaMA computes, but its weights.

    Raises:
        ValueError: an extent is not positive, or query groups do not divide the heads.
    """

    num_layers: int
    """Transformer layers, L."""
    hidden_size: int
    """Width of the residual stream, h."""
    num_attention_heads: int
    """Query heads, H."""
    num_query_groups: int
    """Key/value heads, G; each serves H / G query heads. G = H is plain multi-head attention."""
    head_dim: int
    """Width of one head, d. Never pruned, so hidden_size / num_attention_heads does not give it."""
    ffn_hidden_size: int
    """Neurons of the MLP, I."""
    vocab_size: int
    """Rows of the embedding and of the output layer."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    rotary_base: float = 10000.0
    """Base (theta) of the rotary position embedding."""
    max_position_embeddings: int = 4096
    """Longest sequence the model was made for, tokens."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}; every key/value head serves the same "
                f"number of query heads"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head, H / G."""
        return self.num_attention_heads // self.num_query_groups

    def num_params(self) -> int:
        """Parameters of the whole model, with untied embeddings."""
        h = self.hidden_size
        return 2 * self.vocab_size * h + self.num_layers * (self.layer_params() + 2 * h) + h

    def layer_params(self) -> int:
        """Prunable parameters of one layer: attention and MLP matrices, no norms."""
        per_head = 2 * self.hidden_size * self.head_dim  # rows of q, columns of o
        per_group = 2 * self.hidden_size * self.head_dim  # rows of k and of v
        per_neuron = 3 * self.hidden_size  # gate, up, down
        return (
            self.num_attention_heads * per_head
            + self.num_query_groups * per_group
            + self.ffn_hidden_size * per_neuron
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name, for JSON."""
        return asdict(self)


def _llama2(layers: int, hidden: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=128,
        ffn_hidden_size=ffn,
        vocab_size=32000,
    )


PRESETS: dict[str, ModelShape] = {
    "llama2-7b": _llama2(32, 4096, 32, 11008),
    "llama2-2.7b": _llama2(32, 2560, 20, 6912),
    "llama2-1.3b": _llama2(24, 2048, 16, 5504),
    "llama2-370m": _llama2(24, 1024, 8, 2816),
}
"""Source: Sheared LLaMA (arXiv:2310.06694), table 1 and appendix; LLaMA 2 (arXiv:2307.09288)."""
