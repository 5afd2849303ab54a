"""Time a step with a teacher against the same step without, beside what `plan` expects.

    python tools/benchmarks/teacher.py --rounds 8
    torchrun --nproc-per-node 2 tools/benchmarks/teacher.py --tensor-model-parallel-size 2

The teacher has the shape of the flags. The student is first its target, as in recovery, then the
masked model itself, as while masks are learned. Ways take turns in every round. Tables and JSON go
to stdout; --json sends JSON to a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from measuring import environment, interleave, median_seconds, ratio, report, table
from step import add_flags, processes, work_of
from ways import OurStep, Work, target_of

from megashear.config import ModelConfig, ParallelConfig
from megashear.models.llama import build_chunks
from megashear.parallel.groups import ParallelGroups
from megashear.planning.time import FORWARD_SHARE
from megashear.train.distillation import Distillation, Teacher

AGAIN = "again"
"""The step without a teacher, a second time: what differs is noise."""


def taught(
    step: OurStep,
    work: Work,
    groups: ParallelGroups,
    parallel: ParallelConfig,
    model: ModelConfig,
) -> Callable[[], None]:
    """Return ``step`` with the divergence from a teacher of ``work`` in the place of its loss."""
    chunks = build_chunks(work.shape, groups, parallel, model, variant="local")
    objective, plain = step.objective, step.objective.terms
    terms = [Distillation(Teacher(chunks, work.shape), groups.tensor)]

    def run() -> None:
        objective.terms = [*terms]
        step()
        objective.terms = plain

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    work = work_of(args)
    target = target_of(work.shape)
    with processes(args) as (parallel, model, groups):
        students = {
            "recovery": (replace(work, shape=target), None),
            "mask phase": (work, target),
        }
        found: dict[str, Any] = {}
        rows = []
        for name, (of, to) in students.items():
            step = OurStep(of, groups, parallel, model, target=to)
            ways: dict[str, Callable[[], None]] = {
                "plain": step,
                AGAIN: step,
                "taught": taught(step, work, groups, parallel, model),
            }
            measured = interleave(ways, args.rounds)
            expected = 1 + FORWARD_SHARE * work.flops() / of.flops()
            longer, noise = (ratio(measured, way, "plain") for way in ("taught", AGAIN))
            found[name] = {
                "student": asdict(of.shape),
                "expected": expected,
                "taught/plain": longer,
                "again/plain": noise,
                "measured": measured,
            }
            seconds = f"{median_seconds(measured, 'plain'):.3f}"
            rows.append((name, seconds, str(longer), f"{expected:.3f}", str(noise)))
        head = ["student", "plain, s", "with teacher", "by the plan's count", "again, without"]
        report(
            "teacher.py",
            [table(head, rows)],
            {
                "environment": environment("teacher.py", argv),
                "teacher": asdict(work.shape),
                "found": found,
            },
            args.json,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
