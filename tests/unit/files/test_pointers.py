"""A pointer that Git LFS left in a file's place is named, whatever was to be read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megashear.checkpoint.pickles import check_index
from megashear.conversion.safetensors_file import read_header
from megashear.data.indexed import check_pair
from megashear.files.pointers import is_pointer
from megashear.files.regular import open_regular
from megashear.files.torch_files import load_mapped
from megashear.preprocessing.inputs import read_chunks
from megashear.preprocessing.mds import _unpacked
from megashear.tokenizer import tokenizer_files
from megashear.tokenizer.choice import load_tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 499723\n"
)


def check_text(index: Path) -> None:
    index.with_suffix(".bin").write_bytes(b"")
    check_pair(index.with_suffix(""))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", read_header),
        ("pytorch_model.bin", load_mapped),
        ("tokenizer.model", load_tokenizer),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer.json", lambda path: tokenizer_files.find(path.parent)),
        ("tokenizer.model", tokenizer_files.find),
        ("text.jsonl", lambda path: list(read_chunks(path))),
        ("text.jsonl.gz", lambda path: list(read_chunks(path))),
        ("text.txt", lambda path: list(read_chunks(path))),
        ("text.parquet", lambda path: list(read_chunks(path))),
        ("shard.00000.mds", _unpacked),
        ("text.idx", check_text),
        (".metadata", lambda path: check_index(path.parent)),
        ("anything", open_regular),
    ],
)
def test_a_pointer_is_named_with_the_way_out(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS, .*`git lfs pull`"):
        read(tmp_path / name)


def test_other_files_are_no_pointers(tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert not is_pointer(other)
    for text in ("", "{}", f" {POINTER}", POINTER + "x" * 1024):
        other.write_text(text)
        assert not is_pointer(other), text
    other.write_text(POINTER)
    assert is_pointer(other)
