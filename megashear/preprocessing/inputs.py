"""Files that can be preprocessed: which of them make a domain, and how each kind is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megashear.config.defaults import JSON_KEY, MAX_DOCUMENT_MB, TOKENS_DTYPE
from megashear.data.indexed import check_pair, read_documents
from megashear.data.manifest import MANIFEST_NAME
from megashear.files.pointers import refuse_pointer
from megashear.preprocessing.journal import FOLDER
from megashear.preprocessing.mds import INDEX_NAME, is_mds, listed_files, read_mds, shards_of
from megashear.preprocessing.text_files import (
    CHUNK_BYTES,
    Chunk,
    Record,
    read_json,
    read_parquet,
    read_plain,
)
from megashear.preprocessing.unpack import PACKINGS

logger = logging.getLogger(__name__)

JSON_SUFFIXES = tuple(
    f"{name}{packing}" for name in (".jsonl", ".json", ".ndjson") for packing in ("", *PACKINGS)
)
PLAIN_SUFFIXES = tuple(f".txt{packing}" for packing in ("", *PACKINGS))
TEXT_SUFFIXES = (*JSON_SUFFIXES, *PLAIN_SUFFIXES, ".parquet")
"""Suffixes of text files, in upper or lower case."""
SHARD_SUFFIXES = (".mds", ".mds.zstd", ".mds.gz")
MEGATRON_SUFFIX = ".bin"
KINDS = (
    "JSON lines or arrays (*.jsonl, *.json), plain text (*.txt), either as *.gz or *.zst, "
    "*.parquet, Megatron's *.bin with *.idx, or MDS shards"
)
"""Kinds of files that are read, for messages."""
REFUSED_SUFFIXES = frozenset(
    [
        *(".xz", ".bz2", ".lzma", ".lz4", ".br", ".zip", ".7z", ".rar", ".tar", ".tgz", *PACKINGS),
        *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".warc"),
    ]
)
"""Suffixes of files that are likely data and are not read: archives, tables, packed files."""
NUM_NAMED = 5
"""Number of files named in a message that counts them all."""
NUM_CHECKED = 256
"""Number of JSON files of a folder whose first record is checked; each is opened once."""


class Inputs(dict[str, list[Path]]):
    """Files of each domain; domains and files are in the order of their names."""

    def __init__(self, domains: dict[str, list[Path]], unread: list[Path]) -> None:
        super().__init__(sorted(domains.items()))
        self.unread = unread
        """Files of other kinds, which are not read."""

    def summary(self) -> str:
        """Return how many files are read, of each kind."""
        kinds = Counter(_suffix(file) for files in self.values() for file in files)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        count = kinds.total()
        return f"{count} {'file' if count == 1 else 'files'} read: {named}"

    def unread_summary(self) -> str:
        """Return how many files are not read, and which; empty where all are read."""
        if not self.unread:
            return ""
        count = len(self.unread)
        named = ", ".join(str(file) for file in self.unread[:NUM_NAMED])
        more = f" and {count - NUM_NAMED} more" if count > NUM_NAMED else ""
        return f"{count} {'file is' if count == 1 else 'files are'} not read: {named}{more}"


def find_domains(directory: str | Path, json_key: str = JSON_KEY) -> Inputs:
    """Find the domains of a directory: one per data file, one per subdirectory that holds some.

    A subdirectory is searched to any depth. Data files are text (``TEXT_SUFFIXES``), Megatron's
    ``.bin`` with its ``.idx``, and directories of MDS shards, each of which is a domain. Files of
    other kinds are counted and named in a warning.

    Args:
        directory: directory of the data.
        json_key: Megatron-LM's preprocess_data.py appends ``_{json_key}_document`` to the names of
            its files; this is not part of the domain's name.

    Raises:
        ValueError: the directory does not exist or holds no data, a name or a file (by links)
            occurs twice, the data are what ``megashear preprocess`` wrote, or a file looks like
            data and cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds {KINDS}")
    if is_mds(directory):
        raise ValueError(
            f"{directory} is one directory of MDS shards; give the directory above it, in which "
            f"each subdirectory is a domain"
        )
    search = _Search()
    search.check_new(directory)
    domains: dict[str, list[Path]] = {}
    came_from: dict[str, Path] = {}
    for entry in sorted(directory.iterdir()):
        # Find the files.
        files = search.files_of(entry)
        if not files:
            if entry.is_dir() and not entry.name.startswith("."):
                logger.warning("%s holds no data, so it is not a domain", entry)
            continue
        # Refuse or name likely mistakes.
        if any(f.suffix == MEGATRON_SUFFIX and (f.parent / MANIFEST_NAME).is_file() for f in files):
            raise ValueError(
                f"{entry} is what megashear preprocess wrote, held-out sets among it: use it with "
                f"--data-path, or give the directory of what it was made of"
            )
        if len(files) == 1 and files[0].name.lower().endswith(PLAIN_SUFFIXES):
            raise ValueError(
                f"{files[0]} is plain text, which is one document a file, and a domain needs two "
                f"or more: put several into one folder, write it as JSON lines, or move it away"
            )
        plain = [file for file in files if file.name.lower().endswith(PLAIN_SUFFIXES)]
        if plain and len(plain) < len(files):
            logger.warning(
                "%s: %d of its %d files are plain text, each read as one document, %s first; move "
                "away what is not data, such as a README",
                *(entry, len(plain), len(files), plain[0]),
            )
        # Name the domain.
        name = entry.name if entry.is_dir() else _domain_name(entry, json_key)
        if name in domains:
            raise ValueError(
                f"domain {name!r} is there twice: {came_from[name]} and {entry}; rename one, or "
                f"move both into a directory {directory / name}"
            )
        domains[name], came_from[name] = files, entry
    inputs = Inputs(domains, search.unread)
    if not domains:
        unread = f"; {inputs.unread_summary()}" if inputs.unread else ""
        raise ValueError(f"no data in {directory} or below it: wanted {KINDS}{unread}")
    if inputs.unread:
        logger.warning("%s; wanted %s", inputs.unread_summary(), KINDS)
    return inputs


def samples_of(files: Sequence[Path]) -> list[Path]:
    """Return the files whose first record is checked before any text is tokenised.

    These are up to `NUM_CHECKED` JSON files of each folder, for a description
    (``dataset_infos.json``) may lie among shards under any name. Files of another kind are all
    alike, so the first of each folder is checked.
    """
    chosen: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        alike = chosen.setdefault((file.parent, _suffix(file)), [])
        if len(alike) < (NUM_CHECKED if file.name.lower().endswith(JSON_SUFFIXES) else 1):
            alike.append(file)
    return [file for alike in chosen.values() for file in alike]


def read_chunks(
    file: Path,
    *,
    json_key: str = JSON_KEY,
    tokens_dtype: str = TOKENS_DTYPE,
    chunk_bytes: int = CHUNK_BYTES,
    max_document_mb: int = MAX_DOCUMENT_MB,
) -> Iterator[Chunk]:
    """Cut a data file of any kind into chunks, in memory that does not grow with the file.

    Args:
        file: a file that ``find_domains`` finds.
        json_key: column of the text in a parquet file.
        tokens_dtype: numpy type of ids in an MDS shard.
        chunk_bytes: size of a chunk, bytes of text, or of tokens at 4 each.
        max_document_mb: longest line, item, row or file of plain text, MB.

    Raises:
        ValueError: the file is damaged, of unknown kind, or has too long a document.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        return read_parquet(file, json_key, chunk_bytes, max_document_mb)
    if name.endswith(SHARD_SUFFIXES):
        return read_mds(file, tokens_dtype, chunk_bytes)
    if file.suffix == MEGATRON_SUFFIX:
        return _read_megatron(file, chunk_bytes)
    if name.endswith(JSON_SUFFIXES):
        return read_json(file, chunk_bytes, max_document_mb)
    if name.endswith(PLAIN_SUFFIXES):
        return read_plain(file, max_document_mb)
    raise ValueError(f"{file} is none of the kinds that are read; wanted {KINDS}")


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


class _Search:
    """Search for data files, each of which may occur once."""

    def __init__(self) -> None:
        self.unread: list[Path] = []
        self._found: dict[tuple[int, int], Path] = {}

    def files_of(self, entry: Path) -> list[Path]:
        """Return the data files that an entry of a directory is or holds, by name."""
        if entry.name.startswith("."):
            # Caches and leftovers of other programs, or text that somebody hid.
            if entry.name.lower().endswith(TEXT_SUFFIXES) and not entry.name.startswith("._"):
                self.unread.append(entry)
            return []
        if not entry.is_dir():
            return self._file(entry)
        self.check_new(entry)
        if (entry / FOLDER).is_dir():
            logger.warning("%s is an unfinished run of megashear preprocess: not read", entry)
            return []
        return self._folder(entry)

    def check_new(self, path: Path) -> None:
        """Refuse a file or folder that was found before under another name.

        Raises:
            ValueError: it was found before, so its text would be used twice.
        """
        found = path.stat()
        if not found.st_ino:  # some file systems in user space number no files
            return
        first = self._found.setdefault((found.st_dev, found.st_ino), path)
        if first is not path:
            if first == path:
                raise ValueError(f"{path} is listed twice by its {INDEX_NAME}; correct the list")
            raise ValueError(
                f"{path} is {first} once more, by a link, and its text would be used twice; "
                f"remove one of them"
            )

    def _folder(self, folder: Path) -> list[Path]:
        if is_mds(folder):
            return self._shards(folder)
        entries = sorted(folder.iterdir())
        files: list[Path] = []
        for is_folder in (False, True):
            for entry in entries:
                if entry.is_dir() is is_folder:
                    files += self.files_of(entry)
        return files

    def _shards(self, folder: Path) -> list[Path]:
        shards = shards_of(folder)
        for shard in shards:
            self.check_new(shard)
        known = {folder / INDEX_NAME, *listed_files(folder)}
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file not in known and not file.name.startswith("."):
                self.unread.append(file)
        return shards

    def _file(self, file: Path) -> list[Path]:
        name = file.name.lower()
        if name.endswith(SHARD_SUFFIXES):
            raise ValueError(
                f"{file} lies in no directory whose index.json lists it, so missing shards would "
                f"not be noticed; copy the index.json too"
            )
        if file.suffix == ".idx" and file.with_suffix(MEGATRON_SUFFIX).is_file():
            return []  # comes with its .bin
        if file.suffix in (MEGATRON_SUFFIX, ".idx"):
            check_pair(file.with_suffix(""))
        elif not name.endswith(TEXT_SUFFIXES):
            if file.suffix.lower() in REFUSED_SUFFIXES:
                raise ValueError(
                    f"{file} looks like data and cannot be read; wanted {KINDS}: unpack or convert "
                    f"it, or move it away"
                )
            self.unread.append(file)
            return []
        if not file.is_file():
            raise ValueError(
                f"{file} is no regular file but a pipe, a device or a link to nothing; remove it"
            )
        refuse_pointer(file)
        if file.stat().st_size:  # some caches keep one file for all empty ones
            self.check_new(file)
        return [file]


def _suffix(file: Path) -> str:
    """Return the suffix by which a file is read."""
    name = file.name.lower()
    known = (*TEXT_SUFFIXES, *SHARD_SUFFIXES, MEGATRON_SUFFIX)
    return next((suffix for suffix in known if name.endswith(suffix)), file.suffix)


def _domain_name(file: Path, json_key: str) -> str:
    return file.name[: -len(_suffix(file))].removesuffix(f"_{json_key}_document")
