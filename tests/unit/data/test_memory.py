"""Memory does not grow with the input: peaks of resident size, each of a process of its own."""

import ctypes
import gc
import gzip
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megashear.data import long_text
from megashear.data.documents import EncodedChunk, EncodedSide, EncodingPolicy
from megashear.data.domain_writer import DomainWriter
from megashear.data.inputs import read_chunks
from megashear.data.journal import FOLDER
from megashear.data.long_text import encode_parts
from megashear.tokenizer.choice import load_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20
LINE = b'{"text": "' + b"a text that repeats itself " * 36 + b'"}\n'
LINES = 192 * MIB // len(LINE)
BOUND = 32 * MIB
"""Growth while 192 MiB are read: chunks of 1 MiB, a few of them alive until they are collected."""


def growth(body: Callable[[], object]) -> int:
    """Bytes by which the peak of resident memory grows over what is resident before ``body``."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def main() -> None:
        # What tests before this one freed is still resident, and would be used again unseen.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _peak()
        body()
        sender.send(_peak() - before)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join()
    assert process.exitcode == 0
    return int(receiver.recv())


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
            for _ in range(count // 16):
                writer.write_table(pyarrow.concat_tables([table] * 16))  # 16 MiB a row group
    else:
        with gzip.open(file, "wb", 1) if file.suffix == ".gz" else file.open("wb") as stream:
            for _ in range(count):
                stream.write(block)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_reading_holds_chunks_not_files(suffix: str, tmp_path) -> None:
    file = write_text(tmp_path / f"x{suffix}")
    seen = multiprocessing.get_context("fork").Value("q", 0)

    def read() -> None:
        for chunk in read_chunks(file):
            seen.value += sum(map(len, chunk.records))

    assert growth(read) < BOUND
    assert seen.value > 0.9 * 192 * MIB


def test_the_measure_notices_a_file_that_is_held(tmp_path) -> None:
    file = write_text(tmp_path / "x.jsonl")
    assert growth(lambda: list(read_chunks(file))) > 4 * BOUND


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


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json.gz", "x.txt.zst"])
def test_a_packed_line_without_end_is_refused_in_bounded_memory(name: str, tmp_path) -> None:
    file = write_bomb(tmp_path / name)
    assert file.stat().st_size < BOMB_BYTES // 100

    def read() -> None:
        with pytest.raises(ValueError, match="has more than 4 MB; split or remove it"):
            list(read_chunks(file, max_document_mb=4))

    assert growth(read) < BOUND


def test_a_long_text_is_encoded_in_bounded_memory(hugging_face_file, texts, monkeypatch) -> None:
    """And the twin: as a whole it takes many times as much."""
    encode = load_tokenizer(hugging_face_file).encode
    text = " ".join(text for each in texts.values() for text in each)
    text *= 1_000_000 // len(text)

    def encode_all() -> None:
        for ids in encode_parts(encode, text):
            assert ids

    monkeypatch.setattr(long_text, "PART", 1 << 15)
    parts = growth(encode_all)
    monkeypatch.setattr(long_text, "PART", 1 << 30)
    assert growth(encode_all) > 4 * parts


DOCUMENTS, CHUNKS = 200_000, 12
"""Documents of a chunk, far more than a chunk of text has, and chunks: 2.4 million documents, of
which a list each in memory would take 190 MiB or more."""
SHORT = EncodedSide(np.ones(DOCUMENTS, dtype=np.uint16), np.ones(DOCUMENTS, dtype=np.int32))
NONE = EncodedSide(np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int32))


def test_writing_holds_no_index(tmp_path) -> None:
    (tmp_path / FOLDER).mkdir()
    file = tmp_path / "x.jsonl"
    file.touch()
    policy = EncodingPolicy(
        tokenizer_path=tmp_path,
        json_key="text",
        prepend_bos=False,
        append_eod=False,
        held_out_fraction=0.1,
        dtype="uint16",
    )

    def write() -> None:
        writer = DomainWriter(tmp_path, "x", policy, [file])
        writer.add(EncodedChunk(NONE, SHORT, {}, 0, 0))
        for _ in range(CHUNKS):
            writer.add(EncodedChunk(SHORT, NONE, {}, 0, 0))
        writer.end_file()
        assert writer.finish().documents == DOCUMENTS * CHUNKS

    assert growth(write) < BOUND


def test_the_measure_notices_an_index_that_is_held(tmp_path) -> None:
    """The twin: megatron-core's own builder, which keeps a list."""

    def write() -> None:
        builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
        for _ in range(CHUNKS):
            builder.add_document(SHORT.tokens, SHORT.lengths.tolist())
        builder.finalize(str(tmp_path / "x.idx"))

    assert growth(write) > 2 * BOUND
