"""Count what masks and penalty add to a step's communication: calls and bytes of every rank.

    torchrun --nproc-per-node 4 tools/benchmarks/communication.py \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Every function of torch.distributed that sends is wrapped for one step, unmasked and masked. It
counts the elements that this rank gives it, before any algorithm multiplies them. A second count
has sequence length and batch doubled. Nothing is timed, so other work of the machine does not
matter. A table and JSON go to stdout; --json sends JSON to a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist
from counting import Counts, counting
from measuring import environment, report, table
from step import add_flags, processes, work_of
from ways import OurStep, Work, target_of

from megashear.config import ModelConfig, ParallelConfig
from megashear.parallel.groups import ParallelGroups


def of_step(
    work: Work,
    groups: ParallelGroups,
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    masked: bool,
) -> Counts:
    """Return what one step sends, after the model was built and warmed up."""
    step = OurStep(work, groups, parallel, model, target=target_of(work.shape) if masked else None)
    step()
    with counting() as counts:
        step()
    return counts


def added(masked: Counts, unmasked: Counts) -> dict[str, dict[str, int]]:
    """Return the calls and bytes that masks and penalty add, by function."""
    names = sorted(masked.calls.keys() | unmasked.calls.keys())
    difference = {
        name: {
            "calls": masked.calls[name] - unmasked.calls[name],
            "bytes": masked.bytes[name] - unmasked.bytes[name],
        }
        for name in names
    }
    return {name: each for name, each in difference.items() if any(each.values())}


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print tables and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    first = work_of(args)
    works = {
        f"s {first.seq_length}, b {first.micro_batch_size}": first,
        f"s {2 * first.seq_length}": replace(first, seq_length=2 * first.seq_length),
        f"b {2 * first.micro_batch_size}": replace(
            first, micro_batch_size=2 * first.micro_batch_size
        ),
    }
    with processes(args) as (parallel, model, groups):
        found: dict[str, Any] = {}
        for name, work in works.items():
            counts = {
                masked: of_step(work, groups, parallel, model, masked=masked)
                for masked in (False, True)
            }
            mine = {
                "step": sum(counts[False].bytes.values()),
                "step calls": sum(counts[False].calls.values()),
                "added": added(counts[True], counts[False]),
            }
            everyone: list[Any] = [None] * groups.world_size
            dist.all_gather_object(everyone, mine)
            found[name] = everyone
        hidden = 4 * first.shape.hidden_size
        rows = []
        for name, everyone in found.items():
            for rank, mine in enumerate(everyone):
                calls = sum(each["calls"] for each in mine["added"].values())
                size = sum(each["bytes"] for each in mine["added"].values())
                rows.append((name, rank, f"{mine['step']:,}", calls, f"{size:,}"))
        head = ["work", "rank", "unmasked step, bytes", "masks add, calls", "masks add, bytes"]
        report(
            "communication.py",
            [f"one float32 row of the hidden mask is {hidden:,} bytes", table(head, rows)],
            {
                "environment": environment("communication.py", argv),
                "shape": asdict(first.shape),
                "hidden_row_bytes": hidden,
                "found": found,
            },
            args.json,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
