"""Measure the host's time for masks in a step, at the shapes of real models, on any device.

    python tools/benchmarks/masks.py --preset llama2-7b --target llama2-2.7b

Sampling, penalty, gradients and update run on the host, in one process that holds the masks of a
whole model, which is more than any rank of a divided model has. CPU seconds are measured, because
other work of the machine changes them little. The table also has their share of the time that the
step's arithmetic takes at a given rate. The table and JSON go to stdout; --json sends JSON to a
file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import environment, report, table
from ways import SEED, Work

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.kinds import HIDDEN, KINDS
from megashear.masks.mask_set import MaskSet
from megashear.masks.optimizer import MaskOptimizer, clip_factor
from megashear.masks.targets import target_units, whole_parts
from megashear.shape import PRESETS

_CHECKED = (HIDDEN,)
"""Kinds that every rank samples for every stream of the step, see `StructuredPruning`."""
AHEAD = "before gradients come"
"""Part for which a GPU does not wait, because it still runs the model's backward pass: the noise of
the next step, and the sums of the penalty."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama2-7b")
    parser.add_argument("--target", choices=sorted(PRESETS), default="llama2-1.3b")
    parser.add_argument("--own-streams", type=int, default=1, help="noise streams of this replica")
    parser.add_argument("--all-streams", type=int, default=8, help="noise streams of the step")
    parser.add_argument("--tokens", type=int, default=32 * 4096, help="in a step, all replicas")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--tflops", type=float, default=445.0, help="that a GPU reaches: 45%% of an H100's 989"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for every measurement; stdout if none")
    args = parser.parse_args(argv)
    source, target = PRESETS[args.preset], PRESETS[args.target]
    parts, targets = whole_parts(source, target), target_units(source, target)
    masks = MaskSet(parts)
    constraint = SparsityConstraint(parts, targets, warmup_steps=640)
    optimizer = MaskOptimizer(masks, constraint)
    gates: list[dict[str, torch.Tensor]] = []
    sums: dict[str, torch.Tensor] = {}
    gradient: list[dict[str, torch.Tensor]] = []

    kinds = {n: KINDS if n < args.own_streams else _CHECKED for n in range(args.all_streams)}

    def ahead() -> None:
        masks.draw_ahead(seed=SEED, step=1, kinds=kinds)
        sums.update(masks.closed_sums())

    def sample() -> None:
        optimizer.zero_grad()
        sampled = [
            masks.sample(seed=SEED, step=1, stream=stream, kinds=wanted)
            for stream, wanted in kinds.items()
        ]
        gates[:] = sampled[: args.own_streams]
        gradient[:] = [{kind: torch.ones_like(z) for kind, z in of.items()} for of in gates]

    def backward() -> None:
        for of, grads in zip(gates, gradient):
            torch.autograd.backward(list(of.values()), [grads[kind] for kind in of])

    def penalty() -> None:
        constraint.penalty(sums, sums, 1).backward()

    def update() -> None:
        squares = optimizer.grad_square_sums()
        norm = float(sum(square.item() for square in squares.values())) ** 0.5
        optimizer.step(1e-3, grad_scale=clip_factor(norm))

    steps: dict[str, Callable[[], None]] = {
        "sampling": sample,
        AHEAD: ahead,
        "gradients": backward,
        "penalty": penalty,
        "update": update,
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    ahead()
    for _ in range(args.rounds):
        for name, part in steps.items():
            begin = time.process_time()
            part()
            seconds[name].append(time.process_time() - begin)
    work = Work(shape=source, seq_length=4096, micro_batch_size=1)
    step_s = work.flops() / work.tokens * args.tokens / (args.gpus * args.tflops * 1e12)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    middle["together"] = sum(middle.values())
    middle["a GPU may wait for"] = middle["together"] - middle[AHEAD]
    rows = [(name, f"{1e3 * s:.2f}", f"{100 * s / step_s:.2f}%") for name, s in middle.items()]
    report(
        "masks.py",
        [
            f"{sum(mask.numel() for mask in masks.parameters()):,} gates; {args.tokens:,} tokens "
            f"take {args.gpus} GPUs {step_s:.3f} s at {args.tflops:g} TFLOP/s each",
            table(["part", "CPU ms a step", "of the step's arithmetic"], rows),
        ],
        {"environment": environment("masks.py", argv), "step_s": step_s, "cpu_s": seconds},
        args.json,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
