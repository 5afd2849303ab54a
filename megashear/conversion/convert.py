"""Convert models to Megatron checkpoints and Hugging Face directories, driven by the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megashear.checkpoint.description import checksums
from megashear.checkpoint.weights import fill_checkpoint
from megashear.conversion import certificate, hf, model_card
from megashear.conversion.certificate import Witness
from megashear.conversion.sources import CHECKPOINT, HUGGING_FACE, Source
from megashear.conversion.task_results import TaskResults
from megashear.files import integrity
from megashear.files.aside import check_absent, written_aside
from megashear.files.workers import Task, byte_bar
from megashear.models.formats import dtype_of, dtypes_of, stored_bytes
from megashear.tokenizer import tokenizer_files


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
        dtype: number format to store, a key of `formats.DTYPES`; None keeps each weight's own.
        tokenizer: directory or files of the tokenizer to copy; by default the source's.
        workers: threads.
        verify: tokens on which to compare logits with transformers before the output appears,
            random ones where it is empty; None compares nothing. The comparison needs memory for
            the model in float32, and a Hugging Face directory as the source.
        progress: show a bar; None shows it when stderr is a terminal.

    Returns:
        ``bytes`` of weights written, their ``dtypes``, and ``logits``: the result of their
        comparison, or None.

    Raises:
        ValueError: see `weights.fill_checkpoint`; ``output`` exists; ``dtype`` is unknown; logits
            differ, or there is nothing to compare them with.
    """
    check_absent(output)
    stored, description = dtype_of(dtype), source.described()
    tokens = _tokens_to_compare(verify, source, HUGGING_FACE)
    with written_aside(output) as aside:
        with _read(source, progress) as witness:
            num_bytes = fill_checkpoint(
                aside,
                source.weights,
                description,
                dtype=stored,
                tokenizer=source.tokenizer if tokenizer is None else tokenizer,
                workers=workers,
                witness=witness,
            )
        found = _compare(aside, source.path, tokens, witness)
        certificate.write(
            aside,
            witness,
            source.shape,
            source=source.named,
            logits=found,
            iteration=description.iteration,
        )
    return {"bytes": num_bytes, "dtypes": witness.dtypes, "logits": found}


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
    card: bool = True,
    results: TaskResults | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face directory of a model.

    Needs no GPU and no launcher, and memory for a few of the largest weights for each worker.

    Args:
        source: the model.
        output: directory to make; must not exist.
        dtype: number format to store, a key of `formats.DTYPES`. None keeps each weight's own, but
            stores a model that a --bf16 run made in bfloat16, in which the run computed.
        tokenizer: directory or files of the tokenizer; by default the source's.
        max_shard_bytes: largest weights file, bytes.
        workers: threads.
        verify: as for `to_checkpoint`; the comparison needs a checkpoint as the source.
        progress: show a bar; None shows it when stderr is a terminal.
        card: write a model card.
        results: scores of tasks for the card.

    Returns:
        As `to_checkpoint`.

    Raises:
        ValueError: as `to_checkpoint`; see `hf.fill_directory`.
    """
    check_absent(output)
    dtype_of(dtype)
    files = tokenizer_files.find(source.tokenizer if tokenizer is None else tokenizer)
    tokens = _tokens_to_compare(verify, source, CHECKPOINT)
    with written_aside(output) as aside:
        with _read(source, progress) as witness:
            num_bytes = hf.fill_directory(
                aside,
                source.weights,
                source.shape,
                dtype=dtype or source.trained_in,
                tokenizer=files,
                token_ids=source.token_ids if tokenizer is None else None,
                kept_fields=source.kept_fields,
                max_shard_bytes=max_shard_bytes,
                workers=workers,
                witness=witness,
            )
        found = _compare(source.path, aside, tokens, witness)
        certificate.write(aside, witness, source.shape, source=source.named, logits=found)
        if card:  # after the certificate, because people edit it
            model_card.write(
                aside,
                model_card.Card(
                    title=Path(output).resolve().name,
                    source=source,
                    has_tokenizer=bool(tokenizer_files.fingerprint(files)),
                    results=results,
                ),
            )
    return {"bytes": num_bytes, "dtypes": witness.dtypes, "logits": found}


@contextlib.contextmanager
def _read(source: Source, progress: bool | None) -> Iterator[Witness]:
    """Give the witness of a block that reads a source's weights, which advances a bar.

    The files of a checkpoint are compared with their checksums meanwhile, by a thread: hashing
    waits for the disk where the conversion does not.

    Raises:
        DamagedError: a file of the checkpoint is not what was written.
        OSError: such a file cannot be read.
    """
    num_bytes = stored_bytes(dtypes_of(source.weights), source.shape)
    verified = Task(lambda: _verify(source))
    with byte_bar("converting", num_bytes, progress) as advance:
        try:
            yield Witness(advance)
        except ValueError:
            if verified.wait(0.0):
                verified.result()  # damage explains why a weight could not be read
            raise
        verified.result()


def _verify(source: Source) -> None:
    if source.kind == CHECKPOINT and checksums(source.path) is not None:
        integrity.verify(source.path, threads=1)


def _tokens_to_compare(verify: Sequence[int] | None, source: Source, other: str) -> Tensor | None:
    """Return the tokens on which logits are compared; None where they are not.

    Raises:
        ValueError: the source is not of the kind ``other``; tokens are unknown to the model.
    """
    if verify is None:
        return None
    if source.kind != other:
        raise ValueError(
            f"--verify compares a {CHECKPOINT} with a {HUGGING_FACE}; {source.path} is a "
            f"{source.kind}, and neither is on one of the sides: leave --verify out, and add it "
            f"when the output is converted on"
        )
    # Imported here, because megatron-core takes seconds and memory that conversion does not need.
    from megashear.conversion import logits

    logits.require_transformers()
    return logits.check_tokens(verify, source.shape)


def _compare(
    checkpoint: Path, hf_dir: Path, tokens: Tensor | None, witness: Witness
) -> dict[str, Any] | None:
    """Compare the logits of a checkpoint and a Hugging Face directory; None without tokens."""
    if tokens is None:
        return None
    from megashear.conversion import logits

    return logits.compare(checkpoint, hf_dir, tokens, rounded_to=witness.rounded_to)
