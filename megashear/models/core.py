"""Parts of a LLaMA that run on any device: attention, SwiGLU, RMSNorm, rotary table, padding."""

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

    Without Transformer Engine's kernel, megatron-core would compute the cosines anew for every
    layer and copy queries and keys three times.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> Any:
        """Attend as ``SelfAttention`` does, with the angles ``rotary_pos_emb`` of `RotaryTable`."""
        self.core_attention.rotary = rotary_pos_emb
        return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)


class CausalAttention(MegatronModule):
    """Causal scaled-dot-product attention over this rank's heads, through torch's kernels.

    The core attention of megatron-core would materialise the scores, [s, s] per head.
    """

    rotary: Tensor | None = None
    """Cosines and sines that turn queries and keys, from `RotaryTable`; None turns nothing."""

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
            attention_mask: which tokens attend to which, see `document_mask`; None is plain causal
                attention.

        Returns:
            Context, [s, b, heads/tp * d].
        """
        if self.rotary is not None:
            cos, sin = self.rotary.chunk(2, dim=-1)
            query, key = (kernels.rotate(x, cos, sin) for x in (query, key))
        # In the memory layout that `kernels.rotate` returns. A copy, because a view would keep the
        # whole output of the projection until the backward pass.
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        if attention_mask is not None:
            # no CUDA kernel takes both a mask and grouped queries without materialising scores
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
    """Return which tokens attend to which, where documents of one sequence are kept apart.

    The mask is made once for a microbatch and takes s^2 bytes a sequence; all layers share it.
    (On a GPU, kernels for sequences of varying length would need no mask.)

    Args:
        documents: number of the document of each token, [b, s].

    Returns:
        bool [b, 1, s, s], true where a query (row) sees a key (column) of its own document and not
        after it.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, aware of sequence parallelism."""

    num_open: Tensor | None = None
    """Number of open hidden dimensions, float32 [], see `kernels.rms_norm`; None where all are."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # with sequence parallelism each tensor rank norms its own part of the sequence, and
        # megatron-core sums gradients that have this mark
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, [..., hidden_size], normed; the mean square is taken in float32."""
        return kernels.rms_norm(x, self.weight, self.eps, self.num_open)


class SwiGLU(MegatronModule):
    """Activation of the MLP, silu(gate) * up.

    It is given to megatron-core as an activation of Transformer Engine would be.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(gate) * up, [s, b, ffn/tp]; ``x`` has gate beside up, [s, b, 2 * ffn/tp]."""
        return kernels.swiglu(x)


class RotaryTable(RotaryEmbedding):
    """Cosines and sines of all angles, computed once for a sequence length.

    Args:
        shape: the model.
        to: device of the table.
    """

    def __init__(self, shape: ModelShape, to: torch.device) -> None:
        super().__init__(shape.head_dim, rotary_percent=1.0, use_cpu_initialization=True)
        self.inv_freq = rotary_frequencies(shape).to(to)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Return cosines, then sines: float32 [s, 1, 1, d]."""
        angles = self.get_freqs_non_repeated(max_seq_len, offset)  # [s, d/2]
        return torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None, None, :]


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Return the angle per position of every pair of head dimensions, radians, float32 [d/2].

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
    # A wave that fits into the original context at least high_freq_factor times is kept, one that
    # fits less than low_freq_factor times is stretched, and between the two they are blended.
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1.0 - kept) * plain / scaling.factor + kept * plain


class VocabularyPadding:
    """Forward hook of the output layer that keeps padding rows out of the softmax.

    Otherwise the loss would depend on the number of padding rows, which differs between layouts. A
    logit of minus infinity has probability 0 and gradient 0, so padding rows never change.

    Args:
        num_own: rows of this rank's slice that are tokens; rows after them are padding.
    """

    def __init__(self, num_own: int) -> None:
        self.num_own = num_own

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        """Set the padding's logits in ``output``, ([s, b, vocab/tp], bias), to minus infinity."""
        logits, bias = output
        logits[..., self.num_own :] = -math.inf
        return logits, bias
