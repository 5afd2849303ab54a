"""Our .idx is megatron-core's; files that do not belong together are told apart."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megashear.data import indexed
from megashear.data.indexed import HEADER_BYTES, check_pair, read_documents, write_index


def build(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    """What megatron-core writes of documents of one sequence each."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), max_size=20), st.sampled_from([np.uint16, np.int32]))
def test_the_index_is_megatrons_byte_for_byte(tmp_path_factory, lengths, dtype) -> None:
    folder = tmp_path_factory.mktemp("index")
    prefix = build(folder / "theirs", [[7] * length for length in lengths], dtype)
    np.array(lengths, dtype=np.int32).tofile(folder / "lengths")
    block, indexed.BLOCK = indexed.BLOCK, 3  # blocks must join without a seam
    try:
        write_index(folder / "ours.idx", folder / "lengths", np.dtype(dtype).name)
    finally:
        indexed.BLOCK = block
    assert (folder / "ours.idx").read_bytes() == Path(f"{prefix}.idx").read_bytes()


def test_megatron_reads_what_is_written(tmp_path) -> None:
    documents = [[1, 2, 3], [4], [5, 6]]
    np.array([t for d in documents for t in d], dtype=np.int32).tofile(tmp_path / "text.bin")
    np.array([3, 1, 2], dtype=np.int32).tofile(tmp_path / "lengths")
    write_index(tmp_path / "text.idx", tmp_path / "lengths", "int32")
    text = IndexedDataset(str(tmp_path / "text"))
    assert [text[i].tolist() for i in range(len(text))] == documents


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_documents_are_read_with_their_sentences_joined(tmp_path, dtype) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=dtype)
    builder.add_document(np.array([1, 2, 3, 4]), [1, 3])
    builder.add_document(np.array([5]), [1])
    builder.finalize(str(tmp_path / "text.idx"))
    found = check_pair(tmp_path / "text")
    assert (found.num_sequences, found.num_borders, found.num_tokens) == (3, 3, 5)
    read = list(read_documents(tmp_path / "text"))
    assert [tokens.tolist() for tokens in read] == [[1, 2, 3, 4], [5]]
    assert {tokens.dtype.type for tokens in read} == {dtype}


def test_a_pair_without_a_document_is_empty(tmp_path) -> None:
    build(tmp_path / "text", [])
    assert check_pair(tmp_path / "text").num_tokens == 0
    assert list(read_documents(tmp_path / "text")) == []


def damage(prefix: Path, kind: str) -> None:
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    if kind == "magic":
        content[0] ^= 1
    elif kind == "version":
        content[9] = 2
    elif kind == "type":
        content[HEADER_BYTES - 17] = 77
    elif kind == "short":
        del content[-1]
    elif kind == "header":
        del content[20:]
    index.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("magic", r"text.idx \(102 bytes\) is not an index of Megatron's"),
        ("header", r"text.idx \(20 bytes\) is not an index"),
        ("version", "text.idx has version 2; wanted 1"),
        ("type", "has token type 77, which is none of"),
        ("short", r"text.idx has 101 bytes, its header wants 102 for 3 sequences"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, kind: str, message: str) -> None:
    build(tmp_path / "text", [[1], [2, 3], [4]])
    damage(tmp_path / "text", "none")
    check_pair(tmp_path / "text")
    damage(tmp_path / "text", kind)
    with pytest.raises(ValueError, match=message):
        check_pair(tmp_path / "text")


@pytest.mark.parametrize("change", [b"", b"\0\0"], ids=["shorter", "longer"])
def test_text_of_another_length_than_its_index_is_refused(tmp_path, change: bytes) -> None:
    build(tmp_path / "text", [[1], [2, 3]])
    text = tmp_path / "text.bin"
    text.write_bytes(text.read_bytes() + change if change else text.read_bytes()[:-1])
    size = text.stat().st_size
    with pytest.raises(
        ValueError, match=rf"text.bin has {size} bytes, .*text.idx \(\d+ bytes\) describes 6: "
    ):
        check_pair(tmp_path / "text")


def rewrite(prefix: Path, part: str, numbers: list[int]) -> None:
    """Put other numbers into one of the three lists of an .idx."""
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    count = int(np.frombuffer(content, np.uint64, 1, HEADER_BYTES - 16)[0])
    begin = HEADER_BYTES + {"lengths": 0, "places": 4 * count, "borders": 12 * count}[part]
    new = np.array(numbers, dtype=np.int32 if part == "lengths" else np.int64).tobytes()
    if part == "borders":
        content[HEADER_BYTES - 8 : HEADER_BYTES] = np.uint64(len(numbers)).tobytes()
        del content[begin:]
    content[begin : begin + len(new)] = new
    index.write_bytes(content)


DOCUMENTS = [[1], [2, 3], [4, 5, 6], [7]]


@pytest.mark.parametrize(
    ("borders", "reach"),
    [
        ([0, 1, 2], "goes from sequence 0 to 2"),
        ([0, 1, 2, 2, 2], "goes from sequence 0 to 2"),
        ([0], "goes from sequence 0 to 0"),
        ([], "is empty"),
        ([1, 2, 3, 4], "goes from sequence 1 to 4"),
        ([0, 1, 2, 3, 5], "goes from sequence 0 to 5"),
    ],
)
def test_a_document_index_that_leaves_text_out_is_refused(tmp_path, borders, reach) -> None:
    prefix = build(tmp_path / "text", DOCUMENTS)
    rewrite(prefix, "borders", borders)
    message = f"text.idx has 4 sequences, but its document index {reach}; wanted 0 to 4, or text"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pair(prefix)


def test_a_document_index_that_takes_all_text_is_read(tmp_path) -> None:
    """The twin: whatever the documents, as long as none of their sequences is left out."""
    prefix = build(tmp_path / "text", DOCUMENTS)
    rewrite(prefix, "borders", [0, 1, 1, 4])
    read = [tokens.tolist() for tokens in read_documents(prefix)]
    assert read == [[1], [], [2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("part", "numbers", "message"),
    [
        ("lengths", [1, -2, 3, 1], "sequence 2 has -2 tokens; wanted at least 0"),
        ("lengths", [1, 3, 2, 1], "sequence 3 begins at byte 6 of the .bin; wanted 8, where"),
        ("places", [0, 2, 2, 12], "sequence 3 begins at byte 2 of the .bin; wanted 6, where"),
        ("borders", [0, 3, 2, 4], "document 2 ends at sequence 2, before it begins"),
    ],
)
@pytest.mark.parametrize("block", [2, 1 << 18])
def test_an_index_that_contradicts_itself_is_refused(
    tmp_path, monkeypatch, part, numbers, message, block
) -> None:
    monkeypatch.setattr(indexed, "BLOCK", block)
    prefix = build(tmp_path / "text", DOCUMENTS)
    assert len(list(read_documents(prefix))) == 4
    rewrite(prefix, part, numbers)
    with pytest.raises(ValueError, match=re.escape(f"text.idx: {message}")):
        next(read_documents(prefix))


@pytest.mark.parametrize(("missing", "there"), [(".idx", ".bin"), (".bin", ".idx")])
def test_half_a_pair_is_refused(tmp_path, missing: str, there: str) -> None:
    build(tmp_path / "text", [[1]])
    Path(f"{tmp_path}/text{missing}").unlink()
    message = f"text{missing} does not exist, though text{there} is there; copy both"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pair(tmp_path / "text")


def test_types_are_megatrons() -> None:
    known = {each.value: DType.dtype_from_code(each.value) for each in DType}
    whole = {code: kind for code, kind in known.items() if issubclass(kind, np.integer)}
    assert whole == indexed.TOKEN_TYPES
    for size in (1, 32_000, 65_499, 65_500, 65_536, 128_256):
        assert indexed.token_dtype(size) == DType.optimal_dtype(size).__name__
