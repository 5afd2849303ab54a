"""Convert models to Megatron checkpoints and Hugging Face directories, driven by the table."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.description import checksums
from megashear.checkpoint.weights import Witness, write_weights
from megashear.conversion import certificate, hf
from megashear.conversion.sources import (
    CHECKPOINT,
    HUGGING_FACE,
    Source,
    open_checkpoint,
    open_hf,
)
from megashear.files import integrity
from megashear.files.aside import check_absent
from megashear.files.workers import byte_bar
from megashear.models.formats import dtype_of, dtypes_of, stored_bytes
from megashear.tokenizer import tokenizer_files


def hf_to_megatron(hf_dir: Path | str, output: Path | str, **options: Any) -> dict[str, Any]:
    """`to_checkpoint` of a Hugging Face directory, which is opened."""
    check_absent(output)
    return to_checkpoint(open_hf(hf_dir), output, **options)


def megatron_to_hf(
    checkpoint: Path | str, output: Path | str, *, iteration: int | None = None, **options: Any
) -> dict[str, Any]:
    """`to_hf` of a checkpoint, which is opened at one iteration, by default the newest."""
    check_absent(output)
    return to_hf(open_checkpoint(checkpoint, iteration), output, **options)


def to_checkpoint(
    source: Source,
    output: Path | str,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    workers: int = 1,
    verify: Sequence[int] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a Megatron checkpoint, at iteration 0, of a model.

    Needs no GPU and no launcher, and memory for a few of the largest weights for each worker. The
    checkpoint loads at any tensor and pipeline parallel size.

    Args:
        source: the model.
        output: directory to make; must not exist.
        dtype: number format to store, a key of `hf.DTYPES`; None keeps each weight's own.
        tokenizer: directory or files of the tokenizer to carry along; by default the source's.
        workers: threads.
        verify: compare logits with transformers before the output appears, on these tokens, or on
            random ones where it is empty; None compares nothing. Needs memory for the model in
            float32, and a Hugging Face directory on the other side.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        ``bytes`` of weights written, their ``dtypes``, and ``logits``, what their comparison found,
        or None.

    Raises:
        ValueError: see `weights.write_weights`; ``dtype`` is unknown; logits differ, or there is
            nothing to compare them with.
    """
    check_absent(output)
    stored = dtype_of(dtype)
    description = source.described()
    compare = _comparison(verify, source, HUGGING_FACE)
    return _convert(
        source,
        iteration=description.iteration,
        compare=lambda aside, rounded_to: compare(aside, source.path, rounded_to),
        progress=progress,
        write=lambda witness, finish: write_weights(
            output,
            source.weights,
            description,
            dtype=stored,
            tokenizer=source.tokenizer if tokenizer is None else tokenizer,
            workers=workers,
            witness=witness,
            finish=finish,
        ),
    )


def to_hf(
    source: Source,
    output: Path | str,
    *,
    dtype: str | None = None,
    tokenizer: Path | str | Iterable[Path | str] | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    workers: int = 1,
    verify: Sequence[int] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face directory of a model.

    Needs no GPU and no launcher, and memory for a few of the largest weights for each worker.

    Args:
        source: the model.
        output: directory to make; must not exist.
        dtype: number format to store, a key of `hf.DTYPES`; None keeps each weight's own, but of
            what a --bf16 run made stores bfloat16, the weights that the run computes with.
        tokenizer: directory or files of the tokenizer; by default the source's.
        max_shard_bytes: largest weights file, bytes.
        workers: threads.
        verify: as for `to_checkpoint`, and a checkpoint on the other side.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        As `to_checkpoint`.

    Raises:
        ValueError: as `to_checkpoint`; see `hf.write_directory`.
    """
    check_absent(output)
    dtype_of(dtype)
    dtype = dtype or source.trained_in
    files = tokenizer_files.find(source.tokenizer if tokenizer is None else tokenizer)
    compare = _comparison(verify, source, CHECKPOINT)
    return _convert(
        source,
        iteration=None,
        compare=lambda aside, rounded_to: compare(source.path, aside, rounded_to),
        progress=progress,
        write=lambda witness, finish: hf.write_directory(
            output,
            source.weights,
            source.shape,
            dtype=dtype,
            tokenizer=files,
            token_ids=source.token_ids if tokenizer is None else None,
            kept_fields=source.kept_fields,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
            witness=witness,
            finish=finish,
        ),
    )


def _convert(
    source: Source,
    *,
    iteration: int | None,
    compare: Callable[[Path, torch.dtype | None], dict[str, Any] | None],
    progress: bool | None,
    write: Callable[[Witness, Callable[[Path], None]], int],
) -> dict[str, Any]:
    """Write under a bar and the eyes of a witness, whose certificate goes into the output."""
    witness = certificate.Witness()
    logits: dict[str, Any] | None = None
    files = _ChecksumThread(source.path) if source.kind == CHECKPOINT else None
    with byte_bar(
        "converting", stored_bytes(dtypes_of(source.weights), source.shape), progress
    ) as advance:

        def watch(name: str, given: Tensor, result: Tensor) -> None:
            witness(name, given, result)
            advance(given.nbytes)

        def finish(aside: Path) -> None:
            nonlocal logits
            if files is not None:
                files.finish()
            logits = compare(aside, witness.rounded_to)
            certificate.write(
                aside,
                witness,
                source.shape,
                source=source.named,
                logits=logits,
                iteration=iteration,
            )

        if files is not None:
            files.start()
        try:
            num_bytes = write(watch, finish)
        except ValueError:
            if files is not None and files.error is not None:
                raise files.error from None  # why a weight could not be read
            raise
    dtypes = sorted({record.dtype for record in witness.records.values()})
    return {"bytes": num_bytes, "dtypes": dtypes, "logits": logits}


class _ChecksumThread(threading.Thread):
    """Holds a checkpoint's files to their checksums while its weights are converted: beside the
    conversion, because hashing waits for the disk when that does not, and the other way round."""

    def __init__(self, directory: Path) -> None:
        super().__init__(name="checksums", daemon=True)  # a failed conversion need not wait for it
        self.directory = directory
        self.error: Exception | None = None

    def run(self) -> None:
        """Compare every file; what is wrong waits in ``error``."""
        try:
            if checksums(self.directory) is not None:
                integrity.verify(self.directory, threads=1)
        except (ValueError, OSError) as error:
            self.error = error

    def finish(self) -> None:
        """Wait for the last file.

        Raises:
            DamagedError: a file is not what was written.
            OSError: a file cannot be read.
        """
        self.join()
        if self.error is not None:
            raise self.error


def _comparison(
    verify: Sequence[int] | None, source: Source, other: str
) -> Callable[[Path | str, Path | str, torch.dtype | None], dict[str, Any] | None]:
    """What compares the logits of a checkpoint and a Hugging Face directory, if asked to."""
    if verify is None:
        return lambda checkpoint, hf_dir, rounded_to: None
    if source.kind != other:
        raise ValueError(
            f"--verify compares a {CHECKPOINT} with a {HUGGING_FACE}; {source.path} is a "
            f"{source.kind}, and neither is on one of the sides: leave --verify out, and add it "
            f"when the output is converted on"
        )
    # Here, not above: megatron-core takes seconds and memory that conversion does not need.
    from megashear.conversion import logits

    logits.require_transformers()
    tokens = logits.check_tokens(verify, source.shape)
    return lambda checkpoint, hf_dir, rounded_to: logits.compare(
        checkpoint, hf_dir, tokens, rounded_to=rounded_to
    )
