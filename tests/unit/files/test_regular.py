"""Regular files alone are opened, and names in lists stay inside of their directory."""

import os
from pathlib import Path

import pytest

from megashear.files.regular import NotRegularError, inside, open_regular, read_bytes


def test_a_link_to_a_file_is_read_as_the_file(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "sum").write_bytes(b"text")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "config.json"
    link.symlink_to("../blobs/sum")  # as Hugging Face's cache has them
    assert read_bytes(link, 4) == b"text"
    with open_regular(link) as stream:
        assert os.get_blocking(stream.fileno()) in (True, False)
        assert stream.read() == b"text"


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("pipe", "a named pipe"), ("device", "a character device"), ("folder", "a directory")],
)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, kind: str, said: str, linked: bool
) -> None:
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)  # nobody writes: open() would wait for ever
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    with pytest.raises(NotRegularError, match=f"^--x {path} is {said}; a regular file is wanted"):
        read_bytes(path, 10, f"--x {path}")


def test_a_file_too_large_or_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"a\.json does not exist"):
        read_bytes(path, 10)
    path.write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match=r"a\.json has 11 bytes; .* at most 10: is it another"):
        read_bytes(path, 10)
    assert read_bytes(path, 11) == b"x" * 11


def test_a_name_inside_of_a_directory_is_joined(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.bin", "list") == tmp_path / "a" / "b.bin"
    assert inside(tmp_path, "..b", "list") == tmp_path / "..b"


@pytest.mark.parametrize("name", ["/dev/zero", "../b", "a/../../b", "", ".", "a\0b", 3, None])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match=r"^sums names .*, which is not a file inside of"):
        inside(tmp_path, name, "sums")
