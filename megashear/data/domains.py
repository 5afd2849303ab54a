"""Tokenises jsonl files into one .bin/.idx and one held-out set per domain."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType
from tqdm import tqdm

from megashear.data.documents import (
    Chunk,
    EncodedChunk,
    EncodingPolicy,
    encode_chunk,
    find_domains,
    read_chunks,
)
from megashear.data.domain_writer import DomainWriter
from megashear.data.manifest import (
    HELD_OUT_SUFFIX,
    TOKENIZER_FOLDER,
    DataManifest,
    DomainCounts,
    read_manifest,
)
from megashear.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["DataManifest", "DomainCounts", "find_domains", "preprocess", "read_manifest"]

CHUNKS_AHEAD = 4
"""Chunks read ahead for each worker; bounds memory whatever the size of the files."""


def preprocess(
    inputs: Mapping[str, Sequence[Path]],
    output: str | Path,
    tokenizer_path: str | Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    prepend_bos: bool = True,
    held_out_fraction: float = 0.02,
    workers: int = 1,
    progress: bool | None = None,
) -> DataManifest:
    """Tokenise text into a new directory: a training and a held-out set for each domain.

    A document is held out by the hash of its text: it stays on its side when files are added, and
    copies of a text share a side. Where all documents of a (small) domain fall on one side, the one
    that divides its tokens best is moved. The directory appears whole or not at all. Documents keep
    the order of the files, whatever the number of workers. Memory grows only by the index, some
    100 bytes a document.

    Args:
        inputs: jsonl files of each domain; their order becomes the order of the domains
            (``find_domains`` reads it from a directory).
        output: directory to make.
        tokenizer_path: a tokenizer file or directory, see ``load_tokenizer``; copied along.
        json_key: key under which a line holds its text.
        append_eod: end every document with EOS.
        prepend_bos: begin every document with BOS.
        held_out_fraction: share of documents to hold out, between 0 and 1, exclusive.
        workers: processes that tokenise; 1 works in this process. More are started afresh, so a
            script that calls this needs its ``if __name__ == "__main__"``.
        progress: show a bar on stderr; None shows it on a terminal.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: the output exists, a line is not a JSON object with text under ``json_key``
            (names the file and the line), a domain has no text or fewer than two different
            documents, or the tokenizer lacks a token that was asked for.
    """
    output = Path(output)
    _check_inputs(inputs, output)
    if not 0 < held_out_fraction < 1:
        raise ValueError(
            f"--held-out-fraction is {held_out_fraction}; it must lie between 0 and 1, for "
            f"training and evaluation both need text"
        )
    if workers < 1:
        raise ValueError(f"--workers is {workers}; at least 1 process has to tokenise")
    tokenizer = load_tokenizer(tokenizer_path)
    _check_special_tokens(tokenizer, append_eod=append_eod, prepend_bos=prepend_bos)
    policy = EncodingPolicy(
        tokenizer_path=tokenizer.path.absolute(),
        json_key=json_key,
        prepend_bos=prepend_bos,
        append_eod=append_eod,
        held_out_fraction=held_out_fraction,
        dtype=DType.optimal_dtype(tokenizer.vocab_size).__name__,
    )
    aside = output.with_name(output.name + ".tmp")
    try:
        aside.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"{aside} exists: another run is writing {output}, or one was killed; delete "
            f"{aside} if none is running"
        ) from None
    try:
        domains = _write_domains(inputs, aside, policy, workers, progress)
        tokenizer.copy_to(aside / TOKENIZER_FOLDER)
        manifest = DataManifest(
            directory=aside,
            domains=tuple(domains),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            prepend_bos=prepend_bos,
            append_eod=append_eod,
            held_out_fraction=held_out_fraction,
            json_key=json_key,
            dtype=policy.dtype,
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        manifest.write()
        aside.rename(output)
    except BaseException:  # an interrupt too: half a data set must not stay behind
        shutil.rmtree(aside)
        raise
    return manifest.moved(output)


def _check_inputs(inputs: Mapping[str, Sequence[Path]], output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists; delete it or write to another directory")
    if not inputs:
        raise ValueError("no domain to preprocess; give a directory that holds *.jsonl files")
    for name, files in inputs.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == TOKENIZER_FOLDER:
            raise ValueError(
                f"domain {name!r} cannot name a file of the data; use letters, digits, '.', '_' "
                f"and '-', beginning with a letter or digit, and not {TOKENIZER_FOLDER!r}"
            )
        if name.endswith(HELD_OUT_SUFFIX):
            raise ValueError(
                f"domain {name!r} ends in {HELD_OUT_SUFFIX!r}, which marks held-out sets; rename "
                f"it (a held-out set is split off for every domain)"
            )
        if not files:
            raise ValueError(f"domain {name!r} has no *.jsonl file")
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"domain {name!r}: {file} does not exist")


def _check_special_tokens(tokenizer: Tokenizer, *, append_eod: bool, prepend_bos: bool) -> None:
    for wanted, token_id, name, flag in (
        (append_eod, tokenizer.eos_id, "EOS", "--no-append-eod"),
        (prepend_bos, tokenizer.bos_id, "BOS", "--no-prepend-bos"),
    ):
        if wanted and token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.path} has no {name} token to mark documents with; give "
                f"{flag} to do without, or name the token in tokenizer_config.json beside it"
            )


def _write_domains(
    inputs: Mapping[str, Sequence[Path]],
    directory: Path,
    policy: EncodingPolicy,
    workers: int,
    progress: bool | None,
) -> list[DomainCounts]:
    """Write every domain into ``directory``; the bar counts the bytes of all of them."""
    sizes = {
        name: sum(Path(file).stat().st_size for file in files) for name, files in inputs.items()
    }
    pool = None
    if workers > 1:
        # Spawned: a fork of a process with threads (torch, tokenizers) can hang.
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    shown = sys.stderr.isatty() if progress is None else progress
    counts = []
    try:
        with tqdm(
            total=sum(sizes.values()), unit="B", unit_scale=True, disable=not shown
        ) as progress_bar:
            meter = _Meter(progress_bar)
            for name, files in inputs.items():
                meter.domain = name
                chunks = (chunk for file in files for chunk in read_chunks(Path(file)))
                encoded = _encode_in_order(policy, chunks, pool, workers)
                writer = DomainWriter(directory, name, policy)
                for chunk in encoded:
                    writer.add(chunk)
                    meter.add(chunk)
                counts.append(writer.finish(sizes[name]))
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return counts


def _encode_in_order(
    policy: EncodingPolicy, chunks: Iterator[Chunk], pool: ProcessPoolExecutor | None, workers: int
) -> Iterator[EncodedChunk]:
    """Encode chunks, in ``pool`` if there is one, and yield them in their order."""
    if pool is None:
        for chunk in chunks:
            yield encode_chunk(policy, chunk)
        return
    # Not Pool.imap: it reads the whole input ahead, and hangs where a worker is killed.
    pending: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(encode_chunk, policy, chunk))
        if len(pending) >= workers * CHUNKS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _Meter:
    """Progress in bytes, with documents per second behind it."""

    def __init__(self, progress_bar: tqdm[Any]) -> None:
        self.domain = ""
        self._bar = progress_bar
        self._documents = 0
        self._start = time.monotonic()

    def add(self, chunk: EncodedChunk) -> None:
        self._documents += len(chunk.documents)
        rate = self._documents / max(time.monotonic() - self._start, 1e-6)
        self._bar.set_postfix_str(f"{self.domain}, {rate:.0f} docs/s", refresh=False)
        self._bar.update(chunk.num_bytes)
