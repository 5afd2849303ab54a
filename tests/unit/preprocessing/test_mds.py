"""MDS shards that mosaicml-streaming wrote are read; what is damaged or meant otherwise is not."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megashear.preprocessing import mds
from megashear.preprocessing.inputs import find_domains
from megashear.preprocessing.mds import is_mds, read_mds, shards_of
from tests.texts import preprocess

MDS = Path(__file__).parents[2] / "data" / "mds"
CHUNKS = np.load(MDS / "tokens.npy")


@pytest.fixture
def wiki(tmp_path) -> Path:
    """A copy of the shards of one directory."""
    return Path(shutil.copytree(MDS / "plain" / "part_1", tmp_path / "in" / "wiki"))


def read(directory: Path, dtype: str = "uint16") -> np.ndarray:
    chunks = [chunk for shard in shards_of(directory) for chunk in read_mds(shard, dtype, 1)]
    return np.array([tokens for chunk in chunks for tokens in chunk.records])


def test_shards_hold_what_was_written() -> None:
    found = [read(MDS / "plain" / part) for part in ("part_0", "part_1")]
    assert np.array_equal(np.concatenate(found), CHUNKS)
    assert np.array_equal(read(MDS / "zstd"), CHUNKS)


def test_numbers_and_positions_are_those_of_the_shard(wiki) -> None:
    shard = shards_of(wiki)[0]
    chunks = list(read_mds(shard, "uint16", 2 * 64 * 4))
    assert [(chunk.first, len(chunk.records)) for chunk in chunks] == [(1, 2), (3, 2), (5, 1)]
    assert chunks[-1].position == shard.stat().st_size
    assert {chunk.set_name for chunk in chunks} == {"wiki"}


def change_index(directory: Path, **changes: Any) -> None:
    path = directory / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0] |= changes
    path.write_text(json.dumps(index))


def change_shard(directory: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the first shard, and its size where the index says it."""
    shard = directory / "shard.00000.mds"
    shard.write_bytes(change(shard.read_bytes()))
    changed = {"basename": shard.name, "bytes": shard.stat().st_size, "hashes": {}}
    change_index(directory, raw_data=changed)


def test_a_gzip_shard_is_read(wiki) -> None:
    raw = (wiki / "shard.00000.mds").read_bytes()
    (wiki / "shard.00000.mds").unlink()
    (wiki / "shard.00000.mds.gz").write_bytes(gzip.compress(raw))
    size = (wiki / "shard.00000.mds.gz").stat().st_size
    packed = {"basename": "shard.00000.mds.gz", "bytes": size, "hashes": {}}
    change_index(wiki, compression="gz", zip_data=packed)
    assert np.array_equal(read(wiki), CHUNKS[10:])


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_wider_ids_are_read_where_they_are_named(wiki, dtype: str) -> None:
    # half as many ids of twice the width, or a quarter: the same bytes, so the ids are others
    expected = np.ascontiguousarray(CHUNKS[10:]).view(dtype)
    assert np.array_equal(read(wiki, dtype), expected)


def test_wider_ids_read_as_narrow_ones_are_noticed(wiki) -> None:
    start = (wiki / "shard.00000.mds").read_bytes().index(CHUNKS[10].tobytes())
    wide = CHUNKS[10, :32].astype(np.int32).tobytes()
    change_shard(wiki, lambda data: data[:start] + wide + data[start + len(wide) :])
    with pytest.raises(ValueError, match=r"sample 1: as uint16, every other id is 0.*--tokens-dt"):
        read(wiki)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], r"00000\.mds is not an MDS shard: it has 916 bytes, its samples"),
        (lambda data: data[:5], r"00000\.mds is not an MDS shard: it has 5 bytes"),
        (lambda data: b"\xff" * 4 + data[4:], r"too few for the 4294967295 samples it names"),
        (lambda data: data.replace(b'"set"', b'"sets'), "is not an MDS shard: "),
        (lambda data: data.replace(b'"tokens"', b'"tikens"'), r"no column 'tokens', only \['set'"),
        (lambda data: data.replace(b'"str", "bytes"', b'"str",   "str"'), "as 'str'; 'bytes' is"),
        (lambda data: data.replace(b"\4\0\0\0", b"\5\0\0\0", 1), "sample 1 is damaged"),
        (lambda data: data.replace(b"wiki", b"arxi", 2)[:], "of the set 'wiki', .*of 'arxi'"),
    ],
)
def test_damaged_shards_are_refused(wiki, change, message: str) -> None:
    change_shard(wiki, change)
    with pytest.raises(ValueError, match=message):
        read(wiki)


@pytest.mark.parametrize("suffix", [".mds", ".mds.gz", ".mds.zstd"])
def test_more_than_a_shard_can_hold_is_refused(monkeypatch, tmp_path, suffix: str) -> None:
    """Before it is unpacked whole: places in a shard have four bytes."""
    raw = (MDS / "plain/part_1/shard.00000.mds").read_bytes()
    pack = {".gz": gzip.compress, ".zstd": zstandard.compress}.get(suffix[4:], bytes)
    file = tmp_path / f"shard.00000{suffix}"
    file.write_bytes(pack(raw))
    monkeypatch.setattr(mds, "LARGEST", len(raw))
    assert len(list(mds.read_mds(file, "uint16", 1 << 20))) == 1
    monkeypatch.setattr(mds, "LARGEST", len(raw) - 1)
    with pytest.raises(ValueError, match=r"is no MDS shard: it has more than the [\d,]+ bytes"):
        list(mds.read_mds(file, "uint16", 1 << 20))


def test_sets_are_compared_over_shards(wiki, tmp_path, hugging_face_file) -> None:
    change_shard(wiki, lambda data: data.replace(b"wiki", b"arxi"))
    with pytest.raises(ValueError, match=r"00001\.mds, sample 1 is of the set 'wiki', .*'arxi'"):
        preprocess(find_domains(wiki.parent), tmp_path / "out", hugging_face_file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "json"}, r"index\.json lists shards of format 'json' version 2; 'mds' version"),
        ({"version": 3}, "format 'mds' version 3"),
        (
            {"raw_data": {"basename": "gone.mds", "bytes": 1}},
            r"gone\.mds is missing, which",
        ),
        (
            {"raw_data": {"basename": "shard.00000.mds", "bytes": 7}},
            "917 bytes, .* wants 7; ",
        ),
        ({"raw_data": {"bytes": 7}}, r"index\.json does not describe MDS shards: no 'basename'"),
    ],
)
def test_directories_that_are_not_whole_are_refused(wiki, changes: dict, message: str) -> None:
    change_index(wiki, **changes)
    assert is_mds(wiki)
    with pytest.raises(ValueError, match=message):
        find_domains(wiki.parent)


@pytest.mark.parametrize("packing", ["br", "snappy"])
def test_other_packings_are_refused(wiki, packing: str) -> None:
    name = f"shard.00000.mds.{packing}"
    (wiki / "shard.00000.mds").rename(wiki / name)
    packed = {"basename": name, "bytes": (wiki / name).stat().st_size}
    change_index(wiki, compression=f"{packing}:9", zip_data=packed)
    with pytest.raises(ValueError, match=rf"is packed with {packing}, .*zstd or gz"):
        find_domains(wiki.parent)


def test_damaged_packed_shards_are_refused(tmp_path) -> None:
    file = tmp_path / "shard.00000.mds.zstd"
    packed = (MDS / "zstd" / file.name).read_bytes()
    for content in (packed[:-9], b"\0" * 90):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"mds\.zstd is (damaged|no Zst).*download it again"):
            list(read_mds(file, "uint16", 1 << 20))
    file.write_bytes(zstandard.compress(b"no shard"))
    with pytest.raises(ValueError, match=r"is not an MDS shard: it has 8 bytes"):
        list(read_mds(file, "uint16", 1 << 20))


def test_a_directory_of_shards_is_no_directory_of_domains(wiki) -> None:
    with pytest.raises(ValueError, match="is one directory of MDS shards; give the directory ab"):
        find_domains(wiki)
    assert not is_mds(wiki.parent)
    (wiki.parent / "index.json").write_text('["a file of somebody else"]')
    assert not is_mds(wiki.parent)


def test_a_list_of_shards_that_is_broken_is_refused_where_shards_are(wiki) -> None:
    (wiki / "index.json").write_text('{"shards": [')
    message = r"wiki/index\.json does not list the MDS shards beside it: .* is not JSON.*copy"
    with pytest.raises(ValueError, match=message):
        find_domains(wiki.parent)


def test_ids_beyond_the_vocabulary_are_refused(wiki, tmp_path, sentencepiece_file) -> None:
    start = (wiki / "shard.00000.mds").read_bytes().index(CHUNKS[11].tobytes()) + 6
    wrong = np.uint16(300).tobytes()
    change_shard(wiki, lambda data: data[:start] + wrong + data[start + 2 :])
    with pytest.raises(
        ValueError, match=r"00000\.mds, sample 2: token 4 is 300, but .* has 300 ids"
    ):
        preprocess(find_domains(wiki.parent), tmp_path / "out", sentencepiece_file)
