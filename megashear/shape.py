"""ModelShape: extents of a model of the LLaMA family, with presets and parameter counts."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megashear.bounds import MOST_EXTENT
from megashear.files.structured import read_json_object

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)
"""Families by their names in transformers (``model_type``)."""


MOST_LAYERS = 2**16
"""Bound of the layers, more than any model has."""
MOST_NUMBER = 1e18
"""Bound of numbers in a model's description, for float32 goes to 3e38."""


def check_extent(value: object, name: str, place: str = "") -> int:
    """Return an extent of a model; messages call it ``place``, or else ``name``.

    Raises:
        ValueError: the value is no whole number, not positive, or more than any model has.
    """
    most = MOST_LAYERS if name in ("num_layers", "num_hidden_layers") else MOST_EXTENT
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{place or name} is {value!r}; it must be a positive integer")
    if value > most:
        raise ValueError(f"{place or name} is {value}; it must be at most {most:,}")
    return value


def check_number(value: object, name: str, place: str = "") -> float:
    """Return a number of a model's description; messages call it ``place``, or else ``name``.

    Raises:
        ValueError: the value is no number, not positive, not finite, or above `MOST_NUMBER`.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{place or name} is {value!r}; it must be a positive number")
    if value > MOST_NUMBER:
        raise ValueError(f"{place or name} is {value}; it must be at most {MOST_NUMBER:g}")
    return float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How the rotary table of a short context is stretched for a longer one.

    Source: transformers `modeling_rope_utils`, types "linear" and "llama3".

    Raises:
        ValueError: the kind is unknown, a value is not positive, or bounds are out of order.
    """

    kind: Literal["linear", "llama3"]
    """linear: every frequency is divided by ``factor``. llama3: frequencies of long waves are
    divided by ``factor``, those of short waves are kept, and between the two they are blended."""
    factor: float
    """Factor by which the context becomes longer."""
    low_freq_factor: float = 1.0
    """llama3: waves longer than the original context over this number are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: waves shorter than the original context over this number are kept."""
    original_max_position_embeddings: int = 8192
    """llama3: context before scaling, tokens."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling.kind is {self.kind!r}; it must be linear or llama3")
        for name, value in asdict(self).items():
            if name != "kind":
                check_number(value, f"rope_scaling.{name}")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor {self.low_freq_factor:g} is not below "
                f"rope_scaling.high_freq_factor {self.high_freq_factor:g}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Everything, except weights, that determines the function of a model of the LLaMA family.

    Raises:
        ValueError: an extent is not positive, head_dim is odd, query groups do not divide heads,
            or the family is unknown.
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
    family: Family = "llama"
    """Family whose config.json and class in transformers describe the model."""
    qkv_bias: bool = False
    """Whether the query, key and value projections add a bias (Qwen2)."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm over head_dim that all heads share (Qwen3)."""
    tied_embeddings: bool = False
    """Whether the output layer is the embedding matrix."""
    rope_scaling: RopeScaling | None = None
    """How the rotary table is stretched; a mapping of the fields is accepted too."""
    sliding_window: int | None = None
    """Number of tokens that attention reaches back (Mistral); None for all. Sequences up to this
    length are computed alike with and without a window, and longer ones are refused."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # as JSON has it
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name, value in asdict(self).items():
            if name in ("norm_epsilon", "rotary_base"):
                check_number(value, name)
            elif name in _EXTENTS or (name == "sliding_window" and value is not None):
                check_extent(value, name)
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary positions turn pairs of it, and it must be "
                f"even"
            )
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; it must be one of {', '.join(FAMILIES)}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}; every key/value head serves the same "
                f"number of query heads"
            )

    @property
    def heads_per_group(self) -> int:
        """Return the number of query heads that share a key/value head, H / G."""
        return self.num_attention_heads // self.num_query_groups

    def num_params(self) -> int:
        """Return the number of parameters of the whole model; a tied embedding counts once."""
        h, d = self.hidden_size, self.head_dim
        matrices = 1 if self.tied_embeddings else 2
        vectors = 2 * h  # the layer's two norms
        if self.qkv_bias:
            vectors += (self.num_attention_heads + 2 * self.num_query_groups) * d
        if self.qk_norm:
            vectors += 2 * d
        return (
            matrices * self.vocab_size * h + self.num_layers * (self.layer_params() + vectors) + h
        )

    def layer_params(self) -> int:
        """Return the number of parameters in matrices of one layer, without norms and biases."""
        per_head = 2 * self.hidden_size * self.head_dim  # rows of q, columns of o
        per_group = 2 * self.hidden_size * self.head_dim  # rows of k and of v
        per_neuron = 3 * self.hidden_size  # gate, up, down
        return (
            self.num_attention_heads * per_head
            + self.num_query_groups * per_group
            + self.ffn_hidden_size * per_neuron
        )

    def training_flops(self, seq_length: int) -> int:
        """Return the floating-point operations of one token's forward and backward pass.

        Each parameter of a matrix that multiplies counts six; the output layer is included, and the
        embedding, where rows are looked up, is not. Attention over the whole square of a sequence
        counts 12 L H d s, of which a causal kernel needs half.

        Args:
            seq_length: tokens per sequence.

        Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B. Megatron-LM counted so
        until 2024, and counts half of attention today, because of the causal mask.
        """
        multiplied = self.num_layers * self.layer_params() + self.vocab_size * self.hidden_size
        width = self.num_attention_heads * self.head_dim
        return 6 * multiplied + 12 * self.num_layers * width * seq_length

    def check_division(
        self, *, tensor: int, pipeline: int, virtual: int = 1, role: str = "model"
    ) -> None:
        """Refuse tensor ranks or stages that do not divide the model.

        Args:
            tensor: tensor-parallel ranks.
            pipeline: stages.
            virtual: model chunks of a stage.
            role: role of the shape for the message: model, source, target.

        Raises:
            ValueError: with the extent, the size that does not divide it, and sizes that do.
        """
        split = ("num_query_groups", "num_attention_heads", "ffn_hidden_size")
        for extent in split:
            value = getattr(self, extent)
            if value % tensor:
                fitting = [
                    n
                    for n in range(1, tensor)
                    if all(getattr(self, other) % n == 0 for other in split)
                ]
                raise ValueError(
                    f"{role} {extent} {value} is not a multiple of --tensor-model-parallel-size "
                    f"{tensor}; the {role} divides by {', '.join(map(str, fitting))}"
                )
        if self.num_layers % (pipeline * virtual):
            fitting = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise ValueError(
                f"{role} num_layers {self.num_layers} is not a multiple of "
                f"--pipeline-model-parallel-size * --num-virtual-stages-per-pipeline-rank = "
                f"{pipeline} * {virtual}; their product may be {', '.join(map(str, fitting))}"
            )

    def check_window(self, seq_length: int) -> None:
        """Refuse sequences that are longer than the model's sliding window.

        Args:
            seq_length: tokens per sequence.

        Raises:
            ValueError: with both numbers.
        """
        if self.sliding_window is not None and seq_length > self.sliding_window:
            raise ValueError(
                f"--seq-length {seq_length} is longer than the model's sliding_window, "
                f"{self.sliding_window} tokens, and megashear's attention reaches back over the "
                f"whole sequence; lower it to at most {self.sliding_window}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field name, for JSON; ``ModelShape(**values)`` reads them."""
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


def _llama3(
    layers: int,
    hidden: int,
    heads: int,
    head_dim: int,
    ffn: int,
    *,
    factor: float | None,
    tied: bool,
) -> ModelShape:
    scaling = None if factor is None else RopeScaling(kind="llama3", factor=factor)
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=8,
        head_dim=head_dim,
        ffn_hidden_size=ffn,
        vocab_size=128256,
        rotary_base=500000.0,
        max_position_embeddings=8192 if factor is None else 131072,
        rope_scaling=scaling,
        tied_embeddings=tied,
    )


def _qwen(
    family: Family,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    head_dim: int,
    ffn: int,
    *,
    tied: bool,
    vocab: int = 151936,
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        norm_epsilon=1e-6,
        rotary_base=1000000.0,
        max_position_embeddings=32768 if family == "qwen2" else 40960,
        family=family,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=tied,
    )


_EXTENTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
    *("ffn_hidden_size", "vocab_size", "max_position_embeddings"),
)

PRESETS: dict[str, ModelShape] = {
    "llama2-7b": _llama2(32, 4096, 32, 11008),
    "llama2-2.7b": _llama2(32, 2560, 20, 6912),
    "llama2-1.3b": _llama2(24, 2048, 16, 5504),
    "llama2-370m": _llama2(24, 1024, 8, 2816),
    "llama3-8b": _llama3(32, 4096, 32, 128, 14336, factor=None, tied=False),
    "llama3.1-8b": _llama3(32, 4096, 32, 128, 14336, factor=8.0, tied=False),
    "llama3.1-70b": _llama3(80, 8192, 64, 128, 28672, factor=8.0, tied=False),
    "llama3.2-3b": _llama3(28, 3072, 24, 128, 8192, factor=32.0, tied=True),
    "llama3.2-1b": _llama3(16, 2048, 32, 64, 8192, factor=32.0, tied=True),
    "mistral-7b-v0.1": ModelShape(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        ffn_hidden_size=14336,
        vocab_size=32000,
        max_position_embeddings=32768,
        family="mistral",
        sliding_window=4096,
    ),
    "qwen2.5-0.5b": _qwen("qwen2", 24, 896, 14, 2, 64, 4864, tied=True),
    "qwen2.5-7b": _qwen("qwen2", 28, 3584, 28, 4, 128, 18944, tied=False, vocab=152064),
    "qwen3-0.6b": _qwen("qwen3", 28, 1024, 16, 8, 128, 3072, tied=True),
    "qwen3-8b": _qwen("qwen3", 36, 4096, 32, 8, 128, 12288, tied=False),
}
"""Shapes of published models by name.

Source: Sheared LLaMA (arXiv:2310.06694), table 1 and appendix; LLaMA 2 (arXiv:2307.09288); for the
others the config.json of the models as released on Hugging Face."""


def read_shape(name: str, *, flag: str = "--init-shape") -> ModelShape:
    """Return the preset of this name, or the shape in a JSON file of this name.

    Raises:
        ValueError: there is neither, or the file holds no shape.
    """
    if name in PRESETS:
        return PRESETS[name]
    extents = read_extents(name, flag=flag)
    missing = [
        field.name
        for field in fields(ModelShape)
        if field.default is MISSING and field.name not in extents
    ]
    if missing:
        raise ValueError(f"{flag} {name} does not say {', '.join(missing)}; add them")
    try:
        return ModelShape(**extents)
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from None


_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool}
"""Types of JSON values by the annotation of the field of `ModelShape`."""


def read_extents(name: str, *, flag: str) -> dict[str, Any]:
    """Return the fields of `ModelShape` that a JSON file has.

    Args:
        name: the file.
        flag: the flag that named the file, for messages.

    Raises:
        ValueError: there is no such file, it is no JSON object, or it has an unknown field or a
            value of another type.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"{flag} {name} is neither a preset ({', '.join(PRESETS)}) nor a JSON file of extents"
        )
    found = read_json_object(path, f"{flag} {name}")
    annotations = {field.name: str(field.type) for field in fields(ModelShape)}
    for key, value in found.items():
        if key not in annotations:
            raise ValueError(
                f"{flag} {name} has {key}, which is no extent; there are {', '.join(annotations)}"
            )
        wanted = _TYPES.get(annotations[key], object)
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            raise ValueError(
                f"{flag} {name}: {key} is {json.dumps(value)}; it must be "
                f"{'true or false' if wanted is bool else 'a number'}"
                + (" without a fraction" if wanted is int else "")
            )
    return found
