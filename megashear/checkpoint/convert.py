"""Convert between Hugging Face directories and Megatron checkpoints, driven by the table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint import certificate, hf, tokenizer_files
from megashear.checkpoint.aside import check_absent
from megashear.checkpoint.description import Description, find_iteration
from megashear.checkpoint.formats import dtype_of, dtypes_of, stored_bytes
from megashear.checkpoint.hf_config import read_config
from megashear.checkpoint.weights import CheckpointWeights, Witness, write_weights
from megashear.checkpoint.workers import byte_bar
from megashear.shape import ModelShape

logger = logging.getLogger(__name__)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that belong to the tokenizer and travel with it."""


def hf_to_megatron(
    hf_dir: Path | str,
    output: Path | str,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    workers: int = 1,
    verify: Sequence[int] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a Megatron checkpoint, at iteration 0, of the model in a Hugging Face directory.

    Needs no GPU and no launcher, and memory for a few of the largest weights for each worker. The
    checkpoint loads at any tensor and pipeline parallel size.

    Args:
        hf_dir: a model of the LLaMA family with safetensors.
        output: directory to make; must not exist.
        dtype: number format to store, a key of `hf.DTYPES`; None keeps each weight's own.
        tokenizer: directory or files of the tokenizer to carry along; by default ``hf_dir``.
        workers: threads.
        verify: compare logits with transformers before the output appears, on these tokens, or on
            random ones where it is empty; None compares nothing. Needs memory for the model in
            float32.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        ``bytes`` of weights written, and ``logits``, what their comparison found, or None.

    Raises:
        ValueError: see `hf.HfWeights` and `weights.write_weights`; ``dtype`` is unknown; logits
            differ.
    """
    check_absent(output)
    stored = dtype_of(dtype)
    weights = hf.HfWeights(hf_dir)
    config = read_config(hf_dir)
    description = Description(
        shape=weights.shape,
        iteration=0,
        stage="converted",
        token_ids={name: config[name] for name in TOKEN_IDS if config.get(name) is not None},
    )
    compare = _comparison(verify, weights.shape)
    return _convert(
        weights,
        weights.shape,
        source=hf_dir,
        iteration=description.iteration,
        compare=lambda aside, rounded_to: compare(aside, hf_dir, rounded_to),
        progress=progress,
        write=lambda witness, finish: write_weights(
            output,
            weights,
            description,
            dtype=stored,
            tokenizer=hf_dir if tokenizer is None else tokenizer,
            workers=workers,
            witness=witness,
            finish=finish,
        ),
    )


def megatron_to_hf(
    checkpoint: Path | str,
    output: Path | str,
    *,
    iteration: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    workers: int = 1,
    verify: Sequence[int] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face directory of the weights in a Megatron checkpoint.

    Needs no GPU and no launcher, and memory for a few of the largest weights for each worker.
    Optimizer states beside the weights are left behind.

    Args:
        checkpoint: a checkpoint's directory, or one iteration's.
        output: directory to make; must not exist.
        iteration: which one; by default the newest.
        dtype: number format to store, a key of `hf.DTYPES`; None keeps each weight's own.
        tokenizer: directory or files of the tokenizer; by default those carried along.
        max_shard_bytes: largest weights file, bytes.
        workers: threads.
        verify: as for `hf_to_megatron`.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        As `hf_to_megatron`.

    Raises:
        ValueError: a file of the checkpoint is not what was written; it has masks, which must be
            folded in first; logits differ; see `weights.CheckpointWeights` and
            `hf.write_directory`.
    """
    check_absent(output)
    dtype_of(dtype)
    logger.info("holding %s to its checksums", checkpoint)
    weights = CheckpointWeights(find_iteration(checkpoint, iteration, contents=True))
    if weights.description.stage == "prune":
        raise ValueError(
            f"checkpoint {weights.directory} is of a pruning run: its weights compute nothing "
            f"useful without its masks; fold these in with `megashear cut` and convert the result"
        )
    files = tokenizer_files.find(weights.tokenizer if tokenizer is None else tokenizer)
    token_ids = weights.description.token_ids if tokenizer is None else None
    compare = _comparison(verify, weights.shape)
    return _convert(
        weights,
        weights.shape,
        source=checkpoint,
        iteration=None,
        compare=lambda aside, rounded_to: compare(weights.directory, aside, rounded_to),
        progress=progress,
        write=lambda witness, finish: hf.write_directory(
            output,
            weights,
            weights.shape,
            dtype=dtype,
            tokenizer=files,
            token_ids=token_ids,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
            witness=witness,
            finish=finish,
        ),
    )


def _convert(
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    *,
    source: Path | str,
    iteration: int | None,
    compare: Callable[[Path, torch.dtype | None], dict[str, Any] | None],
    progress: bool | None,
    write: Callable[[Witness, Callable[[Path], None]], int],
) -> dict[str, Any]:
    """Write under a bar and the eyes of a witness, whose certificate goes into the output."""
    witness = certificate.Witness()
    logits: dict[str, Any] | None = None
    with byte_bar("converting", stored_bytes(dtypes_of(weights), shape), progress) as advance:

        def watch(name: str, given: Tensor, result: Tensor) -> None:
            witness(name, given, result)
            advance(given.nbytes)

        def finish(aside: Path) -> None:
            nonlocal logits
            logits = compare(aside, witness.rounded_to)
            certificate.write(
                aside, witness, shape, source=source, logits=logits, iteration=iteration
            )

        num_bytes = write(watch, finish)
    return {"bytes": num_bytes, "logits": logits}


def _comparison(
    verify: Sequence[int] | None, shape: ModelShape
) -> Callable[[Path | str, Path | str, torch.dtype | None], dict[str, Any] | None]:
    """What compares the logits of a checkpoint and a Hugging Face directory, if asked to."""
    if verify is None:
        return lambda checkpoint, hf_dir, rounded_to: None
    # Here, not above: megatron-core takes seconds and memory that conversion does not need.
    from megashear.checkpoint import logits

    logits.require_transformers()
    tokens = logits.check_tokens(verify, shape)
    return lambda checkpoint, hf_dir, rounded_to: logits.compare(
        checkpoint, hf_dir, tokens, rounded_to=rounded_to
    )
