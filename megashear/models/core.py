"""The parts of a LLaMA layer that run on any device: attention and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CausalAttention(MegatronModule):
    """Causal scaled-dot-product attention over this rank's heads, through torch's kernels.

    megatron-core's own core attention materialises the scores, [s, s] per head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **unused_too: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads/tp, d].
            key: [s, b, groups/tp, d].
            value: as ``key``.

        Returns:
            Context, [s, b, heads/tp * d].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.size(1) != k.size(1)
        )
        return context.permute(2, 0, 1, 3).flatten(-2)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the hidden dimension, aware of sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # each tensor rank norms its own part of the sequence: Megatron sums such gradients
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``x``, [s, b, h]; the mean square is taken in float32."""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
