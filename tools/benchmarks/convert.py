"""Measure `megashear convert` in both directions against a copy of the same bytes.

One run measures wall time and peak resident memory of each process, with a copy before and after
each conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CERTIFICATE = "certificate.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Time and memory of one process."""

    name: str
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """CPU time of all threads, user and system."""
    peak_bytes: int
    """Largest resident set that the kernel counts (ru_maxrss), with pages of mapped files."""


def measured(name: str, command: Sequence[str], reads: Path) -> Step:
    """Run a command whose input is not in the page cache, and return its cost."""
    for path in reads.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    step = Step(
        name=name,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 2**10,
    )
    print(f"{name}: {seconds:.1f} s, peak {step.peak_bytes / 2**30:.2f} GiB", flush=True)
    return step


def copied(source: Path, work: Path) -> Step:
    """Copy a directory and sync the copy, then remove it."""
    copy = work / "copy"
    script = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'
    step = measured("copy", ["sh", "-c", script, str(source), str(copy)], source)
    shutil.rmtree(copy)
    return step


def check_equal(source: Path, checkpoint: Path, back: Path) -> None:
    """Check that certificates of both directions, and files of both ends, are equal."""
    there, home = (json.loads((d / CERTIFICATE).read_text()) for d in (checkpoint, back))
    assert there["equal_to_source"]
    assert home["equal_to_source"]
    assert {n: w["sha256"] for n, w in home["weights"].items()} == {
        n: w["source_sha256"] for n, w in there["weights"].items()
    }
    for path in source.glob("*.safetensors"):
        subprocess.run(["cmp", str(path), str(back / path.name)], check=True)


def main(argv: Sequence[str]) -> int:
    """Run all steps, print a table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, help="directory that make_llama.py made")
    parser.add_argument(
        "--work",
        required=True,
        help="directory to work in, made and removed; takes three times the input's bytes",
    )
    parser.add_argument("--workers", help="threads of each conversion; convert's default if absent")
    args = parser.parse_args(argv)
    source, work = Path(args.input), Path(args.work)
    work.mkdir()
    checkpoint, back = work / "checkpoint", work / "back"
    convert = [sys.executable, "-m", "megashear", "convert"]
    convert += ["--workers", args.workers] if args.workers else []

    def converted(name: str, given: Path, output: Path) -> Step:
        return measured(name, [*convert, "--input", str(given), "--output", str(output)], given)

    try:
        steps = [
            copied(source, work),
            converted("HF to Megatron", source, checkpoint),
            copied(checkpoint, work),
            converted("Megatron to HF", checkpoint, back),
            copied(back, work),
        ]
        check_equal(source, checkpoint, back)
        num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    print(f"\n{num_bytes / 2**30:.2f} GiB of weights, every bit the same at the end\n")
    print("| step | seconds | CPU seconds | peak resident memory, GiB | seconds over the copies' |")
    print("|---|---|---|---|---|")
    for number, step in enumerate(steps):
        ratio = ""
        if step.name != "copy":
            around = (steps[number - 1].seconds + steps[number + 1].seconds) / 2
            ratio = f"{step.seconds / around:.2f}"
        peak = f"{step.peak_bytes / 2**30:.2f}"
        row = [step.name, f"{step.seconds:.1f}", f"{step.cpu_seconds:.1f}", peak, ratio]
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
