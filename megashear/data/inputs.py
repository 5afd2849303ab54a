"""What can be preprocessed: which files make a domain, and how each kind is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from megashear.data.indexed import check_pair, read_documents
from megashear.data.manifest import MANIFEST_NAME
from megashear.data.mds import is_mds, read_mds, shards_of
from megashear.data.text_files import CHUNK_BYTES, Chunk, Record, read_jsonl, read_parquet

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd", ".parquet")
SHARD_SUFFIXES = (".mds", ".mds.zstd", ".mds.gz")
MEGATRON_SUFFIX = ".bin"
KINDS = "*.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet, Megatron's *.bin with *.idx, or MDS shards"
"""What a directory of data may hold, for messages."""


def find_domains(directory: str | Path, json_key: str = "text") -> dict[str, list[Path]]:
    """Domains of a directory: one per data file, one per subdirectory that holds some.

    A subdirectory is searched to any depth. Data files are text (``TEXT_SUFFIXES``), Megatron's
    ``.bin`` with its ``.idx``, and directories of MDS shards, which are a domain each.

    Args:
        directory: where to look.
        json_key: Megatron-LM's preprocess_data.py appends ``_{json_key}_document`` to the names of
            its files, which is no part of the domain's name.

    Returns:
        Files of each domain, domains and files in the order of their names.

    Raises:
        ValueError: no such directory, no data in it, one name given twice, a data directory of our
            own, or files that look like data and cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds {KINDS}")
    if is_mds(directory):
        raise ValueError(
            f"{directory} is one directory of MDS shards; give the directory above it, in which "
            f"each subdirectory is a domain"
        )
    domains: dict[str, list[Path]] = {}
    came_from: dict[str, Path] = {}
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        files = _files_below(entry) if entry.is_dir() else _data_files([entry])
        if not files:
            if entry.is_dir():
                logger.warning("%s holds no %s: it is no domain", entry, KINDS)
            continue
        if any(f.suffix == MEGATRON_SUFFIX and (f.parent / MANIFEST_NAME).is_file() for f in files):
            raise ValueError(
                f"{entry} is what megashear preprocess wrote, held-out sets among it: use it with "
                f"--data-path, or give the directory of what it was made of"
            )
        name = entry.name if entry.is_dir() else _domain_name(entry, json_key)
        if name in domains:
            raise ValueError(
                f"domain {name!r} is there twice: {came_from[name]} and {entry}; rename one, or "
                f"move both into a directory {directory / name}"
            )
        domains[name], came_from[name] = files, entry
    if not domains:
        raise ValueError(f"no data in {directory} or below it: wanted {KINDS}")
    return dict(sorted(domains.items()))


def read_chunks(
    file: Path,
    *,
    json_key: str = "text",
    tokens_dtype: str = "uint16",
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Chunk]:
    """Cut a data file of any kind into chunks; what is held does not grow with the file.

    Args:
        file: one of those that ``find_domains`` finds.
        json_key: column of the text in a parquet file.
        tokens_dtype: numpy type of ids in an MDS shard.
        chunk_bytes: size of a chunk, bytes of text, or of tokens at 4 each.

    Raises:
        ValueError: the file is damaged or of no known kind.
    """
    if file.name.endswith(".parquet"):
        return read_parquet(file, json_key, chunk_bytes)
    if file.name.endswith(SHARD_SUFFIXES):
        return read_mds(file, tokens_dtype, chunk_bytes)
    if file.name.endswith(MEGATRON_SUFFIX):
        return _read_megatron(file, chunk_bytes)
    if file.name.endswith(TEXT_SUFFIXES):
        return read_jsonl(file, chunk_bytes)
    raise ValueError(f"{file} is of no kind that is read; wanted {KINDS}")


def _read_megatron(file: Path, chunk_bytes: int) -> Iterator[Chunk]:
    records: list[Record] = []
    first = size = position = 0
    for tokens in read_documents(file.with_suffix("")):
        records.append(tokens)
        size += len(tokens) * 4
        position += tokens.nbytes
        if size >= chunk_bytes:
            yield Chunk(file, "document", first + 1, records, position)
            first, records, size = first + len(records), [], 0
    if records:
        yield Chunk(file, "document", first + 1, records, position)


def _files_below(folder: Path) -> list[Path]:
    """Data files of a folder, at any depth, by name."""
    if is_mds(folder):
        return shards_of(folder)
    files: list[Path] = []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files += _data_files([entry for entry in entries if not entry.is_dir()])
    for entry in entries:
        if entry.is_dir():
            files += _files_below(entry)
    return files


def _data_files(files: list[Path]) -> list[Path]:
    found = []
    for file in files:
        if file.name.endswith(SHARD_SUFFIXES):
            raise ValueError(
                f"{file} lies in no directory whose index.json lists it, so nobody knows which "
                f"shards are missing; copy the index.json too"
            )
        if file.name.endswith(MEGATRON_SUFFIX):
            check_pair(file.with_suffix(""))
            found.append(file)
        elif file.suffix == ".idx" and not file.with_suffix(MEGATRON_SUFFIX).is_file():
            check_pair(file.with_suffix(""))  # says that the .bin is missing
        elif file.name.endswith(TEXT_SUFFIXES):
            found.append(file)
        elif {".jsonl", ".parquet"} & set(file.suffixes[:-1]):
            raise ValueError(f"{file} looks like data and cannot be read; wanted {KINDS}")
    return found


def _domain_name(file: Path, json_key: str) -> str:
    for suffix in (*TEXT_SUFFIXES, MEGATRON_SUFFIX):
        if file.name.endswith(suffix):
            return file.name.removesuffix(suffix).removesuffix(f"_{json_key}_document")
    raise AssertionError(file)
