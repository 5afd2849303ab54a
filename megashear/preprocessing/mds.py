"""Tokens in MDS shards, the format of mosaicml-streaming, in which LLM-Shearing keeps its data.

A directory has an index.json that lists shards. A shard is, little-endian: the number of samples n
(u32), n + 1 offsets of samples in the shard (u32), its description as JSON, and the samples. A
sample is the size (u32) of each column without a fixed size, then the columns in the order of their
names.

Source: mosaicml-streaming 0.13.0, streaming/base/format/mds; checked against shards that it wrote
(tests/data/README.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megashear.files.regular import inside, open_regular
from megashear.files.structured import LARGE_JSON_BYTES, parse_json, read_json, read_json_object
from megashear.preprocessing.text_files import Chunk, Record
from megashear.preprocessing.unpack import DAMAGES, unpacked

INDEX_NAME = "index.json"
COLUMN = "tokens"
SET = "set"
PACKED = {".zstd": "zstd", ".gz": "gz"}
"""Suffixes of packed shards that are read, with mosaicml-streaming's names of the packings."""
LARGEST = 2**32 - 1
"""Size of the largest possible shard, bytes: offsets have four bytes."""


def is_mds(directory: Path) -> bool:
    """Return whether a directory's index.json lists shards.

    Raises:
        ValueError: index.json cannot be read, and shards lie beside it.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        return False
    try:
        return isinstance(read_json(index, max_bytes=LARGE_JSON_BYTES).get("shards"), list)
    except (ValueError, AttributeError) as error:
        if next(directory.glob("*.mds*"), None) is not None:
            raise ValueError(
                f"{index} does not list the MDS shards beside it: {error}; copy it again from "
                f"where the shards were written"
            ) from None
        return False


def shards_of(directory: Path) -> list[Path]:
    """Return the shards that the directory's index.json lists, after a check of their sizes.

    Raises:
        ValueError: a shard is missing, was cut short, is of another format, or has a packing that
            is not read.
    """
    index = directory / INDEX_NAME
    shards = []
    for shard in read_json_object(index, max_bytes=LARGE_JSON_BYTES)["shards"]:
        try:
            found = _shard(directory, shard)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} does not describe MDS shards: no {error}") from None
        shards.append(found)
    return shards


def listed_files(directory: Path) -> set[Path]:
    """Return every file that the directory's index.json names, packed and unpacked."""
    index = directory / INDEX_NAME
    listed = read_json_object(index, max_bytes=LARGE_JSON_BYTES)["shards"]
    forms = (shard[form] for shard in listed for form in ("raw_data", "zip_data"))
    return {inside(directory, form["basename"], index) for form in forms if form}


def read_mds(file: Path, tokens_dtype: str, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut the samples of a shard into chunks; holds one shard, by default 64 MiB.

    Args:
        file: path of the shard.
        tokens_dtype: numpy type of the ids in its column ``tokens``.
        chunk_bytes: size of a chunk, bytes, at 4 a token.

    Raises:
        ValueError: the shard is damaged, has no column ``tokens`` of bytes, or ids of another size.
    """
    data = _unpacked(file)
    try:
        description, offsets = _description(data)
        names = list(description["column_names"])
        sizes = list(description["column_sizes"])
        encodings = dict(zip(names, description["column_encodings"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not an MDS shard: {error}; download it again") from None
    _check_columns(file, encodings)
    dtype = np.dtype(tokens_dtype).newbyteorder("<")
    total = file.stat().st_size
    records: list[Record] = []
    first, size, set_name = 1, 0, None
    for number, (begin, end) in enumerate(itertools.pairwise(offsets), start=1):
        place = f"{file}, sample {number}"
        columns = _columns(data[begin:end], names, sizes, place)
        found = columns.get(SET, b"").decode(errors="replace")
        set_name = found if set_name is None else set_name
        check_set(found, set_name, place)
        tokens = _tokens(columns[COLUMN], dtype, place)
        records.append(tokens)
        size += len(tokens) * 4
        if size >= chunk_bytes:
            yield Chunk(file, "sample", first, records, total * end // len(data), set_name)
            first, records, size = number + 1, [], 0
    if records:
        yield Chunk(file, "sample", first, records, total, set_name)


def check_set(found: str, wanted: str, place: str) -> None:
    """Refuse samples of several sets in one domain.

    Raises:
        ValueError: ``found`` is not ``wanted``.
    """
    if found != wanted:
        raise ValueError(
            f"{place} is of the set {found!r}, those before are of {wanted!r}; a domain takes one: "
            f"write one MDS directory for each set, or leave this one out (held-out sets are split "
            f"off here, so LLM-Shearing's merged evaluation sets are not needed)"
        )


def _shard(directory: Path, shard: Mapping[str, Any]) -> Path:
    index = directory / INDEX_NAME
    if shard["format"] != "mds" or shard["version"] != 2:
        raise ValueError(
            f"{index} lists shards of format {shard['format']!r} version {shard['version']}; "
            f"'mds' version 2 is read"
        )
    packed, packing = shard["zip_data"], (shard["compression"] or "").partition(":")[0]
    # Both forms may exist, for mosaicml-streaming unpacks shards beside the packed ones.
    for described in filter(None, (shard["raw_data"], packed)):
        file = inside(directory, described["basename"], index)
        if not file.is_file():
            continue
        if file.stat().st_size != described["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, {index} wants {described['bytes']}; "
                f"download it again"
            )
        if described is packed and packing not in PACKED.values():
            raise ValueError(
                f"{file} is packed with {packing}, which is not read; unpack it, or write it again "
                f"with {' or '.join(PACKED.values())}, or without compression"
            )
        return file
    names = [str(directory / d["basename"]) for d in (shard["raw_data"], packed) if d]
    raise ValueError(
        f"{' or '.join(names)} is missing, which {index} lists; download the whole directory"
    )


def _unpacked(file: Path) -> bytes:
    with open_regular(file) as raw:
        if file.suffix not in PACKED:
            data = raw.read(LARGEST + 1)
        else:
            try:
                data = unpacked(raw, file).read(LARGEST + 1)
            except DAMAGES as error:
                raise ValueError(f"{file} is damaged: {error}; download it again") from None
    if len(data) > LARGEST:
        raise ValueError(
            f"{file} is no MDS shard: it has more than the {LARGEST:,} bytes that one can have; "
            f"download it again"
        )
    return data


def _description(data: bytes) -> tuple[dict[str, Any], list[int]]:
    """Return the description of a shard and the offsets of its samples; the last is its size."""
    if len(data) < 8:
        raise ValueError(f"it has {len(data)} bytes")
    (count,) = np.frombuffer(data, "<u4", count=1).tolist()
    begin = 4 * (count + 2)
    if begin > len(data):
        raise ValueError(f"it has {len(data)} bytes, too few for the {count} samples it names")
    offsets = np.frombuffer(data, "<u4", count=count + 1, offset=4).tolist()
    if offsets[-1] != len(data) or any(a > b for a, b in itertools.pairwise([begin, *offsets])):
        raise ValueError(f"it has {len(data)} bytes, its samples end at {offsets[-1]}")
    description = parse_json(data[begin : offsets[0]], "its description")
    return description, offsets


def _check_columns(file: Path, encodings: Mapping[str, str]) -> None:
    if COLUMN not in encodings:
        raise ValueError(
            f"{file} has no column {COLUMN!r}, only {sorted(encodings)}; MDS data are read where "
            f"they were tokenised (text: write it as jsonl)"
        )
    if encodings[COLUMN] != "bytes":
        raise ValueError(
            f"{file} has column {COLUMN!r} as {encodings[COLUMN]!r}; 'bytes' is wanted, the ids as "
            f"LLM-Shearing writes them"
        )


def _columns(sample: bytes, names: list[str], sizes: list[Any], place: str) -> dict[str, bytes]:
    at = 4 * sum(size is None for size in sizes)
    written = iter(np.frombuffer(sample[:at], "<u4").tolist())
    columns = {}
    try:
        for name, size in zip(names, sizes):
            width = next(written) if size is None else size
            columns[name] = sample[at : at + width]
            at += width
    except StopIteration:
        at = -1
    if at != len(sample):
        raise ValueError(f"{place} is damaged: its columns do not fill it; download it again")
    return columns


def _tokens(column: bytes, dtype: np.dtype[Any], place: str) -> npt.NDArray[np.number]:
    if len(column) % dtype.itemsize:
        raise ValueError(
            f"{place} has {len(column)} bytes of tokens, no multiple of the {dtype.itemsize} of "
            f"{dtype.name}; name their type with --tokens-dtype"
        )
    tokens = np.frombuffer(column, dtype=dtype)
    # Wide ids read in a narrow type are small numbers with zeros between: none is out of range.
    if dtype.itemsize < 8 and len(tokens) > 3 and not tokens[1::2].any():
        raise ValueError(
            f"{place}: as {dtype.name}, every other id is 0, so its tokens are wider; name their "
            f"type with --tokens-dtype (int32 or int64)"
        )
    return tokens
