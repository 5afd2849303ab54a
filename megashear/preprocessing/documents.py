"""Documents: checked, tokenised and assigned to training or held-out text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megashear.preprocessing.conversations import ChatEncoder, Skipped, read_messages, to_learn
from megashear.preprocessing.inputs import read_chunks
from megashear.preprocessing.long_text import encode_parts
from megashear.preprocessing.text_files import Chunk, Record
from megashear.tokenizer.chat_template import Message, chat_template
from megashear.tokenizer.choice import load_tokenizer

EMPTY = "empty"
"""Reason to skip a document: it has no text but blanks, or no token."""
NOT_TEXT = "not a string"
"""Reason to skip a document: null, a number or a list stands where text belongs."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. JSON can escape one, as in web text that was cut, and no tokenizer
accepts it; the reader of JSON has made one character of each whole pair."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingPolicy:
    """How a record is encoded; hashable and picklable, for workers load their tokenizer from it."""

    tokenizer_path: Path
    """File or directory of the tokenizer."""
    json_key: str
    """Key of the text in a line."""
    prepend_bos: bool
    """Begin every document of text with the tokenizer's BOS."""
    append_eod: bool
    """End every document of text with the tokenizer's EOS."""
    held_out_fraction: float
    """Expected share of held-out documents."""
    dtype: str
    """Name of the numpy type of stored tokens."""
    chat_template: str | None = None
    """Text of the template by which records are conversations; None where they are text."""
    first_turn: bool = False
    """Keep a conversation up to its first answer."""


class EncodedSide(NamedTuple):
    """Documents of a chunk on one side, training or held out, back to back."""

    tokens: npt.NDArray[np.integer]  # [tokens]
    lengths: npt.NDArray[np.int32]  # [documents]


class EncodedChunk(NamedTuple):
    """Chunk whose documents are tokenised and assigned to a side."""

    train: EncodedSide
    held_out: EncodedSide
    skipped: Counter[str]
    """Number of records left out, by reason."""
    text_bytes: int
    """Size of the texts that were tokenised, bytes of UTF-8."""
    num_pretokenised: int
    """Number of documents that came as tokens."""
    lone_surrogates: int = 0
    """Number of halves of surrogate pairs in the texts; each was replaced by U+FFFD."""

    @property
    def num_documents(self) -> int:
        """Number of documents on both sides."""
        return len(self.train.lengths) + len(self.held_out.lengths)


def read_texts(file: Path, json_key: str) -> Iterator[str]:
    """Yield the text of every document of a file of text; one is held at a time.

    Raises:
        ValueError: a record is not a JSON object with text under ``json_key``; names the file and
            the line.
    """
    for chunk in read_chunks(file, json_key=json_key):
        for number, record in enumerate(chunk.records, start=chunk.first):
            place = f"{file}, {chunk.unit} {number}"
            if not isinstance(record, (str, bytes)):
                raise ValueError(f"{place} holds a {type(record).__name__}; text is wanted")
            if isinstance(record, str) or record.strip():
                text = _text(record, json_key, place)
                if not isinstance(text, str):
                    raise ValueError(
                        f"{place} has a {type(text).__name__} under {json_key!r}; text is wanted"
                    )
                yield LONE_SURROGATE.sub("\ufffd", text)


def check_first(
    file: Path, json_key: str, tokens_dtype: str, max_document_mb: int, *, is_chat: bool = False
) -> None:
    """Check the first record of a file, for most mistakes are in all records.

    Args:
        file: of any kind.
        json_key: key of the text.
        tokens_dtype: numpy type of ids in an MDS shard.
        max_document_mb: longest record, MB.
        is_chat: whether records are conversations.

    Raises:
        ValueError: the file cannot be read, or its first record is not valid; names the file and
            the line.
    """
    chunks = read_chunks(
        file,
        json_key=json_key,
        tokens_dtype=tokens_dtype,
        chunk_bytes=1,
        max_document_mb=max_document_mb,
    )
    for chunk in chunks:
        for number, record in enumerate(chunk.records, start=chunk.first):
            place = f"{file}, {chunk.unit} {number}"
            if isinstance(record, bytes) and not record.strip():
                continue
            if is_chat:
                with contextlib.suppress(Skipped):
                    _conversation(record, place)
            else:
                _text(record, json_key, place)
            return


def encode_chunk(policy: EncodingPolicy, chunk: Chunk) -> EncodedChunk:
    """Tokenise the documents of a chunk.

    Raises:
        ValueError: a line is not a JSON object with ``policy.json_key``, or an id is beyond the
            tokenizer's vocabulary; names the file and the line.
    """
    encoder = _encoder(policy)
    sides: tuple[list[npt.NDArray[np.integer]], ...] = ([], [])
    skipped: Counter[str] = Counter()
    text_bytes = num_pretokenised = lone_surrogates = 0
    tokens: npt.NDArray[np.integer]
    for number, record in enumerate(chunk.records, start=chunk.first):
        if isinstance(record, bytes) and not record.strip():
            continue  # a blank line is no document
        place = f"{chunk.file}, {chunk.unit} {number}"
        if encoder.chat is not None:
            try:
                messages, replaced = _conversation(record, place)
                messages = to_learn(messages, first_turn=policy.first_turn)
                tokens, size = encoder.chat.encode(messages)
            except Skipped as reason:
                skipped[str(reason)] += 1
                continue
            is_held_out = encoder.is_held_out(json.dumps(messages).encode())
            text_bytes += size
            lone_surrogates += replaced
        elif isinstance(record, np.ndarray):  # tokens: check them
            if not len(record):
                skipped[EMPTY] += 1
                continue
            tokens, content = encoder.check_tokens(record, place)
            is_held_out = encoder.is_held_out(content)
            num_pretokenised += 1
        else:  # text: replace halves of surrogate pairs, choose the side, tokenise
            text = _text(record, policy.json_key, place)
            if not isinstance(text, str):
                skipped[NOT_TEXT] += 1
                continue
            try:
                content, replaced = text.encode(), 0
            except UnicodeEncodeError:
                text, replaced = LONE_SURROGATE.subn("\ufffd", text)
                content = text.encode()
            size, is_held_out = len(content), encoder.is_held_out(content)
            del content  # a document may be long, and its tokens take even more
            found = encoder.encode(text)
            if found is None:
                skipped[EMPTY] += 1
                continue
            tokens = found
            text_bytes += size
            lone_surrogates += replaced
        sides[is_held_out].append(tokens)
    train, held_out = (_side(side, policy.dtype) for side in sides)
    return EncodedChunk(train, held_out, skipped, text_bytes, num_pretokenised, lone_surrogates)


class _Encoder:
    """A policy with its tokenizer loaded."""

    def __init__(self, policy: EncodingPolicy) -> None:
        self._tokenizer = load_tokenizer(policy.tokenizer_path)
        self._dtype = np.dtype(policy.dtype)
        self._before = [self._tokenizer.bos_id] if policy.prepend_bos else []
        self._after = [self._tokenizer.eos_id] if policy.append_eod else []
        self._held_out_below = int(policy.held_out_fraction * 2**64)
        self.chat: ChatEncoder | None = None
        """Encodes conversations; None where records are text."""
        if policy.chat_template is not None:
            template = chat_template(self._tokenizer, policy.chat_template)
            self.chat = ChatEncoder(self._tokenizer, template)

    def encode(self, text: str) -> npt.NDArray[np.integer] | None:
        """Return the tokens of a document; None where it is blank."""
        if not text or text.isspace():
            return None
        parts = [
            np.array(ids, dtype=self._dtype)  # at once: a list takes 36 bytes a token
            for ids in encode_parts(self._tokenizer.encode, text)
        ]
        if not any(map(len, parts)):
            return None
        ends = [np.array(ids, dtype=self._dtype) for ids in (self._before, self._after)]
        return np.concatenate([ends[0], *parts, ends[1]])

    def check_tokens(
        self, tokens: npt.NDArray[np.number], place: str
    ) -> tuple[npt.NDArray[np.integer], bytes]:
        """Return tokens in the stored type, and the bytes by which their side is chosen."""
        size = self._tokenizer.vocab_size
        wrong = np.flatnonzero((tokens < 0) | (tokens >= size))
        if len(wrong):
            raise ValueError(
                f"{place}: token {wrong[0] + 1} is {tokens[wrong[0]]}, but the tokenizer "
                f"{self._tokenizer.path} has {size} ids; give the tokenizer that made these data "
                f"(--tokenizer-model), or their type (--tokens-dtype)"
            )
        # The bytes have one type whatever the file's: a document keeps its side in any type.
        return tokens.astype(self._dtype), tokens.astype("<i4").tobytes()

    def is_held_out(self, content: bytes) -> bool:
        """Return whether a document belongs to the held-out side."""
        # By the content alone: a document keeps its side whatever files join the domain, and
        # copies of a text share a side.
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._held_out_below


@lru_cache(maxsize=1)
def _encoder(policy: EncodingPolicy) -> _Encoder:
    """Load the encoder once in each process: that takes longer than to encode a chunk."""
    return _Encoder(policy)


def _side(documents: list[npt.NDArray[np.integer]], dtype: str) -> EncodedSide:
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=dtype)
    return EncodedSide(tokens, np.array([len(each) for each in documents], dtype=np.int32))


def _text(record: Record, key: str, place: str) -> object:
    """Return what a record holds as its text, of any type."""
    if not isinstance(record, bytes):
        return record
    line = _json_object(record, place)
    if key not in line:
        raise ValueError(
            f"{place} has no key {key!r}, only {sorted(line)}; name the key of the text with "
            f"--json-key, or move the file away if it is no text"
        )
    if isinstance(line, _RepeatedKeys) and line.counts[key] > 1:
        raise ValueError(
            f"{place} has the key {key!r} {line.counts[key]} times, so its text is not clear; "
            f"keep one of them"
        )
    return line[key]


def _conversation(record: Record, place: str) -> tuple[list[Message], int]:
    """Return the messages of a record, and how many halves of surrogate pairs were replaced."""
    if not isinstance(record, bytes):
        raise ValueError(
            f"{place} is no JSON; --chat-format reads conversations from JSON lines or arrays "
            f"(*.jsonl, *.json): write them so, or move the file away"
        )
    messages: list[Message] = []
    replaced = 0
    for message in read_messages(_json_object(record, place), place):
        content, count = LONE_SURROGATE.subn("\ufffd", message["content"])
        messages.append({**message, "content": content})
        replaced += count
    return messages, replaced


def _json_object(record: bytes, place: str) -> dict[str, object]:
    try:
        # From text, for json takes bytes for UTF-16 or UTF-32 too, whose lines were cut wrongly.
        line = json.loads(record.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error}; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is not valid JSON: {error}; wanted: an object a line, or one array of "
            f"objects; mend it, or move the file away if it is no text"
        ) from None
    if not isinstance(line, dict):
        raise ValueError(f"{place} holds a {type(line).__name__}; a JSON object is wanted")
    return line


class _RepeatedKeys(dict[str, object]):
    """JSON object in which a key occurs more than once; its last value counts."""

    counts: Counter[str]
    """Number of times that each key occurs."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _RepeatedKeys(found)
    repeated.counts = Counter(key for key, _ in pairs)
    return repeated
