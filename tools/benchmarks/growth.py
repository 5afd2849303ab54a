"""Measure how the cost of a step grows with layers, width and sequence, and over tensor ranks.

    python tools/benchmarks/growth.py --rounds 20
    python tools/benchmarks/growth.py --rounds 5 --ranks 1 2

Without --ranks, a base shape and shapes with one extent doubled run interleaved in one process,
masked and unmasked. The slope is log2 of the ratio of times, beside log2 of the ratio of
arithmetic. With --ranks, jobs of `step.py` with these numbers of tensor ranks, of one thread each,
run in turn, several times. The efficiency of n ranks is the time of one rank over n times the time
of n ranks. Tables and JSON go to stdout; --json sends JSON to a file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import Measured, environment, interleave, ratio, report, table
from step import MASKED, UNMASKED, add_flags, processes, work_of
from ways import OurStep, Work, target_of


def doubled(work: Work) -> dict[str, Work]:
    """Return the work itself, and the work with each extent doubled."""
    shape = work.shape
    wide = replace(
        shape,
        hidden_size=2 * shape.hidden_size,
        num_attention_heads=2 * shape.num_attention_heads,
        num_query_groups=2 * shape.num_query_groups,
        ffn_hidden_size=2 * shape.ffn_hidden_size,
    )
    return {
        "base": work,
        "layers": replace(work, shape=replace(shape, num_layers=2 * shape.num_layers)),
        "width": replace(work, shape=wide),
        "sequence": replace(work, seq_length=2 * work.seq_length),
    }


def slopes(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return measured and expected slopes."""
    works = doubled(work_of(args))
    with processes(args) as (parallel, model, groups):
        ways: dict[str, Callable[[], None]] = {}
        for name, work in works.items():
            ways[f"{name} {UNMASKED}"] = OurStep(work, groups, parallel, model)
            ways[f"{name} {MASKED}"] = OurStep(
                work, groups, parallel, model, target=target_of(work.shape)
            )
        measured = interleave(ways, args.rounds)
    rows = []
    for name in list(works)[1:]:
        row: list[object] = [name, f"{math.log2(works[name].flops() / works['base'].flops()):.2f}"]
        for kind in (UNMASKED, MASKED):
            for clock in ("wall_s", "cpu_s"):
                found = ratio(measured, f"{name} {kind}", f"base {kind}", clock=clock)
                row.append(
                    f"{math.log2(found.median):.2f} "
                    f"({math.log2(found.low):.2f} to {math.log2(found.high):.2f})"
                )
        rows.append(row)
    for name in works:
        over = ratio(measured, f"{name} {MASKED}", f"{name} {UNMASKED}", clock="cpu_s")
        print(f"{name}: masked over unmasked, CPU: {over}", file=sys.stderr)
    head = ["doubled", "of the arithmetic", "unmasked", "on CPU time", "masked", "on CPU time"]
    return table(head, rows), {"measured": measured}


def over_ranks(args: argparse.Namespace, flags: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return seconds and efficiency by number of tensor ranks."""
    script = Path(__file__).with_name("step.py")
    found: dict[int, list[list[Measured]]] = {ranks: [] for ranks in args.ranks}
    for turn in range(args.turns):
        for ranks in args.ranks[turn % len(args.ranks) :] + args.ranks[: turn % len(args.ranks)]:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "step.json"
                subprocess.run(
                    [
                        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                        *("--nproc-per-node", str(ranks), str(script), *flags),
                        *("--tensor-model-parallel-size", str(ranks), "--threads", "1"),
                        *("--no-transformers", "--json", str(output)),
                    ],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                result = json.loads(output.read_text(encoding="utf-8"))
            found[ranks].append([Measured(**each) for each in result["measured"]])
    rows = []
    for way in (UNMASKED, MASKED):
        middle = {
            (ranks, clock): statistics.median(
                getattr(each, clock) for job in jobs for each in job if each.way == way
            )
            for ranks, jobs in found.items()
            for clock in ("wall_s", "cpu_s")
        }
        one = args.ranks[0]
        rows += [
            (
                way,
                ranks,
                f"{middle[ranks, 'wall_s']:.4f}",
                f"{middle[one, 'wall_s'] * one / (middle[ranks, 'wall_s'] * ranks):.2f}",
                f"{middle[ranks, 'cpu_s']:.4f}",
                f"{middle[one, 'cpu_s'] / middle[ranks, 'cpu_s']:.2f}",
            )
            for ranks in args.ranks
        ]
    head = ["way", "ranks", "s a step", "efficiency", "CPU s, all ranks", "work over one rank's"]
    return table(head, rows), {"jobs": {str(ranks): jobs for ranks, jobs in found.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of tensor ranks to compare")
    parser.add_argument("--turns", type=int, default=3, help="jobs of each number of ranks")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else list(argv)
    if args.ranks:
        own = {"--ranks", "--turns", "--json"}
        flags, skipping = [], False
        for word in given:
            if word.startswith("--"):
                skipping = word in own
            if not skipping:
                flags.append(word)
        found, result = over_ranks(args, flags)
    else:
        found, result = slopes(args)
    result = {"environment": environment("growth.py", argv)} | result
    report("growth.py", [found], result, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
