"""The weight table: every weight's Hugging Face name, Megatron name, axes, and masks folded in."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.masks.kinds import KINDS, ON_AXIS, SPLIT_OVER_TENSOR
from megashear.shape import ModelShape

AXES: dict[str, Callable[[ModelShape], int]] = {
    "vocab": lambda shape: shape.vocab_size,
    "head_dim": lambda shape: shape.head_dim,
    **{axis: kind.axis_length for axis, kind in ON_AXIS.items()},
}
"""Length of each named axis of a weight in a model of a given shape."""
SPLIT_AXES = frozenset(
    {"vocab", *(axis for axis, kind in ON_AXIS.items() if kind.split_over_tensor)}
)
"""Axes that tensor ranks divide."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One Hugging Face weight: its name, its axes, and the masks that act on it."""

    hf_name: str
    """Name in a Hugging Face directory, with ``{layer}`` if every layer has such a weight."""
    axes: tuple[str, ...]
    """Its axes, keys of `AXES`; the cut keeps the open units of each."""
    folds: tuple[tuple[str, ...], ...]
    """For each axis, the kinds of `masks.kinds` whose gates are multiplied into it. A kind includes
    the gates of the kind that it is `within`.

    Source: docs/algorithm.md section 3.
    """

    def extents(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the lengths of the axes in a model of ``shape``."""
        return tuple(AXES[axis](shape) for axis in self.axes)


class Fusion(enum.Enum):
    """How the Hugging Face weights of one Megatron parameter are joined along their first axis."""

    NONE = "one weight as it is"
    GATE_UP = "gate, then up"
    QKV = "for each query group its query heads, then its key, then its value"


@dataclass(frozen=True, slots=True)
class MegatronTensor:
    """One Megatron parameter and the Hugging Face weights it is made of, in order."""

    name: str
    """Name in the GPTModel of the local spec, with ``{layer}`` if every layer has one."""
    key: str
    """Key in a checkpoint. Layers are stacked along an additional first axis. Norms have the names
    that Transformer Engine gives them, so that checkpoints load into either spec."""
    parts: tuple[Weight, ...]
    """The weights, in the order in which `fusion` names them."""
    fusion: Fusion = Fusion.NONE
    """How they are joined."""

    @property
    def per_layer(self) -> bool:
        """Return whether every layer has such a parameter."""
        return "{layer}" in self.name

    def extents(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the shape of the whole parameter of one layer, before tensor ranks divide it."""
        rows = sum(part.extents(shape)[0] for part in self.parts)
        return (rows, *self.parts[0].extents(shape)[1:])

    def stored_extents(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the global shape in a checkpoint: [L, ...] for what every layer has."""
        return (shape.num_layers,) * self.per_layer + self.extents(shape)


def _plain(hf_name: str, name: str, key: str, axes: str, *folds: tuple[str, ...]) -> MegatronTensor:
    return MegatronTensor(name, key, (Weight(hf_name, tuple(axes.split()), folds),))


def _input(name: str, axis: str) -> Weight:
    # Its input comes from a norm, into which z_hidden is folded: nothing to fold here.
    return Weight(f"model.layers.{{layer}}.{name}.weight", (axis, "hidden"), ((), ()))


def _bias(name: str, axis: str) -> Weight:
    # It is cut with the rows of its weight.
    return Weight(f"model.layers.{{layer}}.{name}.bias", (axis,), ((),))


def _norm(hf_name: str, name: str, key: str, *kinds: str) -> MegatronTensor:
    return _plain(hf_name + ".weight", name + ".weight", key, "hidden", kinds)


_EMBEDDING = _plain(
    "model.embed_tokens.weight",
    "embedding.word_embeddings.weight",
    "embedding.word_embeddings.weight",
    "vocab hidden",
    (),
    ("hidden",),
)
_INPUT_NORM = _norm(
    "model.layers.{layer}.input_layernorm",
    "decoder.layers.{layer}.input_layernorm",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "hidden",
)
_QKV = MegatronTensor(
    "decoder.layers.{layer}.self_attention.linear_qkv.weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    (
        _input("self_attn.q_proj", "query"),
        _input("self_attn.k_proj", "key_value"),
        _input("self_attn.v_proj", "key_value"),  # shared by the heads of its group: no fold
    ),
    Fusion.QKV,
)
_QKV_BIAS = MegatronTensor(
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
    "decoder.layers.self_attention.linear_qkv.bias",
    (
        _bias("self_attn.q_proj", "query"),
        _bias("self_attn.k_proj", "key_value"),
        _bias("self_attn.v_proj", "key_value"),
    ),
    Fusion.QKV,
)
# All heads share them, and they are as wide as one head, which masks never change: neither folded
# nor cut.
_QK_NORMS = tuple(
    _plain(
        f"model.layers.{{layer}}.self_attn.{of}_norm.weight",
        f"decoder.layers.{{layer}}.self_attention.{of}_layernorm.weight",
        f"decoder.layers.self_attention.{of}_layernorm.weight",
        "head_dim",
        (),
    )
    for of in "qk"
)
_REST_OF_LAYER = (
    _plain(
        "model.layers.{layer}.self_attn.o_proj.weight",
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "hidden query",
        ("layer", "hidden"),
        ("head",),
    ),
    _norm(
        "model.layers.{layer}.post_attention_layernorm",
        "decoder.layers.{layer}.pre_mlp_layernorm",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "hidden",
    ),
    MegatronTensor(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc1.weight",
        (_input("mlp.gate_proj", "intermediate"), _input("mlp.up_proj", "intermediate")),
        Fusion.GATE_UP,
    ),
    _plain(
        "model.layers.{layer}.mlp.down_proj.weight",
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "decoder.layers.mlp.linear_fc2.weight",
        "hidden intermediate",
        ("layer", "hidden"),
        ("intermediate",),
    ),
)
_FINAL_NORM = ("model.norm", "decoder.final_layernorm", "decoder.final_layernorm.weight")
# Nothing is folded: z_hidden is in the final norm, and twice it would be another model.
_OUTPUT = _plain(
    "lm_head.weight", "output_layer.weight", "output_layer.weight", "vocab hidden", (), ()
)


def table(shape: ModelShape) -> tuple[MegatronTensor, ...]:
    """Return the parameters of a model of ``shape``, in the order of a Hugging Face file.

    Which rows there are depends on biases, norms and tied embeddings of the shape, not on its
    extents. A tied output layer has no row of its own: its matrix is the embedding, into which
    z_hidden is folded already, and so z_hidden must not be folded into the final norm.

    Source: transformers `LlamaForCausalLM` and its kin; megatron-core 0.16 `GPTModel`;
    docs/algorithm.md section 3.
    """
    return _table(shape.qkv_bias, shape.qk_norm, shape.tied_embeddings)


@functools.cache
def _table(qkv_bias: bool, qk_norm: bool, tied: bool) -> tuple[MegatronTensor, ...]:
    return (
        _EMBEDDING,
        _INPUT_NORM,
        _QKV,
        *([_QKV_BIAS] if qkv_bias else []),
        *(_QK_NORMS if qk_norm else []),
        *_REST_OF_LAYER,
        *([_norm(*_FINAL_NORM)] if tied else [_norm(*_FINAL_NORM, "hidden"), _OUTPUT]),
    )


VOCABULARY = (_EMBEDDING.key, _OUTPUT.key)
"""Keys of the matrices with a row for every token; runs pad them until tensor ranks divide them."""

NOT_WEIGHTS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
"""Names that are ignored in a Hugging Face file: rotary tables that old releases of transformers
stored, and that follow from config.json."""


def tensors(shape: ModelShape) -> Iterator[tuple[MegatronTensor, int | None]]:
    """Yield every Megatron parameter of a model with its layer, or None outside layers.

    The order is that of a Hugging Face file: embedding, layer by layer, final norm, output layer.
    """
    rows = table(shape)
    by_layer = [row for row in rows if row.per_layer]
    first = rows.index(by_layer[0])
    yield from ((row, None) for row in rows[:first])
    yield from ((row, layer) for layer in range(shape.num_layers) for row in by_layer)
    yield from ((row, None) for row in rows[first:] if not row.per_layer)


def weights(shape: ModelShape) -> Iterator[tuple[str, Weight, int | None]]:
    """Yield every Hugging Face weight of a model: full name, row of the table, layer."""
    for row, layer in tensors(shape):
        for part in row.parts:
            yield part.hf_name.format(layer=layer), part, layer


def owners(shape: ModelShape) -> dict[str, tuple[MegatronTensor, int | None]]:
    """Return for every Hugging Face weight's name the Megatron parameter with it, and the layer."""
    return {
        part.hf_name.format(layer=layer): (row, layer)
        for row, layer in tensors(shape)
        for part in row.parts
    }


def shape_of_shard(shape: ModelShape, tensor_size: int) -> ModelShape:
    """Return the extents that one tensor rank holds.

    A shard of a fused weight consists of its weights' shards, fused.
    """
    kinds = (KINDS[name] for name in SPLIT_OVER_TENSOR)
    own: dict[str, Any] = {kind.extent: kind.size(shape) // tensor_size for kind in kinds}
    return dataclasses.replace(shape, **own)


def padded_vocab_size(shape: ModelShape, tensor_size: int) -> int:
    """Return the rows of the embedding in a run, padded until tensor ranks divide them."""
    return -(-shape.vocab_size // tensor_size) * tensor_size


def own_vocab_size(shape: ModelShape, tensor_size: int, tensor_rank: int) -> int:
    """Return how many rows of a tensor rank's slice are tokens; padding follows them."""
    rows = padded_vocab_size(shape, tensor_size) // tensor_size
    return min(max(shape.vocab_size - tensor_rank * rows, 0), rows)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return every Hugging Face weight's shape by name; sizes add up to ``num_params()``."""
    return {name: weight.extents(shape) for name, weight, _ in weights(shape)}


def checkpoint_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor of a Megatron checkpoint by key."""
    return {row.key: row.stored_extents(shape) for row in table(shape)}


def fuse(row: MegatronTensor, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Return a whole Megatron parameter made of its Hugging Face weights, bit by bit.

    Args:
        row: the parameter's row of the table.
        parts: its weights in the order of ``row.parts``, shaped as in a model of ``shape``.
        shape: extents of the model.

    Returns:
        The parameter, shaped ``row.extents(shape)``.
    """
    if row.fusion is Fusion.NONE:
        return parts[0]
    if row.fusion is Fusion.GATE_UP:
        return torch.cat(list(parts))
    groups = [p.unflatten(0, (shape.num_query_groups, -1)) for p in parts]  # [G, x*d, h]
    return torch.cat(groups, dim=1).flatten(0, 1)  # [G * (H/G + 2) * d, h]


def split(row: MegatronTensor, whole: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Return the Hugging Face weights of a whole Megatron parameter: the inverse of `fuse`.

    Returns:
        Contiguous tensors in the order of ``row.parts``.
    """
    if row.fusion is Fusion.NONE:
        return (whole,)
    rows = [part.extents(shape)[0] for part in row.parts]
    if row.fusion is Fusion.GATE_UP:
        return tuple(part.contiguous() for part in whole.split(rows))
    groups = shape.num_query_groups
    by_group = whole.unflatten(0, (groups, -1))  # [G, (H/G + 2) * d, h]
    parts = by_group.split([r // groups for r in rows], dim=1)
    return tuple(part.flatten(0, 1).contiguous() for part in parts)


def check_names(found: Collection[str], shape: ModelShape, where: str) -> None:
    """Refuse names of Hugging Face weights that are not those of the table.

    Names of `NOT_WEIGHTS` are ignored.

    Args:
        found: the names.
        shape: extents that the model should have.
        where: owner of the weights, for the message ("HF checkpoint DIR").

    Raises:
        ValueError: names are missing or unknown; all are listed.
    """
    known = [name for name in found if not NOT_WEIGHTS.fullmatch(name)]
    _check_names(known, hf_shapes(shape), where, "weights")


def check_hf(found: Mapping[str, Sequence[int]], shape: ModelShape, where: str) -> None:
    """Refuse names and shapes of Hugging Face weights that are not those of the table.

    Raises:
        ValueError: names are missing or unknown, all listed; or a shape differs, with its name,
            the shape found and the shape wanted.
    """
    check_names(found, shape, where)
    _check_shapes(found, hf_shapes(shape), where)


def check_stored(found: Mapping[str, Sequence[int]], shape: ModelShape, where: str) -> None:
    """Refuse keys and global shapes of a Megatron checkpoint that are not those of the table.

    Raises:
        ValueError: keys are missing or unknown, all listed; or a shape differs.
    """
    _check_names(found, checkpoint_shapes(shape), where, "tensors")
    _check_shapes(found, checkpoint_shapes(shape), where)


def check_extents(name: str, found: Sequence[int], wanted: Sequence[int], where: str) -> None:
    """Refuse a tensor of another shape than the one wanted.

    Raises:
        ValueError: with both shapes.
    """
    if tuple(found) != tuple(wanted):
        raise ValueError(
            f"{where}: {name} has shape {list(found)}, its shape in this model is "
            f"{list(wanted)}; is config.json or the shape given another model's?"
        )


_WRAPPERS = {
    "module.": "DDP",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
}
"""Wrappers of a model by the prefix that they give to every name."""


def _check_names(found: Collection[str], wanted: Collection[str], where: str, things: str) -> None:
    unknown, missing = set(found) - set(wanted), set(wanted) - set(found)
    wrapper = next(iter(unknown), "").partition(".")[0] + "."
    if missing and {name.removeprefix(wrapper) for name in unknown} == set(wanted):
        origin = "; save the model alone, not the one it is a part of"
        if wrapper in _WRAPPERS:
            origin = f", which {_WRAPPERS[wrapper]} puts there; save the model that is wrapped"
        raise ValueError(f"{where}: all {len(unknown)} {things} begin with {wrapper!r}{origin}")
    complaints = []
    if unknown:
        complaints.append(f"has {len(unknown)} {things} this model does not know: {_list(unknown)}")
    if missing:
        complaints.append(f"lacks {len(missing)} {things} of this model: {_list(missing)}")
    if complaints:
        raise ValueError(f"{where} {'; it '.join(complaints)}")


def _check_shapes(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], where: str
) -> None:
    for name, extents in wanted.items():
        check_extents(name, found[name], extents, where)


def _list(names: Collection[str]) -> str:
    """Return all names joined in natural order: layer 2 before layer 10."""
    return ", ".join(
        sorted(names, key=lambda n: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", n)])
    )
