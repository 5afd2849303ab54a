"""The list of checksums: every change of a file is found, and none where nothing changed."""

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megashear.files import integrity
from megashear.files.integrity import CHECKSUMS, DamagedError, HashingFile

CONTENTS = {
    "a.bin": bytes(range(256)) * 40,
    "b.bin": bytes(reversed(range(256))) * 40,
    ".hidden": b"x",
    "empty": b"",
    "folder/with space.json": b"{}\n",
}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    directory = tmp_path / "listed"
    for name, data in CONTENTS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    integrity.write(directory)
    return directory


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_untouched_files_pass_and_the_list_says_what_they_are(listed: Path) -> None:
    integrity.verify(listed)
    assert {name: found.sha256 for name, found in integrity.read(listed).items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in CONTENTS.items()
    }
    assert integrity.read(listed)["a.bin"].size == 10240


def test_times_of_files_do_not_matter(listed: Path) -> None:
    for number, path in enumerate(sorted(listed.rglob("*"))):
        os.utime(path, ns=((number % 2) * 2**62, (number % 3) * 2**61))
    integrity.verify(listed)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this machine")
def test_sha256sum_reads_the_list(listed: Path) -> None:
    command = ["sha256sum", "--strict", "--check", CHECKSUMS]
    assert subprocess.run(command, cwd=listed, capture_output=True).returncode == 0
    flip(listed / "a.bin", 77)
    assert subprocess.run(command, cwd=listed, capture_output=True).returncode == 1


@pytest.mark.parametrize("name", [*(name for name in CONTENTS if name != "empty"), CHECKSUMS])
def test_a_flipped_bit_is_found(listed: Path, name: str) -> None:
    bits = (listed / name).stat().st_size * 8
    for bit in random.Random(name).sample(range(bits), min(bits, 60)):
        flip(listed / name, bit)
        with pytest.raises(DamagedError, match=name):
            integrity.verify(listed)
        flip(listed / name, bit)
    integrity.verify(listed)


@pytest.mark.parametrize("name", [*(name for name in CONTENTS if name != "empty"), CHECKSUMS])
def test_a_truncated_file_is_found(listed: Path, name: str) -> None:
    size = (listed / name).stat().st_size
    for left in {0, size // 2, size - 1}:
        data = (listed / name).read_bytes()
        os.truncate(listed / name, left)
        with pytest.raises(DamagedError, match=name):
            integrity.verify(listed, contents=False)
        (listed / name).write_bytes(data)
    integrity.verify(listed)


def lengthen(directory: Path) -> None:
    (directory / "empty").write_bytes(b"\0")


def remove(directory: Path) -> None:
    (directory / "a.bin").unlink()


def swap(directory: Path) -> None:
    (directory / "a.bin").rename(directory / "c")
    (directory / "b.bin").rename(directory / "a.bin")
    (directory / "c").rename(directory / "b.bin")


def stop_listing(directory: Path) -> None:
    (directory / CHECKSUMS).unlink()


def list_less(directory: Path) -> None:
    lines = (directory / CHECKSUMS).read_text().splitlines(keepends=True)
    (directory / CHECKSUMS).write_text("".join(lines[:1] + lines[3:]))


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lengthen, r"empty is 1 bytes; 0 were written"),
        (remove, r"a\.bin is missing; 10,240 bytes were written"),
        (swap, r"a\.bin is damaged: its sha256 is [0-9a-f]{64}, [0-9a-f]{64} was written"),
        (stop_listing, r"checksums\.txt is missing"),
        (list_less, r"checksums\.txt is damaged: its sha256 is [0-9a-f]{64}, it ends with"),
    ],
)
def test_other_damage_is_found_and_named(
    listed: Path, harm: Callable[[Path], None], complaint: str
) -> None:
    harm(listed)
    with pytest.raises(DamagedError, match=complaint):
        integrity.verify(listed)


def test_only_chosen_files_are_read(listed: Path) -> None:
    flip(listed / "a.bin", 3)
    integrity.verify(listed, ["b.bin", ".hidden"])
    integrity.verify(listed, contents=False)


def test_a_file_that_was_hashed_while_written_is_not_read_again(tmp_path: Path) -> None:
    with HashingFile(tmp_path / "data") as file:
        assert file.write(b"ab") == 2
        assert file.write(memoryview(bytearray(b"cde"))) == 3
        assert file.tell() == 5
    assert file.sum.sha256 == hashlib.sha256(b"abcde").hexdigest()
    flip(tmp_path / "data", 0)  # as a disk that stores something else would
    integrity.write(tmp_path, {"data": file.sum})
    with pytest.raises(DamagedError, match="data is damaged"):
        integrity.verify(tmp_path)


def test_a_file_added_later_is_listed_and_the_others_stay(listed: Path) -> None:
    before = integrity.read(listed)
    integrity.add(listed, "later.json", "{}")
    assert integrity.read(listed).keys() - before.keys() == {"later.json"}
    flip(listed / "later.json", 1)
    with pytest.raises(DamagedError, match=r"later\.json"):
        integrity.verify(listed)


def test_a_file_whose_addition_was_cut_short_does_no_harm(listed: Path) -> None:
    (listed / "later.json").write_text("{}")  # there, and not listed yet
    integrity.verify(listed)
    integrity.add(listed, "later.json", "{} ")
    integrity.verify(listed)
