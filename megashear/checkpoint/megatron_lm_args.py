"""Megatron-LM's ``args`` of a GPT to and from a ModelShape, refusing other mathematics."""

from __future__ import annotations

import argparse
from typing import Any

from megashear.shape import Family, ModelShape, RopeScaling, check_extent, check_number

CHECKPOINT_VERSION = 3.0
"""``checkpoint_version``: from 2.0 on q, k and v lie group by group. Source: Megatron-LM,
megatron/training/checkpointing.py."""

_MISSING: Any = None
"""Absent and None mean the same: Megatron-LM's default, which changes nothing here."""

# Arguments that change what a model computes, and the values under which they change nothing here;
# absent or None is always fine. Names of TransformerConfig's fields and of flags alike, because
# Megatron-LM copies every argument that is named like a field into its TransformerConfig.
# Source: megatron-core 0.16.1, TransformerConfig and GPTModel; Megatron-LM, arguments.py.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "onnx_safe": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "no_rope_freq": (),
    "mrope_section": (),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "window_size": (),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    "num_experts": (),
    "mtp_num_layers": (0,),
    "is_hybrid_model": (False,),
    "hybrid_layer_pattern": (),
    "hybrid_override_pattern": (),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (),
    "retro_add_retriever": (False,),
    "use_mup": (False,),
    "use_kitchen": (False,),
    "fp8": (),
    "fp4": (),
    "spec": (),
}
# What a LLaMA must have, and what Megatron-LM does where it is not said.
_WANTED: dict[str, tuple[Any, Any]] = {
    "position_embedding_type": ("rope", "learned_absolute"),
    "normalization": ("RMSNorm", "LayerNorm"),
    "swiglu": (True, False),
    "add_bias_linear": (False, True),
}
_ROPE_LLAMA3: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What ``use_rope_scaling`` implies. Source: megatron-core 0.16.1, `RotaryEmbedding`."""
_ROPE_LLAMA3_FACTOR = 8.0
"""``rope_scaling_factor`` unless given, as there."""


def arguments_of_shape(shape: ModelShape) -> argparse.Namespace:
    """Return the arguments from which Megatron-LM builds a GPT of ``shape``, for ``common.pt``.

    They are what ``--use-checkpoint-args`` takes over and what every load compares, and the rest
    of what fixes the model, which Megatron-LM does not take over: see `flags_beside`. No value of
    a run is among them.

    Raises:
        ValueError: Megatron-LM has no arguments for this rotary table.
    """
    rope = shape.rope_scaling
    if rope is not None and rope.kind == "llama3":
        for name, wanted in _ROPE_LLAMA3.items():
            if (found := getattr(rope, name)) != wanted:
                raise ValueError(
                    f"Megatron-LM has no argument for rope_scaling.{name} {found:g}: its "
                    f"--use-rope-scaling means {wanted:g}"
                )
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=shape.heads_per_group > 1,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        seq_length=shape.max_position_embeddings,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        make_vocab_size_divisible_by=1,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=_plain_number(shape.rotary_base),
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=(
            _plain_number(rope.factor) if rope is not None and rope.kind == "linear" else None
        ),
        use_rope_scaling=rope is not None and rope.kind == "llama3",
        rope_scaling_factor=(
            rope.factor if rope is not None and rope.kind == "llama3" else _ROPE_LLAMA3_FACTOR
        ),
        normalization="RMSNorm",
        norm_epsilon=shape.norm_epsilon,
        apply_layernorm_1p=False,
        qk_layernorm=shape.qk_norm,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # a checkpoint has no layout; where a run's differs, Megatron-LM leaves generators alone
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
    )


def common_state(shape: ModelShape, iteration: int) -> dict[str, Any]:
    """Return what ``common.pt`` holds for Megatron-LM beside tensors.

    It is empty where Megatron-LM has no arguments for the model.
    """
    try:
        args = arguments_of_shape(shape)
    except ValueError:
        return {}
    return {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}


def flags_beside(shape: ModelShape) -> list[str]:
    """Return the flags that Megatron-LM needs on its command line, because
    ``--use-checkpoint-args`` does not read these arguments.

    Source: Megatron-LM, megatron/training/checkpointing.py, `load_args_from_checkpoint`.
    """
    args = arguments_of_shape(shape)
    flags = [f"--norm-epsilon {args.norm_epsilon:g}"]
    if args.qk_layernorm:
        flags.append("--qk-layernorm")
    if args.use_rope_scaling:
        flags += ["--use-rope-scaling", f"--rope-scaling-factor {args.rope_scaling_factor:g}"]
    if args.rotary_seq_len_interpolation_factor is not None:
        factor = args.rotary_seq_len_interpolation_factor
        flags.append(f"--rotary-seq-len-interpolation-factor {factor:g}")
    return flags


def shape_of_arguments(args: argparse.Namespace, where: str, *, vocab_size: int) -> ModelShape:
    """Return the model that Megatron-LM builds from its arguments.

    Args:
        args: as a checkpoint holds them, after Megatron-LM has filled in what follows from others.
        where: names the checkpoint in messages.
        vocab_size: rows of the vocabulary to keep; see `vocab_size_of_arguments`.

    Raises:
        ValueError: an argument is missing, or changes what the model computes in a way that is
            not supported; with its value and the value wanted.
    """
    for name, (wanted, default) in _WANTED.items():
        found = getattr(args, name, _MISSING)
        found = default if found is None else found
        if found != wanted:
            raise ValueError(
                f"{where}: {_named(name)} is {found!r}, wanted {wanted!r}; other models are not "
                f"supported"
            )
    for name, neutral in _NEUTRAL.items():
        found = getattr(args, name, _MISSING)
        if found is not None and found not in neutral:
            wanted = " or ".join(map(repr, neutral)) or "absent or None"
            raise ValueError(
                f"{where}: {_named(name)} is {found!r}, wanted {wanted}; it changes what the model "
                f"computes and is not supported"
            )
    heads = _size(args, "num_attention_heads", where)
    hidden = _size(args, "hidden_size", where)
    # Megatron-LM reads num_query_groups, whose default is 1, only with this flag
    grouped = getattr(args, "group_query_attention", False)
    qk_norm = bool(getattr(args, "qk_layernorm", False))
    qkv_bias = bool(getattr(args, "add_qkv_bias", False))
    return ModelShape(
        num_layers=_size(args, "num_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_size(args, "num_query_groups", where) if grouped else heads,
        head_dim=_size(args, "kv_channels", where, default=hidden // heads),
        ffn_hidden_size=_size(args, "ffn_hidden_size", where),
        vocab_size=vocab_size,
        norm_epsilon=_number(args, "norm_epsilon", where, default=1e-5),
        rotary_base=_number(args, "rotary_base", where, default=10000.0),
        max_position_embeddings=_size(args, "max_position_embeddings", where),
        family=_family(qkv_bias=qkv_bias, qk_norm=qk_norm, where=where),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
        rope_scaling=_rope_scaling(args, where),
    )


def vocab_size_of_arguments(args: argparse.Namespace, where: str, *, stored: int) -> int | None:
    """Return how many of the ``stored`` rows of a padded vocabulary are tokens; None if unknown.

    Raises:
        ValueError: the arguments contradict what is stored.
    """
    known = getattr(args, "vocab_size", None)
    if known is not None and not 0 < known <= stored:
        raise ValueError(
            f"{where}: --vocab-size is {known}, and the checkpoint stores {stored} rows of the "
            f"vocabulary"
        )
    return known


def _rope_scaling(args: argparse.Namespace, where: str) -> RopeScaling | None:
    factor = _number(args, "rotary_seq_len_interpolation_factor", where, default=1.0)
    linear = factor != 1
    if getattr(args, "use_rope_scaling", False):
        if linear:
            raise ValueError(
                f"{where}: --use-rope-scaling and --rotary-seq-len-interpolation-factor {factor:g} "
                f"together are not supported"
            )
        value = _number(args, "rope_scaling_factor", where, default=_ROPE_LLAMA3_FACTOR)
        return RopeScaling(kind="llama3", factor=value, **_ROPE_LLAMA3)
    return RopeScaling(kind="linear", factor=factor) if linear else None


def _family(*, qkv_bias: bool, qk_norm: bool, where: str) -> Family:
    """Return the family whose class in transformers computes the same."""
    if qkv_bias and qk_norm:
        raise ValueError(
            f"{where}: --add-qkv-bias and --qk-layernorm together belong to no family that is "
            f"supported"
        )
    return "qwen3" if qk_norm else "qwen2" if qkv_bias else "llama"


def _size(args: argparse.Namespace, name: str, where: str, *, default: int | None = None) -> int:
    found = getattr(args, name, None)
    found = default if found is None else found
    return check_extent(found, name, f"{where}: {_named(name)}")


def _number(args: argparse.Namespace, name: str, where: str, *, default: float) -> float:
    found = getattr(args, name, None)
    found = default if found is None else found
    return check_number(found, name, f"{where}: {_named(name)}")


def _plain_number(value: float) -> int | float:
    """Return a whole number as int, which is the type of Megatron-LM's flags."""
    return int(value) if value == int(value) else value


def _named(argument: str) -> str:
    return f"argument {argument}"
