"""Measure monitoring: its time in a step, in a log line and in an evaluation's survey of masks.

    python tools/benchmarks/monitoring.py --step-seconds 8.885

One process prints its CPU seconds, the median of the rounds, and their share of training with a
step of --step-seconds. --json writes every round to a file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megashear.config import TrainConfig
from megashear.masks.census import GateSides, take_census
from megashear.masks.gates import scores
from megashear.masks.mask_set import expected_gates
from megashear.masks.targets import target_units, whole_parts
from megashear.models.kept import KeptUnits
from megashear.monitor import tags
from megashear.monitor.charts import charts, mask_charts
from megashear.monitor.sinks import Sinks, open_sinks
from megashear.monitor.step_clock import StepClock
from megashear.parallel import device
from megashear.shape import PRESETS, ModelShape, read_shape
from megashear.train.survey import MaskSurvey, show_masks, survey_points

_, COMPUTE, COMMUNICATION, _ = tags.STEP_PARTS
DOMAINS = [f"domain{number}" for number in range(7)]
"""Numbers of the published recipes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shape = f"Preset ({', '.join(PRESETS)}) or JSON file of extents."
    parser.add_argument("--shape", default="llama2-7b", help=shape)
    parser.add_argument("--target", default="llama2-2.7b", help=shape)
    parser.add_argument("--step-seconds", type=float, required=True, help="Of a training step.")
    parser.add_argument("--log-interval", type=int, default=TrainConfig().log_interval)
    parser.add_argument("--eval-interval", type=int, default=TrainConfig().eval_interval)
    parser.add_argument("--waits", type=int, default=100, help="Collectives of a step on a CPU.")
    parser.add_argument("--rounds", type=int, default=9, help="Measurements of each.")
    parser.add_argument("--json", type=Path, help="File for all rounds; must not exist.")
    args = parser.parse_args(argv)
    if args.json is not None and args.json.exists():
        print(f"--json {args.json} exists; choose another", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # as a rank on a busy host
    source, target = (
        read_shape(args.shape, flag="--shape"),
        read_shape(args.target, flag="--target"),
    )
    with tempfile.TemporaryDirectory() as folder:
        sinks = open_sinks(
            TrainConfig(tensorboard_dir=folder),
            first_step=0,
            config={},
            layout=charts(
                domains=DOMAINS,
                has_references=True,
                more=mask_charts(list(target_units(source, target))),
            ),
        )
        rounds = measure(ways(source, target, sinks, waits=args.waits), args.rounds)
        sinks.close()
    every = {"a step": 1, "a log line": args.log_interval, "an evaluation": args.eval_interval}
    shares = []
    print(f"{'what':16} {'CPU s':>10} {'least':>10} {'most':>10}   every    share of training")
    for what, seconds in rounds.items():
        median = statistics.median(seconds)
        shares.append(median / every[what] / args.step_seconds)
        print(
            f"{what:16} {median:10.6f} {min(seconds):10.6f} {max(seconds):10.6f} "
            f"{every[what]:5} steps  {shares[-1]:9.4%}"
        )
    print(f"all of it, of steps of {args.step_seconds:g} s: {sum(shares):.4%}")
    if args.json is not None:
        found = {"python": platform.python_version(), "torch": torch.__version__, "rounds": rounds}
        args.json.write_text(json.dumps(found | {"shares": shares}, indent=2) + "\n")
    return 0


def ways(
    source: ModelShape, target: ModelShape, sinks: Sinks, *, waits: int
) -> dict[str, Callable[[], None]]:
    """Return the parts of monitoring on the rank that writes; other ranks do less."""
    parts, targets = whole_parts(source, target), target_units(source, target)
    generator = torch.Generator().manual_seed(0)
    log_alpha = {
        kind: (torch.randn(part.num_rows, part.num_units, generator=generator) * 4).clamp(-4.6, 4.6)
        for kind, part in parts.items()
    }
    sides, clock = GateSides(parts), StepClock(synchronize=device.synchronize)
    points = {f"train/{number}": 1.0 for number in range(10 + 4 * len(parts) + 3 * len(DOMAINS))}

    def step() -> None:
        with clock.step(is_timed=True):
            for part in tags.STEP_PARTS:
                with clock.part(part):
                    for _ in range(waits * (part == COMPUTE)):
                        with clock.part(COMMUNICATION):
                            pass

    def log_line() -> None:
        device.memory_in_use()
        sinks.scalars(1, points | clock.window())

    def evaluation() -> None:
        # whole masks cross the network pickled
        whole = pickle.loads(pickle.dumps(log_alpha))
        gates = expected_gates(whole)
        changed = sides.changed(gates)
        survey = MaskSurvey(
            log_alpha=whole,
            kept=KeptUnits.of(gates, source),
            chances=KeptUnits.expected({k: scores(v) for k, v in whole.items()}, source),
            census=take_census(whole, targets),
            target_sizes={kind: float(size) for kind, size in targets.items()},
            changed={kind: int(rows.sum()) for kind, rows in changed.items()},
        )
        show_masks(sinks, 1, survey, parts, targets)
        sinks.scalars(1, survey_points(survey, target))
        sinks.flush()

    return {"a step": step, "a log line": log_line, "an evaluation": evaluation}


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return each part's CPU seconds by round, interleaved; one more round does not count."""
    found: dict[str, list[float]] = {what: [] for what in ways}
    for number in range(rounds + 1):
        for what, do in ways.items():
            begin = time.process_time()
            do()
            if number:
                found[what].append(time.process_time() - begin)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
