"""Measure preprocessing, MB of jsonl a second, against the loop of Megatron-LM's script.

The loop runs in one process, and megashear with several numbers of --workers. Rounds are
interleaved: each runs the loop and every number of workers once, in alternating order, so that
other work of the machine slows all of them. All read the same files, load the tokenizer, and write
.bin and .idx. megashear also splits off held-out sets, and syncs its files to the disk. A table and
JSON go to stdout.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megashear.config import PreprocessConfig
from megashear.data.indexed import token_dtype
from megashear.preprocessing.domains import preprocess
from megashear.preprocessing.inputs import find_domains
from megashear.tokenizer.choice import load_tokenizer

SELF, CHILDREN = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Cost of one way in one round."""

    way: str
    round: int
    wall_s: float
    cpu_s: float
    """User and system time of all its processes, seconds."""
    own_cpu_s: float
    """CPU time of the process that reads and writes, which more workers do not share."""
    load: float
    """Other work of the machine at the start: its load average over one minute."""


def megatron_loop(files: Sequence[Path], tokenizer_path: str, output: Path) -> int:
    """Tokenise as Megatron-LM does in one process, and return the number of tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = load_tokenizer(tokenizer_path)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).type
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    output.mkdir()
    total = 0
    for file in files:
        builder = IndexedDatasetBuilder(str(output / f"{file.stem}.bin"), dtype=dtype)
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                ids = tokenizer.encode(json.loads(line)["text"])
                if ids:
                    ids = [*bos, *ids, *eos]
                    builder.add_document(ids, [len(ids)])
                    total += len(ids)
        builder.finalize(str(output / f"{file.stem}.idx"))
    return total


def measured(way: str, number: int, work: Callable[[], int]) -> tuple[Run, int]:
    """Run a way once, and return its cost and the number of tokens written."""
    load = os.getloadavg()[0]
    wall, own, others = time.perf_counter(), _cpu_seconds(SELF), _cpu_seconds(CHILDREN)
    tokens = work()
    own = _cpu_seconds(SELF) - own
    run = Run(
        way=way,
        round=number,
        wall_s=time.perf_counter() - wall,
        cpu_s=own + _cpu_seconds(CHILDREN) - others,
        own_cpu_s=own,
        load=load,
    )
    print(f"round {number} {way}: {run.wall_s:.2f} s, CPU {run.cpu_s:.2f} s", file=sys.stderr)
    return run, tokens


def _cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def table(runs: Sequence[Run], megabytes: float) -> str:
    """Return the table of MB/s and ratios to the loop: median, least and most over rounds."""
    lines = [
        "| way | MB/s | against the loop | CPU s per MB | CPU against the loop | of it, reader |",
        "|---|---|---|---|---|---|",
    ]
    base = [run for run in runs if run.way == runs[0].way]
    for way in dict.fromkeys(run.way for run in runs):
        own = sorted((run for run in runs if run.way == way), key=lambda run: run.round)
        wall = [b.wall_s / run.wall_s for b, run in zip(base, own)]
        cpu = [run.cpu_s / b.cpu_s for b, run in zip(base, own)]
        rate = megabytes / statistics.median(run.wall_s for run in own)
        cost = statistics.median(run.cpu_s for run in own) / megabytes
        reader = statistics.median(run.own_cpu_s for run in own) / megabytes
        lines.append(
            f"| {way} | {rate:.2f} | {_spread(wall)} | {cost:.3f} | {_spread(cpu)} | {reader:.3f} |"
        )
    return "\n".join(lines)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, help="directory of NAME.jsonl files")
    parser.add_argument("--tokenizer-model", required=True, help="as of megashear preprocess")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=1, help="times the input is taken, a size")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        text, output = Path(folder) / "text", Path(folder) / "output"
        text.mkdir()
        for file in sorted(Path(args.input).glob("*.jsonl")):
            (text / file.name).write_bytes(file.read_bytes() * args.copies)
        inputs = find_domains(text)
        files = [file for each in inputs.values() for file in each]
        megabytes = sum(file.stat().st_size for file in files) / 1e6

        def ours(workers: int) -> int:
            config = PreprocessConfig(
                input=args.input,
                output=str(output),
                tokenizer_model=args.tokenizer_model,
                workers=workers,
            )
            data = preprocess(inputs, config, progress=False)
            return sum(domain.tokens + domain.held_out_tokens for domain in data.domains)

        ways: dict[str, Callable[[], int]] = {
            "Megatron-LM's loop": lambda: megatron_loop(files, args.tokenizer_model, output)
        }
        for count in args.workers:
            ways[f"megashear --workers {count}"] = functools.partial(ours, count)
        names = list(ways)
        runs = []
        tokens = set()
        for number in range(-1, args.rounds):  # -1 brings the files and the code into memory
            turn = number % len(names)
            for way in names[turn:] + names[:turn]:
                run, written = measured(way, number, ways[way])
                shutil.rmtree(output)
                tokens.add(written)
                if number >= 0:
                    runs.append(run)
    assert len(tokens) == 1, f"the ways wrote different numbers of tokens: {tokens}"
    runs.sort(key=lambda run: (names.index(run.way), run.round))
    print(table(runs, megabytes))
    environment = {
        "megabytes": megabytes,
        "tokens": tokens.pop(),
        "tokenizer": type(load_tokenizer(args.tokenizer_model)).__name__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("megatron-core", "numpy", "sentencepiece")},
        "command": " ".join(["tools/benchmarks/preprocess.py", *(argv or sys.argv[1:])]),
    }
    print(json.dumps({"environment": environment, "runs": [asdict(run) for run in runs]}))
    return 0


if __name__ == "__main__":  # workers import this file again
    raise SystemExit(main())
