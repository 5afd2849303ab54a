"""Hugging Face's config.json to and from a ModelShape, family by family, refusing the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megashear.checkpoint.hf_fields import HARMLESS, KEPT, NEUTRAL, READ, WAYS_OUT
from megashear.files.structured import read_json_object
from megashear.shape import Family, ModelShape, RopeScaling, check_extent, check_number

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """What one ``model_type`` means, beyond the fields that all of them share.

    Source: the family's configuration and modelling code in transformers, release 5.
    """

    architecture: str
    """The class with an output layer."""
    max_positions: int
    """What an absent ``max_position_embeddings`` means, tokens."""
    num_key_value_heads: int | None = None
    """What an absent ``num_key_value_heads`` means; None, as many as query heads."""
    head_dim: int | None = None
    """What an absent ``head_dim`` means; None, hidden size over heads."""
    sliding_window: int | None = None
    """What an absent ``sliding_window`` means, tokens."""
    qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES: dict[Family, _Family] = {
    "llama": _Family(architecture="LlamaForCausalLM", max_positions=2048),
    "mistral": _Family(
        architecture="MistralForCausalLM",
        max_positions=131072,
        num_key_value_heads=8,
        sliding_window=4096,
    ),
    "qwen2": _Family(
        architecture="Qwen2ForCausalLM",
        max_positions=32768,
        num_key_value_heads=32,
        qkv_bias=True,
    ),
    "qwen3": _Family(
        architecture="Qwen3ForCausalLM",
        max_positions=32768,
        num_key_value_heads=32,
        head_dim=128,
        qk_norm=True,
    ),
}
_NORM_EPSILON = 1e-6
_ROTARY_BASE = 10000.0
"""What absent fields mean in every family."""

_ROPE_FIELDS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""Numbers that each kind of rotary table is made with; all of them must be there."""


def read_config(directory: Path | str) -> dict[str, Any]:
    """Read the fields of ``directory/config.json``.

    Raises:
        ValueError: the directory or the file is missing, or the file is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no Hugging Face checkpoint at {directory}: it is not a directory")
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"HF checkpoint {directory} has no {CONFIG}; is it the right directory?")
    return read_json_object(path, wide_integers=True)


def read_shape(directory: Path | str) -> ModelShape:
    """Read the shape of a model from a Hugging Face directory's config.json.

    Fields that do not change what the model computes (``pretraining_tp``, ``use_cache``, dropout)
    are ignored. A field that does and is not honoured is refused; so is one that nothing is known
    of, because dropping one that mattered could not be seen in the result.

    Raises:
        ValueError: no such directory or config.json; another family; a field missing or refused,
            with its value and the value wanted.
    """
    return shape_of_config(read_config(directory), str(Path(directory) / CONFIG))


def shape_of_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape that the fields of a config.json describe; messages name it ``where``.

    Raises:
        ValueError: as `read_shape`.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(
            f"{where}: model_type is {name!r}, wanted one of {', '.join(_FAMILIES)}; other "
            f"families are not supported"
        )
    family = _FAMILIES[name]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ValueError(
            f"{where}: architectures is {architectures}, wanted ['{family.architecture}']"
        )
    for field, neutral in NEUTRAL.items():
        _refuse_unless(field, config.get(field), neutral, where)
    _refuse_unknown(config, where)
    heads = _size(config, "num_attention_heads", where)
    hidden = _size(config, "hidden_size", where)
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise ValueError(
            f"{where}: head_dim is not given and hidden_size {hidden} is not a multiple of "
            f"num_attention_heads {heads}; write head_dim into it"
        )
    # null means as many as query heads in every family, absence does not
    groups = heads if "num_key_value_heads" in config else family.num_key_value_heads or heads
    base, scaling = _rotary(config, where)
    return ModelShape(
        num_layers=_size(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", where, default=groups),
        head_dim=_size(config, "head_dim", where, default=family.head_dim or hidden // heads),
        ffn_hidden_size=_size(config, "intermediate_size", where),
        vocab_size=_size(config, "vocab_size", where),
        norm_epsilon=_number(config, "rms_norm_eps", where, default=_NORM_EPSILON),
        rotary_base=base,
        max_position_embeddings=_size(
            config, "max_position_embeddings", where, default=family.max_positions
        ),
        family=name,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=_flag(config, "tie_word_embeddings", where),
        rope_scaling=scaling,
        sliding_window=_sliding_window(config, name, where),
    )


def check_expressible(shape: ModelShape) -> None:
    """Refuse a shape that no config.json of its family describes.

    Raises:
        ValueError: names the field, its value and the value that the family has.
    """
    family = _FAMILIES[shape.family]
    for field in ("qkv_bias", "qk_norm"):
        found, wanted = getattr(shape, field), getattr(family, field)
        if found != wanted:
            raise ValueError(
                f"{field} is {found}, and a {shape.family} model in Hugging Face's format has "
                f"{wanted}; no config.json describes this model"
            )
    if shape.sliding_window is not None and shape.family != "mistral":
        raise ValueError(
            f"sliding_window is {shape.sliding_window}, and a {shape.family} model in Hugging "
            f"Face's format has none; no config.json describes this model"
        )


def config_of_shape(
    shape: ModelShape,
    *,
    dtype: str,
    token_ids: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return fields of a config.json from which transformers and vLLM build a model of ``shape``.

    ``head_dim`` is always there, because a pruned model's is not hidden_size / heads, and the
    rotary table twice: transformers before release 5 reads ``rope_theta`` and ``rope_scaling``,
    later releases read ``rope_parameters``.

    Args:
        shape: the model.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` as far as they are
            known; unknown ones are written as null, or LlamaConfig would make them 1 and 2.
        kept: `hf_fields.kept_fields` of the config.json that the model came with.

    Raises:
        ValueError: the family's config.json cannot say what the shape says.
    """
    check_expressible(shape)
    family = _FAMILIES[shape.family]
    ids = token_ids or {}
    scaling = _rope_fields(shape.rope_scaling)
    config = {
        "architectures": [family.architecture],
        "model_type": shape.family,
        **KEPT,
        **(kept or {}),
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ids.get("eos_token_id"),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "pad_token_id": ids.get("pad_token_id"),
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {
            "rope_theta": shape.rotary_base,
            **(scaling or {"rope_type": "default"}),
        },
        "rope_scaling": scaling,
        "rope_theta": shape.rotary_base,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": shape.vocab_size,
    }
    if shape.family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    if shape.family == "qwen3":
        config |= {"attention_bias": False}
    if shape.family == "mistral":
        config |= {"sliding_window": shape.sliding_window}
    if shape.family in ("qwen2", "qwen3"):
        # said outright, for readers that look at one of the three alone
        config |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": shape.num_layers,
        }
    return config


def _refuse_unless(name: str, found: Any, neutral: tuple[Any, ...], where: str) -> None:
    if found is None or found in neutral:
        return
    wanted = " or ".join(json.dumps(value) for value in neutral) or "absent or null"
    way_out = f"; {WAYS_OUT[name]}" if name in WAYS_OUT else ""
    raise ValueError(f"{where}: {name} is {json.dumps(found)}, wanted {wanted}{way_out}")


def _size(config: Mapping[str, Any], name: str, where: str, *, default: int | None = None) -> int:
    found = config.get(name)
    found = default if found is None else found
    if found is None:
        raise ValueError(f"{where}: {name} is missing; it must be a positive integer")
    return check_extent(found, name, f"{where}: {name}")


def _number(
    config: Mapping[str, Any], name: str, where: str, *, default: float | None = None
) -> float:
    found = config.get(name)
    found = default if found is None else found
    if found is None:
        raise ValueError(f"{where}: {name} is missing; it must be a positive number")
    return check_number(found, name, f"{where}: {name}")


def _short(value: Any) -> str:
    """Return a value for a message, in a line of it at most; a huge number has no text at all."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "a number beyond all bounds"
    return value if isinstance(value, str) else repr(value)[:80]


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    found = config.get(name)
    if found not in (None, True, False):
        raise ValueError(f"{where}: {name} is {found!r}; it must be true or false")
    return bool(found)


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    known = {*READ, *NEUTRAL, *HARMLESS}
    unknown = {
        name: value
        for name, value in config.items()
        if value is not None and name not in known and not name.startswith("_")
    }
    if unknown:
        found = ", ".join(f"{name} ({json.dumps(value)})" for name, value in unknown.items())
        raise ValueError(
            f"{where} has fields that megashear does not know, and that may change what the model "
            f"computes: {found}; if they do not, remove them from it"
        )


def _sliding_window(config: Mapping[str, Any], name: Family, where: str) -> int | None:
    """Return the window of all layers, and refuse a window of some layers."""
    types = config.get("layer_types")
    if types is not None and not isinstance(types, list):
        raise ValueError(f"{where}: layer_types is {_short(types)}; it must be a list or null")
    if other := {_short(kind) for kind in types or () if kind != "full_attention"}:
        raise ValueError(
            f"{where}: layer_types has {', '.join(sorted(other))}, wanted full_attention alone; "
            f"layers that see a window each are not supported"
        )
    family = _FAMILIES[name]
    if name == "mistral":
        found = config.get("sliding_window", family.sliding_window)
        return None if found is None else _size(config, "sliding_window", where, default=found)
    if name == "llama":
        _refuse_unless("sliding_window", config.get("sliding_window"), (), where)
    # the others have it without using it: use_sliding_window was held to false
    return None


def _rotary(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Return base and scaling, wherever the release that wrote the file put them."""
    bases, scalings = {}, {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: {name} is {rope!r}; it must be an object or null")
        scalings[name] = _rope_scaling(rope, name, where)
        if rope.get("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = _number(rope, "rope_theta", where)
    if config.get("rope_theta") is not None or not bases:
        bases["rope_theta"] = _number(config, "rope_theta", where, default=_ROTARY_BASE)
    # releases of transformers differ in which one they follow
    if len(set(bases.values())) > 1:
        found = " and ".join(f"{name} {base:g}" for name, base in bases.items())
        raise ValueError(f"{where} contradicts itself: {found}; keep the one the model has")
    if len(set(scalings.values())) > 1:
        found = " and ".join(f"{name} {json.dumps(config[name])}" for name in scalings)
        raise ValueError(f"{where} contradicts itself: {found}; keep the one the model has")
    return next(iter(bases.values())), next(iter(scalings.values()), None)


def _rope_scaling(rope: Mapping[str, Any], name: str, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(_ROPE_NUMBERS):  # a list, which asks for no hash
        raise ValueError(
            f"{where}: {name} has rope_type {kind!r}, wanted one of {', '.join(_ROPE_NUMBERS)}; "
            f"tables of other kinds are not supported"
        )
    odd = [key for key in rope if key not in {*_ROPE_FIELDS, *_ROPE_NUMBERS[kind]}]
    if any(rope[key] is not None for key in odd):
        raise ValueError(
            f"{where}: {name} is {json.dumps(rope)}, and rope_type {kind!r} has no "
            f"{', '.join(odd)}; if they have no effect, remove them"
        )
    partial = rope.get("partial_rotary_factor")
    _refuse_unless(f"{name}.partial_rotary_factor", partial, (1.0,), where)
    if kind == "default":
        return None
    numbers: dict[str, Any] = {
        key: _number(rope, key, f"{where}: {name}") for key in _ROPE_NUMBERS[kind]
    }
    if "original_max_position_embeddings" in numbers:
        numbers["original_max_position_embeddings"] = _size(
            rope, "original_max_position_embeddings", f"{where}: {name}"
        )
    return RopeScaling(kind=kind, **numbers)


def _rope_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the fields of a rotary table as Hugging Face spells them."""
    if scaling is None:
        return None
    values = asdict(scaling)
    return {"rope_type": scaling.kind} | {key: values[key] for key in _ROPE_NUMBERS[scaling.kind]}
