"""Memory does not grow with the input: peaks of resident size, each of a process of its own."""

import ctypes
import gc
import gzip
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megashear.preprocessing import long_text
from megashear.preprocessing.documents import EncodedChunk, EncodedSide, EncodingPolicy
from megashear.preprocessing.domain_writer import DomainWriter
from megashear.preprocessing.inputs import read_chunks
from megashear.preprocessing.journal import FOLDER
from megashear.preprocessing.long_text import encode_parts
from megashear.tokenizer.choice import load_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20
LINE = b'{"text": "' + b"a text that repeats itself " * 36 + b'"}\n'
LINES = 192 * MIB // len(LINE)
BOUND = 48 * MIB
"""Growth while 192 MiB are read: chunks of 1 MiB, a few of them alive until they are collected, and
buffers of the unpacking library, up to 32 MiB."""


FRESH = multiprocessing.get_context("forkserver")
"""Makes processes that never ran a test: what tests before left in this one's memory, in use or
freed, would be counted or be used again unseen."""
FRESH.set_forkserver_preload([__name__, "pyarrow.parquet"])  # one that is missing is passed over


def growth(body: Callable[[], object]) -> int:
    """Return by how many bytes ``body`` raises the peak of resident memory, in a fresh process.

    Args:
        body: a function that can be pickled.
    """
    receiver, sender = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=_measure, args=(body, sender))
    process.start()
    process.join()
    assert process.exitcode == 0
    return int(receiver.recv())


def _measure(body: Callable[[], object], sender: Connection) -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    body()
    sender.send(_peak() - before)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def write_text(file: Path) -> Path:
    block, count = LINE * 1024, LINES // 1024
    if file.suffix == ".zst":
        with zstandard.open(file, "wb", cctx=zstandard.ZstdCompressor(level=1)) as stream:
            for _ in range(count):
                stream.write(block)
    elif file.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        texts = [f"{number} {LINE.decode()}" for number in range(1024)]
        table = pyarrow.table({"text": texts})
        with parquet.ParquetWriter(file, table.schema, use_dictionary=False) as writer:
            for _ in range(count // 4):
                writer.write_table(pyarrow.concat_tables([table] * 4))  # 4 MiB a row group
    else:
        with gzip.open(file, "wb", 1) if file.suffix == ".gz" else file.open("wb") as stream:
            for _ in range(count):
                stream.write(block)
    return file


def read_all(file: Path) -> None:
    seen = 0
    for chunk in read_chunks(file):
        seen += sum(map(len, chunk.records))
    assert seen > 0.9 * 192 * MIB


def hold_all(file: Path) -> None:
    assert list(read_chunks(file))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_reading_holds_chunks_not_files(suffix: str, tmp_path) -> None:
    assert growth(partial(read_all, write_text(tmp_path / f"x{suffix}"))) < BOUND


def test_the_measure_notices_a_file_that_is_held(tmp_path) -> None:
    assert growth(partial(hold_all, write_text(tmp_path / "x.jsonl"))) > 3 * BOUND


BOMB_BYTES = 512 * MIB


def write_bomb(file: Path) -> Path:
    """A line, or an item of an array, of half a gibibyte, in a file of at most a few MB."""
    block = b"x" * MIB
    is_gzip = file.suffix == ".gz"
    with gzip.open(file, "wb", 1) if is_gzip else zstandard.open(file, "wb") as stream:
        stream.write(b'[{"text": "' if ".json." in file.name else b'{"text": "')
        for _ in range(BOMB_BYTES // MIB):
            stream.write(block)
    return file


def refuse_bomb(file: Path) -> None:
    with pytest.raises(ValueError, match="has more than 4 MB; split or remove it"):
        list(read_chunks(file, max_document_mb=4))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json.gz", "x.txt.zst"])
def test_a_packed_line_without_end_is_refused_in_bounded_memory(name: str, tmp_path) -> None:
    file = write_bomb(tmp_path / name)
    assert file.stat().st_size < BOMB_BYTES // 100
    assert growth(partial(refuse_bomb, file)) < BOUND


def encode_long(tokenizer: Path, text: str, part: int) -> None:
    long_text.PART = part  # of this process alone
    for ids in encode_parts(load_tokenizer(tokenizer).encode, text):
        assert ids


def test_a_long_text_is_encoded_in_bounded_memory(hugging_face_file, texts) -> None:
    """And the twin: as a whole it takes many times as much."""
    text = " ".join(text for each in texts.values() for text in each)
    text *= 1_000_000 // len(text)
    parts = growth(partial(encode_long, hugging_face_file, text, 1 << 15))
    assert growth(partial(encode_long, hugging_face_file, text, 1 << 30)) > 4 * parts


DOCUMENTS, CHUNKS = 200_000, 12
"""Documents of a chunk, far more than a chunk of text has, and chunks: 2.4 million documents, of
which a list each in memory would take 190 MiB or more."""
SHORT = EncodedSide(np.ones(DOCUMENTS, dtype=np.uint16), np.ones(DOCUMENTS, dtype=np.int32))
NONE = EncodedSide(np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int32))


def write_domain(directory: Path) -> None:
    (directory / FOLDER).mkdir()
    file = directory / "x.jsonl"
    file.touch()
    policy = EncodingPolicy(
        tokenizer_path=directory,
        json_key="text",
        prepend_bos=False,
        append_eod=False,
        held_out_fraction=0.1,
        dtype="uint16",
    )
    writer = DomainWriter(directory, "x", policy, [file])
    writer.add(EncodedChunk(NONE, SHORT, {}, 0, 0))
    for _ in range(CHUNKS):
        writer.add(EncodedChunk(SHORT, NONE, {}, 0, 0))
    writer.end_file()
    assert writer.finish().documents == DOCUMENTS * CHUNKS


def test_writing_holds_no_index(tmp_path) -> None:
    assert growth(partial(write_domain, tmp_path)) < BOUND


def write_with_megatron(directory: Path) -> None:
    """Write the same with megatron-core's own builder, which keeps a list."""
    builder = IndexedDatasetBuilder(str(directory / "x.bin"), dtype=np.uint16)
    for _ in range(CHUNKS):
        builder.add_document(SHORT.tokens, SHORT.lengths.tolist())
    builder.finalize(str(directory / "x.idx"))


def test_the_measure_notices_an_index_that_is_held(tmp_path) -> None:
    assert growth(partial(write_with_megatron, tmp_path)) > 2 * BOUND
