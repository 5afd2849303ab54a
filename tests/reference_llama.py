"""A masked LLaMA in plain torch, written from docs/algorithm.md section 2, to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from megashear.shape import ModelShape


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Extents of every weight by its Hugging Face name, spelled out here once more on purpose."""
    h, d, i = shape.hidden_size, shape.head_dim, shape.ffn_hidden_size
    q, kv = shape.num_attention_heads * d, shape.num_query_groups * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, h)}
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (h,)
        shapes[at + "self_attn.q_proj.weight"] = (q, h)
        shapes[at + "self_attn.k_proj.weight"] = (kv, h)
        shapes[at + "self_attn.v_proj.weight"] = (kv, h)
        if shape.qkv_bias:
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{at}self_attn.{part}_proj.bias"] = (rows,)
        if shape.qk_norm:
            shapes[at + "self_attn.q_norm.weight"] = (d,)
            shapes[at + "self_attn.k_norm.weight"] = (d,)
        shapes[at + "self_attn.o_proj.weight"] = (h, q)
        shapes[at + "post_attention_layernorm.weight"] = (h,)
        shapes[at + "mlp.gate_proj.weight"] = (i, h)
        shapes[at + "mlp.up_proj.weight"] = (i, h)
        shapes[at + "mlp.down_proj.weight"] = (h, i)
    shapes["model.norm.weight"] = (h,)
    if not shape.tied_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, h)
    return shapes


def random_weights(shape: ModelShape, seed: int = 0, scale: float = 0.2) -> dict[str, Tensor]:
    """Weights by Hugging Face name, float32; norms near 1, so that no gate or norm is a no-op.

    Biases are as large as what they are added to.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(extents, generator=generator) * (1.0 if "bias" in name else scale)
        + float("norm" in name)
        for name, extents in hf_shapes(shape).items()
    }


def forward(
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    tokens: Tensor,
    gates: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits of the masked model; differentiable in weights and gates.

    Args:
        weights: by Hugging Face name; promoted to float32.
        shape: extents of ``weights``.
        tokens: token ids, [b, s].
        gates: whole rows by kind, any subset of hidden [h], layer [L], head [L, H] or with
            grouped queries [L * G, H/G], group [L, G] and intermediate [L, I] (extra axes of
            length 1 are fine). An absent kind is open.

    Returns:
        Logits, float32, [b, s, v].
    """
    w = {name: weight.float() for name, weight in weights.items()}
    L, H, G = shape.num_layers, shape.num_attention_heads, shape.num_query_groups  # noqa: N806
    d, per_group = shape.head_dim, shape.heads_per_group
    z = dict(gates or {})
    z_hidden = z["hidden"].reshape(shape.hidden_size) if "hidden" in z else None
    z_layer = z["layer"].reshape(L) if "layer" in z else torch.ones(L)
    z_head = torch.ones(L, H)
    if "head" in z:  # head j of group g is query head g * H/G + j
        inside = z["head"].reshape(L, G, per_group)
        z_head = torch.cat([inside[:, g] for g in range(G)], dim=1)
    if "group" in z:  # a group's gate acts on every query head of the group
        z_head = z_head * z["group"].reshape(L, G).repeat_interleave(per_group, dim=1)
    z_neuron = z["intermediate"].reshape(L, -1) if "intermediate" in z else None
    if z_hidden is None:
        z_hidden = torch.ones(shape.hidden_size)
    is_open = (z_hidden != 0).nonzero().squeeze(1)  # [h']

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        mean_square = x[..., is_open].square().mean(-1, keepdim=True)  # over open dims only
        return x * torch.rsqrt(mean_square + shape.norm_epsilon) * weight * z_hidden

    def head_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.norm_epsilon) * weight

    b, s = tokens.shape
    angle = torch.arange(s).float()[:, None] * frequencies(shape)  # [s, d/2]
    cos, sin = (f(torch.cat([angle, angle], dim=-1)) for f in (torch.cos, torch.sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., : d // 2], x[..., d // 2 :]
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    future = torch.ones(s, s).triu(1).bool()
    x = w["model.embed_tokens.weight"][tokens] * z_hidden  # [b, s, h]
    for layer in range(L):
        at = f"model.layers.{layer}."
        y = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (y @ w[f"{at}self_attn.{part}_proj.weight"].T for part in "qkv")
        if shape.qkv_bias:
            q, k, v = (
                x + w[f"{at}self_attn.{p}_proj.bias"] for x, p in ((q, "q"), (k, "k"), (v, "v"))
            )
        q, k, v = (t.view(b, s, -1, d).transpose(1, 2) for t in (q, k, v))
        # [b, H, s, d] and twice [b, G, s, d]
        if shape.qk_norm:
            q = head_norm(q, w[at + "self_attn.q_norm.weight"])
            k = head_norm(k, w[at + "self_attn.k_norm.weight"])
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(per_group, dim=1) for t in (k, v))  # [b, H, s, d]
        scores = (q @ k.transpose(2, 3)) / d**0.5
        context = scores.masked_fill(future, float("-inf")).softmax(-1) @ v  # [b, H, s, d]
        context = context * z_head[layer].view(H, 1, 1)
        y = context.transpose(1, 2).reshape(b, s, H * d) @ w[at + "self_attn.o_proj.weight"].T
        x = x + y * z_layer[layer] * z_hidden
        y = norm(x, w[at + "post_attention_layernorm.weight"])
        y = F.silu(y @ w[at + "mlp.gate_proj.weight"].T) * (y @ w[at + "mlp.up_proj.weight"].T)
        if z_neuron is not None:
            y = y * z_neuron[layer]
        y = y @ w[at + "mlp.down_proj.weight"].T
        x = x + y * z_layer[layer] * z_hidden
    output = w["model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ output.T


def frequencies(shape: ModelShape) -> Tensor:
    """Angle per position of each pair of dimensions, [d/2], one pair at a time."""
    scaling, found = shape.rope_scaling, []
    for pair in range(shape.head_dim // 2):
        frequency = shape.rotary_base ** (-2 * pair / shape.head_dim)
        wavelength = 2 * math.pi / frequency  # positions per turn
        if scaling is not None and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling is not None:
            longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
            shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength >= shortest:
                smooth = scaling.original_max_position_embeddings / wavelength
                smooth = (smooth - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        found.append(frequency)
    return torch.tensor(found)


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
