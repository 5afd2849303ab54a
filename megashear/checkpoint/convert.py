"""Convert between Hugging Face directories and Megatron checkpoints, driven by the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megashear.checkpoint import hf, tokenizer_files
from megashear.checkpoint.description import Description
from megashear.checkpoint.hf_config import read_config
from megashear.checkpoint.weights import CheckpointWeights, write_weights

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that belong to the tokenizer and travel with it."""


def hf_to_megatron(
    hf_dir: Path | str,
    output: Path | str,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    progress: bool | None = None,
) -> int:
    """Write a Megatron checkpoint, at iteration 0, of the model in a Hugging Face directory.

    Needs no GPU, and memory for the model once in the format stored. The checkpoint loads at any
    tensor and pipeline parallel size.

    Args:
        hf_dir: a LLaMA with safetensors.
        output: directory to make; must not exist.
        dtype: number format to store, a key of `hf.DTYPES`; None keeps each weight's own.
        tokenizer: directory or files of the tokenizer to carry along; by default ``hf_dir``.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: see `hf.HfWeights` and `weights.write_weights`; ``dtype`` is unknown.
    """
    stored = hf.dtype_of(dtype)
    weights = hf.HfWeights(hf_dir)
    config = read_config(hf_dir)
    description = Description(
        shape=weights.shape,
        iteration=0,
        stage="converted",
        token_ids={name: config[name] for name in TOKEN_IDS if config.get(name) is not None},
    )
    return write_weights(
        output,
        _watched(weights, "reading", progress),
        description,
        dtype=stored,
        tokenizer=hf_dir if tokenizer is None else tokenizer,
    )


def megatron_to_hf(
    checkpoint: Path | str,
    output: Path | str,
    *,
    iteration: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    progress: bool | None = None,
) -> int:
    """Write a Hugging Face directory of the weights in a Megatron checkpoint.

    Needs no GPU, and memory for one file of weights. Optimizer states beside the weights are left
    behind.

    Args:
        checkpoint: a checkpoint's directory, or one iteration's.
        output: directory to make; must not exist.
        iteration: which one; by default the newest.
        dtype: number format to store, a key of `hf.DTYPES`; None keeps each weight's own.
        tokenizer: directory or files of the tokenizer; by default those carried along.
        max_shard_bytes: largest weights file, bytes.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        Bytes of weights written.

    Raises:
        ValueError: the checkpoint has masks, which must be folded in first; see
            `weights.CheckpointWeights` and `hf.write_directory`.
    """
    hf.dtype_of(dtype)
    weights = CheckpointWeights(checkpoint, iteration=iteration)
    if weights.description.stage == "prune":
        raise ValueError(
            f"checkpoint {weights.directory} is of a pruning run: its weights compute nothing "
            f"useful without its masks; fold these in with `megashear cut` and convert the result"
        )
    files = tokenizer_files.find(weights.tokenizer if tokenizer is None else tokenizer)
    token_ids = weights.description.token_ids if tokenizer is None else None
    return hf.write_directory(
        output,
        _watched(weights, "writing", progress),
        weights.shape,
        dtype=dtype,
        tokenizer=files,
        token_ids=token_ids,
        max_shard_bytes=max_shard_bytes,
    )


def _watched(
    weights: Mapping[str, Tensor], doing: str, progress: bool | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, with a bar of how many were taken."""
    disable = None if progress is None else not progress  # tqdm's None asks for a terminal
    yield from tqdm(weights.items(), total=len(weights), desc=doing, unit="weight", disable=disable)
