"""Open a model to convert, with weights by Hugging Face name, whatever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megashear.checkpoint.description import Description
from megashear.checkpoint.details import HF_CONFIG, ORIGIN
from megashear.checkpoint.hf_fields import kept_fields
from megashear.checkpoint.origin import LICENCE_FIELDS, origin_of
from megashear.checkpoint.weights import CheckpointWeights
from megashear.conversion.composer import (
    HEAD_DIM,
    MAX_POSITIONS,
    NORM_EPSILON,
    ROTARY_BASE,
    SUFFIXES,
    ComposerWeights,
)
from megashear.conversion.hf import HfWeights
from megashear.conversion.hf_config import CONFIG, read_config
from megashear.conversion.megatron_lm import MegatronLmWeights, find_megatron_lm
from megashear.shape import ModelShape

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that belong to the tokenizer and travel with it."""

HUGGING_FACE = "Hugging Face directory"
CHECKPOINT = "checkpoint"
MEGATRON_LM = "Megatron-LM checkpoint"
COMPOSER = "LLM-Shearing file"

SAYABLE = {
    "head_dim": COMPOSER,
    "norm_epsilon": COMPOSER,
    "rotary_base": COMPOSER,
    "max_position_embeddings": COMPOSER,
    "vocab_size": MEGATRON_LM,
}
"""Flags that describe a model, with the kind of source that does not say these values."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to convert. No weight is read before it is asked for."""

    kind: str
    path: Path
    """Directory or file of the model; of a checkpoint, one iteration's directory."""
    named: Path
    """Path of the model as the user named it."""
    weights: Mapping[str, Tensor]
    """Weights by Hugging Face name."""
    shape: ModelShape
    token_ids: dict[str, Any] = field(default_factory=dict)
    """Special tokens as far as the source knows them."""
    tokenizer: Path | None = None
    """Directory whose tokenizer files to copy."""
    kept_fields: dict[str, Any] = field(default_factory=dict)
    """Fields of config.json that are written unchanged."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values for megashear.json."""
    description: Description | None = None
    """What a checkpoint says of itself."""
    trained_in: str | None = None
    """Number format of the model in training, where ``weights`` are finer: those of a --bf16 run
    and of its cut are float32 masters."""

    def of(self, *, name: str | None, licence: str | None) -> Source:
        """Return the model with the origin that the user says it has; None leaves what is known.

        Args:
            name: model that it was made from, as the hub names it.
            licence: licence of that model, as the hub names it.
        """
        if name is None and licence is None:
            return self
        origin = dict(self.details.get(ORIGIN, {}))
        if licence is not None:
            origin = {key: value for key, value in origin.items() if key not in LICENCE_FIELDS}
            origin["license"] = licence
        if name is not None:
            origin["name"] = name
        return replace(self, details=self.details | {ORIGIN: origin})

    def described(self) -> Description:
        """Return the description of a checkpoint made of this model, without the tokenizer."""
        return Description(
            shape=self.shape,
            iteration=0,
            stage="converted",
            token_ids=self.token_ids,
            details=self.details | ({HF_CONFIG: self.kept_fields} if self.kept_fields else {}),
        )


def open_source(path: Path | str, **said: float | None) -> Source:
    """Find the kind of the model at ``path`` and open it.

    Args:
        path: a Hugging Face directory, a checkpoint of ours or of Megatron-LM (its directory or
            one iteration's), or a file that LLM-Shearing wrote.
        said: what the user says of it, by the names of `SAYABLE`; None is nothing.

    Raises:
        ValueError: nothing that is known; something is said of a source that says it itself; see
            `open_hf`, `open_checkpoint`, `open_megatron_lm` and `open_composer`.
    """
    path = Path(path)
    given = {name: value for name, value in said.items() if value is not None}
    kind = _kind(path)
    for name, value in given.items():
        if SAYABLE[name] != kind:
            raise ValueError(
                f"--{name.replace('_', '-')} {value:g} is for a {SAYABLE[name]}; {path} is a "
                f"{kind} and says it itself"
            )
    if kind == COMPOSER:
        return open_composer(path, **given)
    if kind == MEGATRON_LM:
        return open_megatron_lm(path, **given)
    return open_hf(path) if kind == HUGGING_FACE else open_checkpoint(path)


def open_hf(directory: Path | str) -> Source:
    """Open a Hugging Face directory.

    Raises:
        ValueError: see `hf.HfWeights`.
    """
    weights, config = HfWeights(directory), read_config(directory)
    return Source(
        kind=HUGGING_FACE,
        path=Path(directory),
        named=Path(directory),
        weights=weights,
        shape=weights.shape,
        token_ids={name: config[name] for name in TOKEN_IDS if config.get(name) is not None},
        kept_fields=kept_fields(config),
        tokenizer=Path(directory),
        details={ORIGIN: origin_of(Path(directory), config)},
    )


def open_checkpoint(directory: Path | str, iteration: int | None = None) -> Source:
    """Open one iteration of a megashear checkpoint, by default the newest whose files exist.

    Raises:
        ValueError: it has masks, which must be folded in first; see `weights.CheckpointWeights`.
    """
    weights = CheckpointWeights(directory, iteration=iteration)
    if weights.description.stage == "prune":
        raise ValueError(
            f"checkpoint {weights.directory} is of a pruning run: its weights compute nothing "
            f"useful without its masks; fold these in with `megashear cut` and convert the result"
        )
    return Source(
        kind=CHECKPOINT,
        path=weights.directory,
        named=Path(directory),
        weights=weights,
        shape=weights.shape,
        token_ids=weights.description.token_ids,
        kept_fields=weights.description.hf_config.get(HF_CONFIG, {}),
        tokenizer=weights.tokenizer,
        details=weights.description.lineage,
        description=weights.description,
        trained_in=weights.trained_in,
    )


def open_megatron_lm(directory: Path | str, *, vocab_size: float | None = None) -> Source:
    """Open a checkpoint of Megatron-LM; see `megatron_lm.MegatronLmWeights`."""
    weights = MegatronLmWeights(
        directory, vocab_size=None if vocab_size is None else int(vocab_size)
    )
    return Source(
        kind=MEGATRON_LM,
        path=weights.directory,
        named=Path(directory),
        weights=weights,
        shape=weights.shape,
        details=weights.description.details,
    )


def open_composer(
    path: Path | str,
    *,
    head_dim: float = HEAD_DIM,
    norm_epsilon: float = NORM_EPSILON,
    rotary_base: float = ROTARY_BASE,
    max_position_embeddings: float = MAX_POSITIONS,
) -> Source:
    """Open a file of LLM-Shearing; see `composer.ComposerWeights`."""
    weights = ComposerWeights(
        path,
        head_dim=int(head_dim),
        norm_epsilon=norm_epsilon,
        rotary_base=rotary_base,
        max_position_embeddings=int(max_position_embeddings),
    )
    return Source(
        kind=COMPOSER, path=Path(path), named=Path(path), weights=weights, shape=weights.shape
    )


def _kind(path: Path) -> str:
    if path.is_file() and path.suffix in SUFFIXES:
        return COMPOSER
    if not path.is_dir():
        raise ValueError(
            f"--input {path} is not a directory, nor a {' or '.join(SUFFIXES)} file of LLM-Shearing"
        )
    if (path / CONFIG).is_file():  # every Hugging Face model has one
        return HUGGING_FACE
    return CHECKPOINT if find_megatron_lm(path) is None else MEGATRON_LM
