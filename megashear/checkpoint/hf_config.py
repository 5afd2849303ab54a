"""Hugging Face's config.json of a LLaMA to and from a ModelShape, refusing other mathematics."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megashear.shape import ModelShape

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_DEFAULT_MAX_POSITIONS = 2048
"""What an absent field means, tokens for the last. Source: transformers `LlamaConfig`."""

# Fields that change what a model computes, and the values under which they change nothing here.
# Absent or null is always fine.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "partial_rotary_factor": (1.0,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "quantization_config": (),
    "auto_map": (),
}
_WAYS_OUT = {
    "tie_word_embeddings": "tied embeddings are not supported yet: save the model with "
    "lm_head.weight a copy of model.embed_tokens.weight and tie_word_embeddings false",
    "quantization_config": "save the model in float32, bfloat16 or float16 first",
    "auto_map": "code from a model directory is never run: save the model as a stock "
    "LlamaForCausalLM",
}
_ROPE_FIELDS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def read_config(directory: Path | str) -> dict[str, Any]:
    """The fields of ``directory/config.json``.

    Raises:
        ValueError: the directory or the file is missing, or the file is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no Hugging Face checkpoint at {directory}: it is not a directory")
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"HF checkpoint {directory} has no {CONFIG}; is it the right directory?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def read_shape(directory: Path | str) -> ModelShape:
    """Extents of the model in a Hugging Face directory, from its config.json.

    Fields that do not change what the model computes (``pretraining_tp``, ``use_cache``, dropout)
    are ignored; every one that does and is not understood is refused.

    Raises:
        ValueError: no such directory or config.json; not a LLaMA; a field missing or refused,
            with its value and the value wanted.
    """
    return shape_of_config(read_config(directory), str(Path(directory) / CONFIG))


def shape_of_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Extents that the fields of a config.json describe; ``where`` names it in messages.

    Raises:
        ValueError: as `read_shape`.
    """
    if config.get("model_type") != "llama":
        raise ValueError(
            f"{where}: model_type is {config.get('model_type')!r}, wanted 'llama'; other families "
            f"are not supported"
        )
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise ValueError(f"{where}: architectures is {architectures}, wanted ['LlamaForCausalLM']")
    for name, neutral in _NEUTRAL.items():
        _refuse_unless(name, config.get(name), neutral, where)
    heads = _size(config, "num_attention_heads", where)
    hidden = _size(config, "hidden_size", where)
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"{where}: head_dim is not given and hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}; write head_dim into it"
        )
    return ModelShape(
        num_layers=_size(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", where, default=heads),
        head_dim=_size(config, "head_dim", where, default=hidden // heads),
        ffn_hidden_size=_size(config, "intermediate_size", where),
        vocab_size=_size(config, "vocab_size", where),
        norm_epsilon=_number(config, "rms_norm_eps", where),
        rotary_base=_rotary_base(config, where),
        max_position_embeddings=_size(
            config, "max_position_embeddings", where, default=_DEFAULT_MAX_POSITIONS
        ),
    )


def config_of_shape(
    shape: ModelShape, *, dtype: str, token_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a config.json from which transformers and vLLM build a model of ``shape``.

    ``head_dim`` is always there, because a pruned model's is not hidden_size / heads, and the
    rotary base twice: transformers before release 5 reads ``rope_theta``, later releases read
    ``rope_parameters``.

    Args:
        shape: extents of the model.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` as far as they are
            known; unknown ones are written as null, or LlamaConfig would make them 1 and 2.
    """
    if shape.hidden_size % shape.num_attention_heads:
        logger.warning(
            "hidden_size %d is not a multiple of num_attention_heads %d: transformers from "
            "release 5 refuses such a LLaMA, although head_dim is given",
            shape.hidden_size,
            shape.num_attention_heads,
        )
    ids = token_ids or {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ids.get("eos_token_id"),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "pad_token_id": ids.get("pad_token_id"),
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_theta": shape.rotary_base, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": shape.rotary_base,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _refuse_unless(name: str, found: Any, neutral: tuple[Any, ...], where: str) -> None:
    if found is None or found in neutral:
        return
    wanted = " or ".join(json.dumps(value) for value in neutral) or "absent or null"
    way_out = f"; {_WAYS_OUT[name]}" if name in _WAYS_OUT else ""
    raise ValueError(f"{where}: {name} is {json.dumps(found)}, wanted {wanted}{way_out}")


def _size(config: Mapping[str, Any], name: str, where: str, *, default: int | None = None) -> int:
    found = config.get(name)
    found = default if found is None else found
    if found is None:
        raise ValueError(f"{where}: {name} is missing; it must be a positive integer")
    if not isinstance(found, int) or isinstance(found, bool) or found <= 0:
        raise ValueError(f"{where}: {name} is {found!r}; it must be a positive integer")
    return found


def _number(config: Mapping[str, Any], name: str, where: str) -> float:
    found = config.get(name)
    found = _DEFAULTS[name] if found is None else found
    if not isinstance(found, int | float) or isinstance(found, bool) or not found > 0:
        raise ValueError(f"{where}: {name} is {found!r}; it must be a positive number")
    return float(found)


def _rotary_base(config: Mapping[str, Any], where: str) -> float:
    """The base, wherever the release that wrote the file put it; scaled tables are refused."""
    bases = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: {name} is {rope!r}; it must be an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or set(rope) - _ROPE_FIELDS:
            raise ValueError(
                f"{where}: {name} is {json.dumps(rope)}, wanted rope_type 'default' and nothing "
                f"but rope_theta; scaled rotary embeddings are not supported"
            )
        _refuse_unless(
            f"{name}.partial_rotary_factor", rope.get("partial_rotary_factor"), (1.0,), where
        )
        if rope.get("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = _number(rope, "rope_theta", where)
    if config.get("rope_theta") is not None or not bases:
        bases["rope_theta"] = _number(config, "rope_theta", where)
    if len(set(bases.values())) > 1:
        # releases of transformers differ in which one they follow
        found = " and ".join(f"{name} {base:g}" for name, base in bases.items())
        raise ValueError(f"{where} contradicts itself: {found}; keep the one the model has")
    return next(iter(bases.values()))
