"""Documents of jsonl files, found, checked, tokenised and assigned to training or held-out text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megashear.data.tokenizer import load_tokenizer

CHUNK_BYTES = 1 << 20
"""Text handed to a worker at a time, bytes; a longer line is a chunk of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingPolicy:
    """What becomes of a line; hashable and picklable, for workers load their tokenizer from it."""

    tokenizer_path: Path
    """Tokenizer file or directory."""
    json_key: str
    """Key under which a line holds its text."""
    prepend_bos: bool
    """Begin every document with the tokenizer's BOS."""
    append_eod: bool
    """End every document with the tokenizer's EOS."""
    held_out_fraction: float
    """Documents that go to the held-out set, expected share."""
    dtype: str
    """Name of the numpy type that tokens are stored in."""


class Chunk(NamedTuple):
    """Consecutive lines of one file."""

    file: Path
    first_line: int
    """Number of the first line, 1-based, as editors count."""
    lines: list[bytes]


class Document(NamedTuple):
    """One tokenised document."""

    tokens: npt.NDArray[np.integer]  # [tokens]
    held_out: bool


class EncodedChunk(NamedTuple):
    """What a chunk became."""

    documents: list[Document]
    num_skipped: int
    """Documents without text."""
    num_bytes: int
    """Size of the chunk's lines, bytes."""


def find_domains(directory: str | Path) -> dict[str, list[Path]]:
    """Domains of a directory of text: one per ``*.jsonl``, one per subdirectory that holds some.

    Returns:
        Files of each domain, domains and files in the order of their names.

    Raises:
        ValueError: no such directory, no jsonl file, or one name given both ways.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds *.jsonl files")
    domains = {file.stem: [file] for file in directory.glob("*.jsonl") if file.is_file()}
    for folder in filter(Path.is_dir, directory.iterdir()):
        files = sorted(file for file in folder.glob("*.jsonl") if file.is_file())
        if files and folder.name in domains:
            raise ValueError(
                f"domain {folder.name!r} is there twice: {folder}.jsonl and {folder}/; "
                f"rename one, or move the file into the directory"
            )
        if files:
            domains[folder.name] = files
    if not domains:
        packed = sum(1 for _ in directory.rglob("*.jsonl.*"))
        hint = f"; unpack its {packed} compressed *.jsonl.* files first" if packed else ""
        raise ValueError(f"no *.jsonl file in {directory} or one level below{hint}")
    return dict(sorted(domains.items()))


def read_chunks(file: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a file into runs of whole lines of about ``chunk_bytes``; holds one run at a time."""
    lines: list[bytes] = []
    first, size = 1, 0
    with file.open("rb") as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= chunk_bytes:
                yield Chunk(file, first, lines)
                first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(file, first, lines)


def read_texts(file: Path, json_key: str) -> Iterator[str]:
    """Text of every document of a jsonl file, one held at a time.

    Raises:
        ValueError: a line is not a JSON object with text under ``json_key``; names the file and
            the line.
    """
    for chunk in read_chunks(file):
        for number, line in enumerate(chunk.lines, start=chunk.first_line):
            if line.strip():
                yield _text(line, json_key, f"{file}, line {number}")


def encode_chunk(policy: EncodingPolicy, chunk: Chunk) -> EncodedChunk:
    """Tokenise the documents of a chunk.

    Raises:
        ValueError: a line is not a JSON object with text under ``policy.json_key``; names the
            file and the line.
    """
    encoder = _encoder(policy)
    documents, num_skipped = [], 0
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        if not line.strip():
            continue
        document = encoder.encode(_text(line, policy.json_key, f"{chunk.file}, line {number}"))
        if document is None:
            num_skipped += 1
        else:
            documents.append(document)
    return EncodedChunk(documents, num_skipped, sum(map(len, chunk.lines)))


class _Encoder:
    """A policy with its tokenizer loaded."""

    def __init__(self, policy: EncodingPolicy) -> None:
        self._tokenizer = load_tokenizer(policy.tokenizer_path)
        self._dtype = np.dtype(policy.dtype)
        self._before = [self._tokenizer.bos_id] if policy.prepend_bos else []
        self._after = [self._tokenizer.eos_id] if policy.append_eod else []
        self._held_out_below = int(policy.held_out_fraction * 2**64)

    def encode(self, text: str) -> Document | None:
        """The document that ``text`` makes; None where it is blank."""
        ids = self._tokenizer.encode(text) if text.strip() else []
        if not ids:
            return None
        tokens = np.array([*self._before, *ids, *self._after], dtype=self._dtype)
        # Of the text alone: a document stays on its side whatever files join the domain, and
        # copies of a text never end up on both sides.
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return Document(tokens, int.from_bytes(digest, "big") < self._held_out_below)


@lru_cache(maxsize=1)
def _encoder(policy: EncodingPolicy) -> _Encoder:
    """Loaded once in each process: a tokenizer takes longer to load than a chunk to encode."""
    return _Encoder(policy)


def _text(line: bytes, key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # broken JSON, or not UTF-8
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds a {type(record).__name__}; a JSON object is wanted")
    if key not in record:
        raise ValueError(
            f"{place} has no key {key!r}, only {sorted(record)}; name the key of the text with "
            f"--json-key"
        )
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{place} has a {type(text).__name__} under {key!r}; text is wanted")
    # JSON can escape half a surrogate pair, which no tokenizer accepts; web text has them.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
