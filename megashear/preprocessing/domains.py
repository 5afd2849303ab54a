"""Tokenises text into one .bin/.idx and one held-out set for each domain."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from megashear.config import PreprocessConfig
from megashear.data.indexed import token_dtype
from megashear.data.manifest import (
    HELD_OUT_SUFFIX,
    TOKENIZER_FOLDER,
    DataManifest,
    DomainCounts,
)
from megashear.files.processes import begin_worker
from megashear.preprocessing.conversations import template_for
from megashear.preprocessing.documents import (
    EncodedChunk,
    EncodingPolicy,
    check_first,
    encode_chunk,
)
from megashear.preprocessing.domain_writer import DomainWriter
from megashear.preprocessing.inputs import read_chunks, samples_of
from megashear.preprocessing.journal import FOLDER, unfinished
from megashear.preprocessing.mds import check_set
from megashear.preprocessing.progress import Meter
from megashear.preprocessing.text_files import CHUNK_BYTES, Chunk
from megashear.tokenizer.chat_template import TEMPLATE_NAME
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.models import Tokenizer

logger = logging.getLogger(__name__)

CHUNKS_AHEAD = 4
"""Chunks read ahead for each worker, which bounds memory whatever the size of the files."""
BYTES_AHEAD = 16 << 20
"""Text read ahead for each worker where documents are longer than a chunk, bytes."""
CHUNKS_BETWEEN_COMMITS = 64
"""Chunks that a killed run does again at most; a commit to the disk takes some 10 ms."""
FILES_A_CHUNK = 16
"""Files noted in the journal that make the time between commits a chunk longer: each commit writes
all of them anew, and a domain may have a hundred thousand files of a page each."""


def preprocess(
    inputs: Mapping[str, Sequence[Path]],
    config: PreprocessConfig,
    *,
    progress: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> DataManifest:
    """Tokenise text into a new directory: a training and a held-out set for each domain.

    A document is held out by the hash of its text: it stays on its side when files are added, and
    copies of a text share a side. Where all documents of a (small) domain fall on one side, the
    document that divides the domain's tokens best is moved. Documents keep the order of the files,
    whatever the number of workers. Memory grows with the longest document alone.

    The directory appears whole or not at all. It is made as ``{output}.tmp``, where a run that was
    interrupted, or even killed, leaves what it did: the same call resumes there, and reads only
    input files that have changed or were not read.

    Args:
        inputs: files of each domain, of any kind that ``find_domains`` finds; their order becomes
            the order of the domains.
        config: flags of the command; the tokenizer is copied along. ``inputs`` replace its
            ``input``. With ``workers`` above 1 processes are started afresh, so a script that calls
            this function needs its ``if __name__ == "__main__"``.
        progress: show a bar on stderr; None shows it on a terminal, and elsewhere logs.
        chunk_bytes: text handed to a worker at a time, bytes.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: the output exists, an interrupted run had other settings, an input file is
            damaged or has no text under ``json_key`` (names the file and the line), a domain has
            no text or fewer than two different documents, or the tokenizer lacks a BOS or EOS
            that was asked for.
    """
    # Check all inputs now: a domain's turn may come hours later.
    output = Path(config.output)
    files = {name: [Path(file) for file in each] for name, each in inputs.items()}
    _check_inputs(files, output)
    for each in files.values():
        for file in samples_of(each):
            check_first(
                *(file, config.json_key, config.tokens_dtype, config.max_document_mb),
                is_chat=config.chat_format is not None,
            )
    # Load the tokenizer.
    tokenizer = load_tokenizer(config.tokenizer_model)
    if tokenizer.note is not None:
        logger.warning("--tokenizer-model: %s", tokenizer.note)
    template = template_for(config.chat_format, tokenizer)
    is_text = template is None
    if is_text:  # else the template writes what it wants
        _check_special_tokens(tokenizer, config)
    policy = EncodingPolicy(
        tokenizer_path=tokenizer.path.absolute(),
        json_key=config.json_key,
        prepend_bos=config.prepend_bos and is_text,
        append_eod=config.append_eod and is_text,
        held_out_fraction=config.held_out_fraction,
        # context is stored below 0
        dtype=token_dtype(tokenizer.vocab_size) if is_text else "int32",
        chat_template=template,
        first_turn=config.first_turn,
    )
    settings = {
        **asdict(policy),
        "tokenizer_path": None,  # its content counts, and it may be moved
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "added_tokens_fingerprint": tokenizer.added_fingerprint,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokens_dtype": config.tokens_dtype,
        "chunk_bytes": chunk_bytes,  # places are counted in chunks
    }
    # Write aside, then rename.
    aside = output.with_name(output.name + ".tmp")
    with unfinished(aside, settings):
        _drop_other_domains(aside, files)
        domains = _Run(config, policy, chunk_bytes).write_all(files, aside, progress)
        tokenizer.copy_to(aside / TOKENIZER_FOLDER)
        if template is not None:  # what the model learned, its users must write
            (aside / TOKENIZER_FOLDER / TEMPLATE_NAME).write_text(template, encoding="utf-8")
        manifest = DataManifest(
            directory=aside,
            domains=tuple(domains),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            prepend_bos=policy.prepend_bos,
            append_eod=policy.append_eod,
            held_out_fraction=config.held_out_fraction,
            json_key=config.json_key,
            dtype=policy.dtype,
            tokenizer_fingerprint=tokenizer.fingerprint,
            chat_format=config.chat_format,
        )
        manifest.write()
        if output.exists():  # since the check at the start; a rename would replace an empty one
            raise ValueError(f"{output} exists; delete it or write to another directory")
        aside.rename(output)
    shutil.rmtree(output / FOLDER)
    return manifest.moved(output)


def _check_inputs(inputs: Mapping[str, Sequence[Path]], output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists; delete it or write to another directory")
    if not inputs:
        raise ValueError("no domain to preprocess; give a directory that holds data")
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
            raise ValueError(f"domain {name!r} has no file")
        for file in files:
            if not file.is_file():
                raise ValueError(f"domain {name!r}: {file} does not exist")


def _check_special_tokens(tokenizer: Tokenizer, config: PreprocessConfig) -> None:
    for wanted, token_id, name, flag in (
        (config.append_eod, tokenizer.eos_id, "EOS", "--no-append-eod"),
        (config.prepend_bos, tokenizer.bos_id, "BOS", "--no-prepend-bos"),
    ):
        if wanted and token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.path} has no {name} token to mark documents with; give "
                f"{flag} to do without, or name the token in tokenizer_config.json beside it"
            )


def _drop_other_domains(directory: Path, inputs: Mapping[str, Sequence[Path]]) -> None:
    """Delete what an earlier run wrote of domains that are no longer in the input."""
    for journal in (directory / FOLDER).glob("*.json"):
        if (name := journal.stem) in inputs:
            continue
        logger.warning("domain %s of an earlier run is no longer in the input; deleted", name)
        for side in (name, name + HELD_OUT_SUFFIX):
            for file in (
                *(directory / f"{side}{suffix}" for suffix in (".bin", ".idx")),
                directory / FOLDER / f"{side}.lengths",
            ):
                file.unlink(missing_ok=True)
        journal.unlink()
    for partial in directory.glob("*~*"):  # renamed when whole; no domain's name has a ~
        partial.unlink()


class _Item(NamedTuple):
    """A chunk of a file, or the end of a file."""

    file_number: int
    chunk: Chunk | None


class _Run:
    """Turns the chunks of files into domains."""

    def __init__(self, config: PreprocessConfig, policy: EncodingPolicy, chunk_bytes: int) -> None:
        self._config, self._policy, self._chunk_bytes = config, policy, chunk_bytes
        self._workers = config.workers

    def write_all(
        self, inputs: Mapping[str, Sequence[Path]], directory: Path, progress: bool | None
    ) -> list[DomainCounts]:
        """Write every domain into ``directory``, or keep what is there."""
        pool = None
        if self._workers > 1:
            # Spawned: a fork of a process with threads (torch, tokenizers) can hang.
            pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=begin_worker,
                # an interrupt from the keyboard reaches all processes; this one ends the others
                initargs=(os.getpid(), (signal.SIGINT,)),
            )
        sizes = {file: file.stat().st_size for files in inputs.values() for file in files}
        counts = []
        try:
            with contextlib.closing(Meter(sum(sizes.values()), progress)) as meter:
                for name, files in inputs.items():
                    meter.domain = name
                    counts.append(self._write(name, files, directory, pool, meter))
        except BrokenProcessPool:
            raise ValueError(
                f"a process that tokenises was killed, as happens when memory runs out; the same "
                f"command resumes after what is done, with fewer --workers than {self._workers} if "
                f"it was memory"
            ) from None
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        return counts

    def _write(
        self,
        name: str,
        files: Sequence[Path],
        directory: Path,
        pool: ProcessPoolExecutor | None,
        meter: Meter,
    ) -> DomainCounts:
        writer = DomainWriter(directory, name, self._policy, files)
        if writer.counts is not None:
            meter.skip(sum(file.stat().st_size for file in files))
            return writer.counts
        meter.skip(sum(file.stat().st_size for file in files[: writer.next_file]))
        uncommitted = 0
        for item, encoded in self._encode_in_order(self._items(files, writer), pool, meter):
            file = files[item.file_number]
            if encoded is None or item.chunk is None:
                writer.end_file()
                meter.end_file(file.stat().st_size)
                continue
            writer.add(encoded)
            meter.add(encoded.num_documents, item.chunk.position)
            uncommitted += 1
            if uncommitted >= max(CHUNKS_BETWEEN_COMMITS, writer.next_file // FILES_A_CHUNK):
                writer.commit()
                uncommitted = 0
        return writer.finish()

    def _items(self, files: Sequence[Path], writer: DomainWriter) -> Iterator[_Item]:
        """Yield chunks that are not written yet, and the end of each file."""
        begin, skipped = writer.next_file, writer.next_chunk  # now, for the writer moves on
        set_name: str | None = None
        for number in range(begin, len(files)):
            chunks = read_chunks(
                files[number],
                json_key=self._config.json_key,
                tokens_dtype=self._config.tokens_dtype,
                chunk_bytes=self._chunk_bytes,
                max_document_mb=self._config.max_document_mb,
            )
            for place, chunk in enumerate(chunks):
                if chunk.set_name is not None:
                    set_name = chunk.set_name if set_name is None else set_name
                    check_set(chunk.set_name, set_name, f"{chunk.file}, sample {chunk.first}")
                if number > begin or place >= skipped:
                    yield _Item(number, chunk)
            yield _Item(number, None)

    def _encode_in_order(
        self, items: Iterator[_Item], pool: ProcessPoolExecutor | None, meter: Meter
    ) -> Iterator[tuple[_Item, EncodedChunk | None]]:
        """Encode chunks, in ``pool`` if there is one, and yield them in their order."""
        if pool is None:
            for item in items:
                if item.chunk is None:
                    yield item, None
                else:
                    meter.begin(item.chunk.last_place, item.chunk.size)
                    yield item, encode_chunk(self._policy, item.chunk)
            return
        # Not Pool.imap: it reads the whole input ahead, and hangs where a worker is killed.
        pending: deque[_PendingItem] = deque()
        for item in items:
            if (chunk := item.chunk) is None:
                pending.append(_PendingItem(item, None))
            else:
                with _interrupts_held():
                    future = pool.submit(encode_chunk, self._policy, chunk)
                # Kept without its text, which the worker has.
                emptied = _Item(item.file_number, chunk._replace(records=[]))
                pending.append(_PendingItem(emptied, future, chunk.last_place, chunk.size))
            while len(pending) >= self._workers * CHUNKS_AHEAD or (
                sum(each.size for each in pending) > self._workers * BYTES_AHEAD
            ):
                yield pending.popleft().result(meter)
        while pending:
            yield pending.popleft().result(meter)


class _PendingItem(NamedTuple):
    """A chunk that a worker has, or the end of a file between such chunks."""

    item: _Item
    future: Future[EncodedChunk] | None
    last_place: str = ""
    size: int = 0

    def result(self, meter: Meter) -> tuple[_Item, EncodedChunk | None]:
        """Wait for the encoded chunk."""
        if self.future is None:
            return self.item, None
        meter.begin(self.last_place, self.size)
        return self.item, self.future.result()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back an interrupt from the keyboard, also from processes started meanwhile.

    A worker that is interrupted while it starts, before it ignores interrupts, would print a
    traceback of its own. It inherits the mask of this thread. Other threads of this process take
    the signal instead, so the handler here has to wait too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # interrupts are the main thread's
        return
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            signal.raise_signal(signal.SIGINT)
