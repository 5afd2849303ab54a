"""The parts of a LLaMA that run on any device: attention, SwiGLU, RMSNorm, rotary, padding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megashear.models import kernels
from megashear.shape import ModelShape


class RotaryAttention(SelfAttention):
    """Self-attention whose core attention turns queries and keys.

    megatron-core's own turning, without Transformer Engine's kernel, makes the cosines again for
    every layer and copies queries and keys three times over.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> Any:
        """Attend as ``SelfAttention`` does; ``rotary_pos_emb`` is of `RotaryTable`."""
        self.core_attention.rotary = rotary_pos_emb
        return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)


class CausalAttention(MegatronModule):
    """Causal scaled-dot-product attention over this rank's heads, through torch's kernels.

    megatron-core's own core attention materialises the scores, [s, s] per head.
    """

    rotary: Tensor | None = None
    """Cosines and sines to turn queries and keys by, of `RotaryTable`; None leaves them."""

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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads/tp, d].
            key: [s, b, groups/tp, d].
            value: as ``key``.
            attention_mask: what may be attended to, see :func:`document_mask`; None is everything
                before.

        Returns:
            Context, [s, b, heads/tp * d].
        """
        if self.rotary is not None:
            cos, sin = self.rotary.chunk(2, dim=-1)
            query, key = (kernels.rotate(x, cos, sin) for x in (query, key))
        # As `kernels.rotate` lays out the others; and a copy, for a view would keep all that the
        # projection gave until the backward pass.
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        if attention_mask is not None:
            # on CUDA no kernel takes both a mask and groups without materialising the scores
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(-2)


def document_mask(documents: Tensor) -> Tensor:
    """Say which tokens attend to which, where documents packed into a sequence are kept apart.

    Made once for a microbatch and shared by the layers that it passes: s^2 bytes a sequence.
    (On a GPU, kernels for sequences of varying length would need none of it.)

    Args:
        documents: number of the document of each token, [b, s].

    Returns:
        bool [b, 1, s, s], true where a query (row) sees a key (column): of its own document, and
        not behind it.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, aware of sequence parallelism."""

    num_open: Tensor | None = None
    """How many hidden dimensions are open where masks close some, float32 [], see
    `kernels.rms_norm`; None for all."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # each tensor rank norms its own part of the sequence: Megatron sums such gradients
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``x``, [..., hidden_size]; the mean square is taken in float32."""
        return kernels.rms_norm(x, self.weight, self.eps, self.num_open)


class SwiGLU(MegatronModule):
    """Activation of the MLP, silu(gate) * up.

    It takes the place that megatron-core keeps for Transformer Engine's activations.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Turn gate and up side by side, [s, b, 2 * ffn/tp], into [s, b, ffn/tp]."""
        return kernels.swiglu(x)


class RotaryTable(RotaryEmbedding):
    """Cosines and sines of all angles, made once for a sequence length.

    Args:
        shape: of the model.
        to: device of the table.
    """

    def __init__(self, shape: ModelShape, to: torch.device) -> None:
        super().__init__(shape.head_dim, rotary_percent=1.0, use_cpu_initialization=True)
        self.inv_freq = rotary_frequencies(shape).to(to)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Cosines, then sines: float32 [s, 1, 1, d]."""
        angles = self.get_freqs_non_repeated(max_seq_len, offset)  # [s, d/2]
        return torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None, None, :]


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Angle per position of every pair of head dimensions, radians, float32, [d/2].

    Source: Su et al. 2021 (arXiv:2104.09864); for stretched tables transformers
    `modeling_rope_utils`, types "linear" and "llama3".
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    plain = 1.0 / shape.rotary_base**exponents  # [d/2]
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    # waves that fit into the original context at least high_freq_factor times are kept, those
    # that fit less than low_freq_factor times are stretched, and those between are blended
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1.0 - kept) * plain / scaling.factor + kept * plain


class VocabularyPadding:
    """Forward hook of the output layer that keeps padding rows out of the softmax.

    With them in it, the loss would depend on how many a layout needs. A logit of minus infinity
    has probability 0 and gradient 0, so padding rows also stay as they are.

    Args:
        num_own: rows of this rank's slice that are tokens; those after them are padding.
    """

    def __init__(self, num_own: int) -> None:
        self.num_own = num_own

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        """Close the padding's logits in ``output``, ([s, b, vocab/tp], bias), in place."""
        logits, bias = output
        logits[..., self.num_own :] = -math.inf
        return logits, bias
