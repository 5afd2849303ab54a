"""Every kind of input gives the same documents; what is damaged is refused with its place."""

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megashear.preprocessing.documents import read_texts
from megashear.preprocessing.inputs import find_domains, read_chunks
from tests.texts import preprocess, write_jsonl
from tests.unit.data.test_indexed import build
from tests.unit.preprocessing.test_domains import GOOD, content, documents

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MDS = Path(__file__).parents[2] / "data" / "mds"


def write_gz(file: Path, lines: bytes) -> None:
    half = len(lines) // 2  # two members, as `cat a.gz b.gz` makes
    file.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))


def write_zst(file: Path, lines: bytes) -> None:
    half = len(lines) // 2
    packer = zstandard.ZstdCompressor()
    file.write_bytes(packer.compress(lines[:half]) + packer.compress(lines[half:]))


def write_parquet(file: Path, lines: bytes) -> None:
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file)


def write_array(file: Path, lines: bytes) -> None:
    file.write_text(json.dumps([json.loads(line) for line in lines.splitlines()], indent=2))


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    ".jsonl": Path.write_bytes,
    ".JSON": Path.write_bytes,
    ".jsonl.gz": write_gz,
    ".JSONL.zst": write_zst,
    ".json": write_array,
    ".parquet": write_parquet,
}


@pytest.fixture
def lines(texts, tmp_path) -> bytes:
    return write_jsonl(tmp_path / "x.jsonl", texts["numbers"]).read_bytes()


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_text_gives_the_same_data(
    suffix: str, lines, tokenise, texts, tmp_path, sentencepiece_file
) -> None:
    expected = tokenise(texts["numbers"])
    folder = tmp_path / "prose"
    folder.mkdir()
    half = lines.index(b"\n", len(lines) // 2) + 1
    WRITERS[suffix](folder / f"a{suffix}", lines[:half])
    WRITERS[suffix](folder / f"b{suffix}", lines[half:])
    found = preprocess(
        {"prose": sorted(folder.iterdir())}, tmp_path / "o", sentencepiece_file, chunk_bytes=999
    )
    for side in ("prose", "prose_heldout"):
        for end in (".bin", ".idx"):
            name = side + end
            assert (found.directory / name).read_bytes() == (expected.directory / name).read_bytes()


@pytest.mark.parametrize("suffix", WRITERS)
def test_texts_and_positions_are_those_of_the_file(suffix: str, lines, texts, tmp_path) -> None:
    file = tmp_path / f"x{suffix}"
    WRITERS[suffix](file, lines)
    assert list(read_texts(file, "text")) == texts["numbers"]
    chunks = list(read_chunks(file, chunk_bytes=500))
    assert len(chunks) > 5
    positions = [chunk.position for chunk in chunks]
    assert positions == sorted(positions)
    assert positions[-1] == file.stat().st_size
    number = 1
    for chunk in chunks:
        assert chunk.first == number
        number += len(chunk.records)
    assert number - 1 == len(texts["numbers"])


def test_parquet_of_other_text_types_and_nulls(tmp_path, sentencepiece_file) -> None:
    texts = ["one text", None, "another", "one text"]
    column = pyarrow.chunked_array([pyarrow.array(texts, pyarrow.large_string())])
    plain = pyarrow.table({"body": column.dictionary_encode()})
    parquet.write_table(plain, tmp_path / "x.parquet")
    data = preprocess(
        {"x": [tmp_path / "x.parquet"]}, tmp_path / "out", sentencepiece_file, json_key="body"
    )
    assert data.domains[0].documents + data.domains[0].held_out_documents == 3
    assert data.domains[0].skipped == {"not a string": 1}


def test_domains_are_files_or_folders_of_any_depth(tmp_path, caplog) -> None:
    for path in ("wiki.jsonl.zst", "cc/2/b.jsonl", "cc/a.parquet", "notes/readme.md", ".x.jsonl"):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).touch()
    shutil.copytree(MDS / "plain", tmp_path / "shards")
    build(tmp_path / "code_text_document", [[1, 2]])
    found = find_domains(tmp_path)
    assert found == {
        "cc": [tmp_path / "cc/a.parquet", tmp_path / "cc/2/b.jsonl"],
        "code": [tmp_path / "code_text_document.bin"],
        "shards": [
            tmp_path / "shards" / f"part_{part}" / f"shard.0000{number}.mds"
            for part, numbers in ((0, 2), (1, 3))
            for number in range(numbers)
        ],
        "wiki": [tmp_path / "wiki.jsonl.zst"],
    }
    assert list(found) == ["cc", "code", "shards", "wiki"]
    assert found.summary() == "9 files read: 5 .mds, 1 .parquet, 1 .jsonl, 1 .bin, 1 .jsonl.zst"
    assert re.search(r"/notes holds no data, so it is not a domain", caplog.text)
    assert found.unread == [tmp_path / ".x.jsonl", tmp_path / "notes/readme.md"]
    assert re.search(r"2 files are not read: \S+/\.x\.jsonl, \S+/readme\.md; wanted", caplog.text)
    assert len(caplog.records) == 2
    (tmp_path / "cc/2/README.txt").write_text("no data")
    assert tmp_path / "cc/2/README.txt" in find_domains(tmp_path)["cc"]
    assert re.search(r"/cc: 1 of its 3 files are plain text, .*2/README\.txt first", caplog.text)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["notes.md"], r"no data in .*: wanted JSON lines .*; 1 file is not read: .*notes\.md"),
        (["cc/notes.txt"], r"notes\.txt is plain text, which is one document a file, and a domain"),
        (["cc/a.jsonl", "cc/b.csv"], r"b\.csv looks like data and cannot be read"),
        (["cc/part-0001.gz"], r"part-0001\.gz looks like data and cannot be read"),
        (["cc.jsonl", "cc/a.jsonl"], r"domain 'cc' is there twice: .*cc and .*cc\.jsonl; rename"),
        (["cc.jsonl", "cc.parquet"], "domain 'cc' is there twice"),
        (["cc/a.jsonl", "cc/b.jsonl.xz"], r"b\.jsonl\.xz looks like data and cannot be read"),
        (["cc/a.bin"], r"a\.idx does not exist, though a\.bin is there"),
        (["cc/a.idx"], r"a\.bin does not exist, though a\.idx is there"),
        (["cc/shard.00000.mds"], r"no directory whose index\.json lists it"),
    ],
)
def test_directories_without_clear_data_are_refused(tmp_path, paths, message: str) -> None:
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(ValueError, match=message):
        find_domains(tmp_path)
    with pytest.raises(ValueError, match="gone is not a directory"):
        find_domains(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"x\.csv is none of the kinds that are read"):
        read_chunks(tmp_path / "x.csv")


def test_our_own_data_are_no_domain(lines, tmp_path, sentencepiece_file) -> None:
    file = tmp_path / "wiki.jsonl"
    WRITERS[".jsonl"](file, lines)
    preprocess({"wiki": [file]}, tmp_path / "in/data", sentencepiece_file)
    with pytest.raises(ValueError, match="in/data is what megashear preprocess wrote, held-out"):
        find_domains(tmp_path / "in")


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(255 - b for b in content[middle : middle + 9]) + content[-9:]


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".JSONL.zst", ".parquet"])
def test_damaged_files_are_refused(
    suffix: str, damage, lines, tmp_path, sentencepiece_file
) -> None:
    file = tmp_path / f"wiki{suffix}"
    WRITERS[suffix](file, lines * 5)
    preprocess({"wiki": [file]}, tmp_path / "whole", sentencepiece_file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"wiki\{suffix} is damaged"):
        preprocess({"wiki": [file]}, tmp_path / "out", sentencepiece_file)
    assert not (tmp_path / "out").exists()


def test_text_files_are_a_document_each(tmp_path, texts, tokenise, sentencepiece_file) -> None:
    expected = tokenise(texts["numbers"])
    folder = tmp_path / "texts/prose"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts["numbers"]):
        content, suffix = text.encode(), ".txt"
        if number % 3 == 1:
            content, suffix = gzip.compress(content), ".TXT.gz"
        elif number % 3 == 2:
            content, suffix = b"\xef\xbb\xbf" + content, ".txt"
        (folder / f"{number:04}{suffix}").write_bytes(content)
    found = preprocess(find_domains(folder.parent), tmp_path / "o", sentencepiece_file)
    assert documents(found.prefix("prose")) == documents(expected.prefix("prose"))
    assert documents(found.held_out_prefix("prose")) == documents(expected.held_out_prefix("prose"))
    (folder / "0000.txt").write_bytes(b"line\nline \xff")
    with pytest.raises(ValueError, match=r"0000\.txt, line 2 is not UTF-8: .*convert the file"):
        preprocess(find_domains(folder.parent), tmp_path / "p", sentencepiece_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"body": "b"}]', r"x\.json, item 2 has no key 'text', only \['body'\]"),
        ('[{"text": "a"}, {"text": "b"', r"x\.json, item 2 is the last: the file ends before the"),
        ('["a"]', r"x\.json, item 1 holds a str; a JSON object is wanted"),
        ('{\n  "text": "a"\n}', r"x\.json, line 1 is not valid JSON: .*an object a line, or one"),
        (
            '{"text": "a", "text": "b"}',
            r"x\.json, line 1 has the key 'text' 2 times, so its text is not clear; keep one",
        ),
    ],
)
def test_json_that_is_no_text_names_its_place(tmp_path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / "x.json", "text"))


def test_keys_that_are_not_read_may_repeat(tmp_path) -> None:
    """The twin: what is ambiguous is no text."""
    lines = '{"id": 1, "text": "a", "id": 2}\n{"text": "b", "meta": {"text": 1, "text": 2}}\n'
    (tmp_path / "x.json").write_text(lines)
    assert list(read_texts(tmp_path / "x.json", "text")) == ["a", "b"]


LONG = b'{"text": "' + b"many words " * 100_000 + b'"}\n'  # 1.1 MB


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
def test_a_longer_document_than_allowed_is_refused(suffix: str, tmp_path) -> None:
    lines = b'{"text": "short"}\n' * 2 + LONG
    file = tmp_path / f"x{suffix}"
    WRITERS.get(suffix, write_zst)(file, lines)
    assert len(list(read_texts(file, "text"))) == 3
    pattern = rf"x\{suffix}, (line|item|row) 3 has more than 1 MB; split or .* --max-document-mb"
    with pytest.raises(ValueError, match=pattern):
        list(read_chunks(file, max_document_mb=1))


def test_a_packed_row_without_end_is_refused_unread(tmp_path, monkeypatch) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * 2_100_000]}), file)
    assert file.stat().st_size < 200_000
    assert len(list(read_chunks(file, max_document_mb=3))) == 1
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(ValueError, match=r"x\.parquet: one of the rows 1 to 1 has more than 1 MB"):
        list(read_chunks(file, max_document_mb=1))


def test_a_longer_text_file_than_allowed_is_refused(tmp_path, sentencepiece_file) -> None:
    (tmp_path / "x.txt").write_bytes(LONG)
    assert len(list(read_chunks(tmp_path / "x.txt"))) == 1
    with pytest.raises(ValueError, match=r"x\.txt, one document of plain text, has more than 1 MB"):
        list(read_chunks(tmp_path / "x.txt", max_document_mb=1))
    inputs = {"x": [tmp_path / "x.txt"]}
    for limit in (0, 2001, 10**23):
        with pytest.raises(ValueError, match=f"--max-document-mb is {limit}; wanted 1 to 2000"):
            preprocess(inputs, tmp_path / "o", sentencepiece_file, max_document_mb=limit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), r"x\.jsonl is a gzip file.*name it \*\.gz"),
        (zstandard.compress(b"{}"), r"x\.jsonl is a Zstandard file.*name it \*\.zst"),
        (b"\x5f\x2a\x4d\x18\0\0\0\0", r"x\.jsonl is a Zstandard file.*name it \*\.zst"),
        (b"PAR1....", r"x\.jsonl is a parquet file.*name it \*\.parquet"),
        (b"BZh91AY", r"x\.jsonl is a bzip2 file, which .* not say; unpack it first"),
    ],
)
def test_a_file_of_another_kind_than_its_name_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_chunks(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("low", [0x50, 0x5F])
def test_zstandard_that_begins_with_a_frame_to_skip_is_read(tmp_path, low: int) -> None:
    skipped = bytes([low]) + b"\x2a\x4d\x18\x04\0\0\0size"
    (tmp_path / "x.jsonl.zst").write_bytes(skipped + zstandard.compress(GOOD))
    (tmp_path / "y.jsonl").write_bytes(GOOD)
    (chunk,), (plain,) = (list(read_chunks(tmp_path / n)) for n in ("x.jsonl.zst", "y.jsonl"))
    assert chunk.records == plain.records
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x4f" + skipped[1:] + zstandard.compress(GOOD))
    with pytest.raises(ValueError, match="is no Zstandard file, though its name says so"):
        list(read_chunks(tmp_path / "x.jsonl.zst"))


@pytest.mark.parametrize(("suffix", "kind"), [(".json.gz", "gzip"), (".txt.zst", "Zstandard")])
def test_a_file_that_is_not_packed_as_its_name_says_is_refused(tmp_path, suffix, kind) -> None:
    (tmp_path / f"x{suffix}").write_bytes(GOOD)
    message = rf"{suffix} is no {kind} file, though its name says so; .* take \.\w+ off its name"
    with pytest.raises(ValueError, match=message):
        list(read_chunks(tmp_path / f"x{suffix}"))


def test_parquet_without_such_text_is_refused(tmp_path) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), file)
    with pytest.raises(ValueError, match=r"no column 'text', only \['body', 'id'\]; .*--json-key"):
        list(read_chunks(file))
    with pytest.raises(ValueError, match="has int64 in column 'id'; text is wanted"):
        list(read_chunks(file, json_key="id"))


def test_parquet_that_is_not_utf8_names_its_row(tmp_path) -> None:
    raw = pyarrow.array([b"good", b"bad \xff"], pyarrow.binary())
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet, row 2 is not UTF-8"):
        list(read_chunks(tmp_path / "x.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'megashear\[parquet\]'"):
        list(read_chunks(tmp_path / "x.parquet"))


@pytest.mark.parametrize("packing", ["plain", "zstd"])
def test_mds_shards_give_their_chunks(packing: str, tmp_path, hugging_face_file) -> None:
    chunks = np.load(MDS / "tokens.npy")
    shutil.copytree(MDS / packing, tmp_path / "in" / "wiki")
    data = preprocess(find_domains(tmp_path / "in"), tmp_path / "out", hugging_face_file)
    found = documents(data.prefix("wiki")) + documents(data.held_out_prefix("wiki"))
    assert sorted(found) == sorted(chunks.tolist())  # no BOS and no EOS is added
    assert documents(data.prefix("wiki")) == [c for c in chunks.tolist() if c in found[:23]]
    assert data.domains[0].pretokenised_documents == 24
    assert data.domains[0].bytes_per_token is None
    assert data.domains[0].largest_id == chunks.max()


def test_megatrons_files_give_their_documents(data, tmp_path, sentencepiece_file) -> None:
    """Data that Megatron-LM tokenised: a checked copy with a held-out set."""
    folder = tmp_path / "in"
    folder.mkdir()
    whole = documents(data.prefix("words")) + documents(data.held_out_prefix("words"))
    build(folder / "words_text_document", whole, np.int32)
    found = preprocess(
        find_domains(folder), tmp_path / "out", sentencepiece_file, held_out_fraction=0.1
    )
    sides = [documents(p("words")) for p in (found.prefix, found.held_out_prefix)]
    assert sorted(sides[0] + sides[1]) == sorted(whole)
    assert all(side == [d for d in whole if d in side] for side in sides)
    assert sides[1]
    assert found.dtype == "uint16"
    build(folder / "words_text_document", whole, np.uint16)
    again = preprocess(
        find_domains(folder), tmp_path / "narrow", sentencepiece_file, held_out_fraction=0.1
    )
    assert content(again.directory).keys() == content(found.directory).keys()
    assert documents(again.held_out_prefix("words")) == sides[1]


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, hugging_face_file) -> None:
    (tmp_path / "in").mkdir()
    build(tmp_path / "in/wiki", [[1, 2], [3, 299, 300, 301]])
    with pytest.raises(
        ValueError, match=r"wiki\.bin, document 2: token 3 is 300, but .* has 300 ids"
    ):
        preprocess(find_domains(tmp_path / "in"), tmp_path / "out", hugging_face_file)
    build(tmp_path / "in/wiki", [[1, 2], [3, -1]], np.int32)
    with pytest.raises(ValueError, match=r"wiki\.bin, document 2: token 2 is -1"):
        preprocess(find_domains(tmp_path / "in"), tmp_path / "out", hugging_face_file)
