"""A run that is killed leaves nothing that looks finished, and the next one goes on."""

import fcntl
import functools
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megashear.data import indexed
from megashear.data.manifest import DataManifest, read_manifest
from megashear.files.structured import LARGE_JSON_BYTES
from megashear.preprocessing import domain_writer, domains, journal, side_writer
from megashear.preprocessing.documents import EncodedChunk
from megashear.preprocessing.inputs import find_domains
from megashear.tokenizer.models import Tokenizer
from tests.texts import preprocess, write_jsonl
from tests.unit.preprocessing.test_domains import content, documents

STEPS = {
    "encode": (domains, "encode_chunk"),
    "bring to the disk": (os, "fsync"),
    "replace a file": (os, "replace"),
    "make a file whole": (Path, "rename"),
    "note": (domain_writer, "write_journal"),
    "write an index": (side_writer, "write_index"),
    "delete": (Path, "unlink"),
    "copy the tokenizer": (shutil, "copyfile"),
    "clear up": (shutil, "rmtree"),
}
"""What a run does, any of which may be its last."""


REPEATS = 40
"""Of a text that is tokenised until the process is killed: a second's work."""


@pytest.fixture
def run(tmp_path, texts, sentencepiece_file) -> Callable[..., DataManifest]:
    """Preprocess two domains, one of two files and one too small to divide by hash."""
    prose, paths = texts["numbers"], texts["paths"]
    inputs = {
        "prose": [
            write_jsonl(tmp_path / "in/a.jsonl", prose[:9]),
            write_jsonl(tmp_path / "in/b.jsonl", prose[9:]),
        ],
        "tiny": [write_jsonl(tmp_path / "in/tiny.jsonl", [paths[0] * 9, paths[1]])],
    }
    return functools.partial(
        preprocess,
        inputs,
        tmp_path / "out",
        sentencepiece_file,
        held_out_fraction=0.1,
        chunk_bytes=300,
    )


@pytest.fixture(autouse=True)
def often(monkeypatch) -> None:
    """Commits after every third chunk, so that every kind of place occurs."""
    monkeypatch.setattr(domains, "CHUNKS_BETWEEN_COMMITS", 3)


def killed_at(step: str, number: int, run: Callable[..., DataManifest]) -> bool:
    """Whether a run in a process of its own was killed before its ``number``-th such step."""
    owner, name = STEPS[step]

    def main() -> None:
        original = getattr(owner, name)
        calls = 0

        @functools.wraps(original)
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        run()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture
def expected(run, tmp_path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    run()
    files = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    return files


@pytest.mark.sampled(4)
@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_anywhere_is_taken_up(step: str, run, expected, tmp_path) -> None:
    out = tmp_path / "out"
    number = 1
    while killed_at(step, number, run):
        if out.exists():  # only what is finished may have its name
            assert step == "clear up"
            read_manifest(out)
            files = content(out)
            assert {name: files[name] for name in expected} == expected
            shutil.rmtree(out)
        else:
            with pytest.raises(ValueError, match=r"is not a megashear data directory"):
                read_manifest(out)
            run()
            assert content(out) == expected
            assert not (tmp_path / "out.tmp").exists()
            shutil.rmtree(out)
        # far apart, but for the first ones, which differ most
        number += 1 if number < 4 else 7
    assert number > 1, f"no run does {step}"
    assert content(out) == expected


def test_arrays_and_plain_text_are_taken_up_too(run, texts, tmp_path) -> None:
    prose = texts["numbers"]
    folder = tmp_path / "mixed/prose"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in prose[:9]]))
    write_jsonl(folder / "b.JSONL", prose[9:12])
    for number, text in enumerate(prose[12:]):
        (folder / f"c{number:03}.txt").write_text(text)
    inputs = find_domains(folder.parent)
    again = functools.partial(preprocess, inputs, *run.args[1:], **run.keywords)
    again()
    expected = content(tmp_path / "out")
    for number in (4, 12, 25):
        shutil.rmtree(tmp_path / "out")
        assert killed_at("encode", number, again)
        again()
        assert content(tmp_path / "out") == expected


def test_what_was_done_is_not_done_again(run, expected, tmp_path, monkeypatch) -> None:
    assert killed_at("encode", 12, run)
    encoded = []

    def counted(policy, chunk):
        encoded.append(chunk.file.name)
        return original(policy, chunk)

    original = domains.encode_chunk
    monkeypatch.setattr(domains, "encode_chunk", counted)
    run()
    rest = len(encoded)
    shutil.rmtree(tmp_path / "out")
    encoded.clear()
    run()
    assert len(encoded) - rest == 9  # killed before chunk 12: nine had been committed
    assert content(tmp_path / "out") == expected


def test_a_finished_domain_is_taken_over_only_unchanged(
    run, expected, tmp_path, caplog, monkeypatch
) -> None:
    assert killed_at("copy the tokenizer", 1, run)
    encoded = []
    original = domains.encode_chunk
    monkeypatch.setattr(
        domains, "encode_chunk", lambda p, c: encoded.append(c.file.stem) or original(p, c)
    )
    with (tmp_path / "in/tiny.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "One more document, which nobody knew."}) + "\n")
    with caplog.at_level(logging.WARNING):
        data = run()
    assert set(encoded) == {"tiny"}
    assert "domain tiny: its files are others than before; begun anew" in caplog.text
    assert data.domains[1].documents + data.domains[1].held_out_documents == 3
    files = content(tmp_path / "out")
    prose = {name for name in expected if name.startswith("prose")}
    assert {name: files[name] for name in prose} == {name: expected[name] for name in prose}


def test_a_damaged_output_of_a_finished_domain_is_made_again(run, expected, tmp_path) -> None:
    assert killed_at("copy the tokenizer", 1, run)
    file = tmp_path / "out.tmp/prose.bin"
    file.write_bytes(file.read_bytes()[:-2])
    run()
    assert content(tmp_path / "out") == expected


def test_files_before_a_changed_one_are_kept(run, tmp_path, texts, caplog, monkeypatch) -> None:
    """A broken line found after hours: mend it, and only its file is read again."""
    broken = tmp_path / "in/b.jsonl"
    good = broken.read_bytes()
    lines = good.splitlines(keepends=True)
    broken.write_bytes(b"".join(lines[:-1]) + b'{"text": \n')
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=rf"b\.jsonl, line {len(lines)} is not valid JSON"),
    ):
        run()
    assert "what is done so far stays in" in caplog.text
    broken.write_bytes(good)
    encoded = []
    original = domains.encode_chunk
    monkeypatch.setattr(
        domains, "encode_chunk", lambda p, c: encoded.append(c.file.stem) or original(p, c)
    )
    data = run()
    assert set(encoded) == {"b", "tiny"}
    assert "b.jsonl is not what an earlier run read there; resumed after 1 files" in caplog.text
    total = data.domains[0].documents + data.domains[0].held_out_documents
    assert total == len(texts["numbers"])


def test_domains_no_longer_asked_for_leave_no_trace(run, tmp_path, caplog) -> None:
    assert killed_at("copy the tokenizer", 1, run)
    inputs = {"tiny": [tmp_path / "in/tiny.jsonl"]}
    with caplog.at_level(logging.WARNING):
        preprocess(inputs, *run.args[1:], **run.keywords)
    assert "domain prose of an earlier run is no longer in the input; deleted" in caplog.text
    assert not list((tmp_path / "out").glob("prose*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"append_eod": False}, r"other settings \(append_eod True, now False\)"),
        ({"held_out_fraction": 0.2}, r"held_out_fraction 0\.1, now 0\.2\); resume with those, or"),
    ],
)
def test_other_settings_do_not_mix(run, tmp_path, options, message) -> None:
    assert killed_at("encode", 12, run)
    before = content(tmp_path / "out.tmp")
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert content(tmp_path / "out.tmp") == before


def test_other_added_tokens_do_not_mix(run, tmp_path, monkeypatch) -> None:
    """A run begun by a release that did not ask resumes only where no token was added."""
    assert killed_at("encode", 12, run)
    noted = tmp_path / "out.tmp" / journal.FOLDER / journal.SETTINGS_NAME
    settings = json.loads(noted.read_text())
    assert settings.pop("added_tokens_fingerprint") is None
    noted.write_text(json.dumps(settings))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "added_fingerprint", "ab12")
        with pytest.raises(ValueError, match="added_tokens_fingerprint None, now 'ab12'"):
            run()
    run()


def test_a_journal_of_any_size_is_read_and_a_spoiled_one_hides_no_error(tmp_path) -> None:
    out = tmp_path / "out.tmp"
    noted = out / journal.FOLDER / "cc.json"

    def end(spoiled: bool) -> None:
        with journal.unfinished(out, {}):
            journal.write_journal(out, "cc", journal.Journal())
            with noted.open("a") as stream:
                stream.write(" " * LARGE_JSON_BYTES)
            assert journal.read_journal(out, "cc") == journal.Journal()
            if spoiled:
                noted.write_text("{")
            raise RuntimeError("the real one")

    for spoiled in (True, False):
        with pytest.raises(RuntimeError, match="the real one"):
            end(spoiled)
        assert out.exists() == spoiled


def test_a_directory_of_somebody_else_is_refused(run, tmp_path) -> None:
    (tmp_path / "out.tmp").mkdir()
    with pytest.raises(ValueError, match=r"out\.tmp exists and was not left behind by a run"):
        run()
    assert os.listdir(tmp_path / "out.tmp") == []


def test_two_runs_do_not_write_the_same(run, tmp_path) -> None:
    assert killed_at("encode", 12, run)
    with (tmp_path / "out.tmp" / journal.FOLDER / journal.LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another run is writing .*out\.tmp"):
            run()
    run()


def test_an_interrupt_before_anything_was_done_leaves_nothing(run, tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(domains, "encode_chunk", interrupted)
    with pytest.raises(
        KeyboardInterrupt, match="nothing that could be kept was done yet; the same"
    ):
        run()
    assert os.listdir(tmp_path) == ["in"]


def test_an_interrupt_says_what_is_kept(run, expected, tmp_path, monkeypatch) -> None:
    original, calls = domains.encode_chunk, itertools.count()

    def interrupted(*args: Any) -> EncodedChunk:
        if next(calls) == 11:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(domains, "encode_chunk", interrupted)
    message = r"what is done so far stays in \S+/out\.tmp; the same command resumes there"
    with pytest.raises(KeyboardInterrupt, match=message):
        run()
    run()
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_from_the_keyboard_is_one_line(
    workers: str, jsonl, sentencepiece_file, tmp_path
) -> None:
    """All processes of the terminal get it: none of them prints a traceback."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl["numbers"][0].read_bytes() * 20 * REPEATS)
    command = [
        *(sys.executable, "-m", "megashear", "preprocess", "--input", folder, "--workers", workers),
        *("--output", tmp_path / "out", "--tokenizer-model", sentencepiece_file),
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    written = tmp_path / "out.tmp" / "a.bin"
    while process.poll() is None and not written.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate()[1].strip()
    assert process.returncode == 130
    assert told.startswith("megashear preprocess: interrupted; nothing that could be kept was done")
    assert len(told.splitlines()) == 1


def test_the_index_comes_whole(tmp_path, monkeypatch) -> None:
    """The twin of "make a file whole": written in place, half an index would have its name."""
    (tmp_path / "lengths").write_bytes(b"\1\0\0\0")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        indexed.write_index(tmp_path / "x.idx", tmp_path / "lengths", "uint16")
    assert not (tmp_path / "x.idx").exists()


def test_workers_end_with_a_command_that_is_killed(
    jsonl, data, sentencepiece_file, tmp_path
) -> None:
    """The real command, killed from outside while it works; then given again."""
    folder = tmp_path / "in"
    for name, (file,) in jsonl.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_bytes(file.read_bytes() * REPEATS)
    command = [
        *(sys.executable, "-m", "megashear", "preprocess", "--input", folder, "--workers", "2"),
        *("--output", tmp_path / "out", "--tokenizer-model", sentencepiece_file),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    written = tmp_path / "out.tmp" / "numbers.bin"
    while process.poll() is None and not (written.exists() and written.stat().st_size):
        time.sleep(0.01)
    workers = children(process.pid)
    assert process.poll() is None
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers wait for a process that is gone"
        time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = read_manifest(tmp_path / "out")
    for name in data.names:
        both = documents(found.prefix(name)) + documents(found.held_out_prefix(name))
        once = documents(data.prefix(name)) + documents(data.held_out_prefix(name))
        assert sorted(both) == sorted(once * REPEATS)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
