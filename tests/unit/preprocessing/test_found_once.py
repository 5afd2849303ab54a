"""All that lies in a directory is read once or told of, however it is reached."""

import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megashear.preprocessing.inputs import find_domains, read_chunks
from megashear.preprocessing.journal import FOLDER
from tests.texts import write_jsonl

MDS = Path(__file__).parents[2] / "data" / "mds"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two domains: a folder of two files, and one file."""
    write_jsonl(tmp_path / "in/cc/a.jsonl", ["a"])
    write_jsonl(tmp_path / "in/cc/deep/b.jsonl", ["b"])
    write_jsonl(tmp_path / "in/wiki.jsonl", ["c"])
    return tmp_path / "in"


LINKS = {
    "a folder in itself": ("cc/loop", "cc"),
    "a folder in a deeper one": ("cc/deep/loop", "cc"),
    "the whole directory": ("cc/all", "."),
    "a folder beside itself": ("dd", "cc"),
    "a file beside itself": ("cc/b.jsonl", "cc/a.jsonl"),
    "a file of another domain": ("cc/wiki.jsonl", "wiki.jsonl"),
}


@pytest.mark.parametrize("link", LINKS)
def test_links_that_repeat_text_are_refused(folder, link: str) -> None:
    at, to = LINKS[link]
    (folder / at).symlink_to(folder / to)
    pattern = r"/(\S+) is \S+/(\S+) once more, by a link, and its text would be used twice; remove"
    with pytest.raises(ValueError, match=pattern) as caught:
        find_domains(folder)
    assert str(folder / at) in str(caught.value)


def test_hard_links_are_refused(folder) -> None:
    os.link(folder / "cc/a.jsonl", folder / "cc/z.jsonl")
    with pytest.raises(ValueError, match=r"z\.jsonl is \S+a\.jsonl once more, by a link"):
        find_domains(folder)


def test_files_without_numbers_are_not_taken_for_one(folder, monkeypatch) -> None:
    """As some file systems in user space have them; the twin gives all the number 7."""
    found = Path.stat

    def stat(path: Path, number: int = 0, **kw: Any) -> os.stat_result:
        fields = list(found(path, **kw))
        return os.stat_result([fields[0], number, *fields[2:]])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        assert [len(files) for files in find_domains(folder).values()] == [2, 1]
        patch.setattr(Path, "stat", functools.partialmethod(stat, 7))
        with pytest.raises(ValueError, match="once more, by a link"):
            find_domains(folder)


def test_shards_that_are_listed_twice_are_refused(folder) -> None:
    shutil.copytree(MDS / "plain/part_0", folder / "shards")
    (folder / "shards/notes.md").touch()
    found = find_domains(folder)
    assert len(found["shards"]) == 2
    assert found.unread == [folder / "shards/notes.md"]
    index = folder / "shards/index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({**listed, "shards": [*listed["shards"], listed["shards"][0]]}))
    with pytest.raises(ValueError, match=r"shard.00000.mds is listed twice by its index.json"):
        find_domains(folder)


def test_links_to_text_elsewhere_are_read(folder, tmp_path) -> None:
    """The twin: a link that repeats nothing, and copies, which are files of their own."""
    elsewhere = write_jsonl(tmp_path / "store/x.jsonl", ["d"])
    (folder / "cc/x.jsonl").symlink_to(elsewhere)
    (folder / "dd").symlink_to(tmp_path / "store2")
    write_jsonl(tmp_path / "store2/y.jsonl", ["d"])
    for name in ("1.jsonl", "2.jsonl"):
        (folder / "cc" / name).touch()
    found = find_domains(folder)
    assert [file.name for file in found["cc"]] == [
        *("1.jsonl", "2.jsonl", "a.jsonl", "x.jsonl", "b.jsonl")
    ]
    assert found["dd"] == [folder / "dd/y.jsonl"]
    assert found.unread == []
    assert found.summary() == "7 files read: 7 .jsonl"
    assert found.unread_summary() == ""


def test_what_is_not_read_is_counted_and_named(folder, caplog) -> None:
    for name in ("README.md", "cc/LICENSE", "cc/deep/x.py", "cc/.x.jsonl", "cc/._a.jsonl"):
        (folder / name).write_text("text")
    found = find_domains(folder)
    assert {str(file.relative_to(folder)) for file in found.unread} == {
        *("README.md", "cc/LICENSE", "cc/deep/x.py", "cc/.x.jsonl")
    }
    unread = found.unread_summary()
    assert unread.startswith(f"4 files are not read: {folder}/README.md, {folder}/cc/")
    assert "4 files are not read" in caplog.text
    assert "wanted JSON lines or arrays (*.jsonl, *.json), plain text" in caplog.text
    for number in range(3):
        (folder / f"{number}.md").touch()
    assert find_domains(folder).unread_summary().endswith(" and 2 more")


@pytest.mark.parametrize(
    "name",
    [
        *("b.csv", "b.jsonl.xz", "b.zip", "b.tar.gz", "b.gz", "b.warc.gz", "b.CSV", "b.json.bz2"),
        *("b.arrow", "b.tsv"),
    ],
)
def test_what_looks_like_data_is_refused(folder, name: str) -> None:
    (folder / "cc" / name).touch()
    message = re.escape(f"/{name} looks like data and cannot be read; wanted JSON lines or arrays")
    with pytest.raises(ValueError, match=f"{message}.*: unpack or convert it, or move it away"):
        find_domains(folder)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json.gz", ".parquet"])
def test_pointers_of_git_lfs_are_no_text(folder, suffix: str) -> None:
    pointer = folder / f"cc/z{suffix}"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for read in (lambda: find_domains(folder), lambda: list(read_chunks(pointer))):
        with pytest.raises(ValueError, match=rf"z\{suffix} is a pointer of Git LFS"):
            read()
    pointer.write_text("version https://example.org\n")
    assert pointer in find_domains(folder)["cc"]


def test_pipes_and_links_to_nothing_are_refused(folder) -> None:
    (folder / "cc/z.jsonl").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"z\.jsonl is no regular file but a pipe, a device or a"):
        find_domains(folder)
    (folder / "cc/z.jsonl").unlink()
    os.mkfifo(folder / "cc/z.json.gz")
    with pytest.raises(ValueError, match=r"z\.json\.gz is no regular file"):
        find_domains(folder)


def test_an_unfinished_run_is_no_domain(folder, caplog) -> None:
    (folder / "data.tmp" / FOLDER).mkdir(parents=True)
    (folder / "data.tmp/cc.bin").touch()
    assert list(find_domains(folder)) == ["cc", "wiki"]
    assert "data.tmp is an unfinished run of megashear preprocess: not read" in caplog.text
