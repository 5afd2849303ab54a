"""Compare the first steps after the cut, with Adam's moments from pruning and with moments of 0.

    python -m megashear quickstart --output runs/quickstart
    python tools/benchmarks/handover.py --quickstart runs/quickstart --output runs/handover

The pruning run of a finished quickstart is cut in both ways, and both models are trained on the
same samples. A table is printed, and every loss goes to OUTPUT/handover.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from megashear.checkpoint.description import find_iteration, read_description

RANKS = 2
WAYS = ("carried", "reset")
_PARTS = ("parallel", "model", "train", "optimizer", "data", "masks")
"""Groups of settings whose keys are flat in a YAML file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="What it wrote.")
    parser.add_argument("--output", type=Path, required=True, help="Directory; must not exist.")
    parser.add_argument("--steps", type=int, default=60, help="Steps after the cut.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Of data order.")
    parser.add_argument("--warmups", type=int, nargs="+", default=[0, 10], help="Steps.")
    args = parser.parse_args(argv)
    if args.output.exists():
        print(f"--output {args.output} exists; choose another", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True)
    known = read_description(find_iteration(args.quickstart / "pruned")).known
    pruning = flat(known.run) | {"save": str(args.output / "pruned")}
    pruning |= {"resume": True, "tensorboard_dir": None}
    found: list[dict[str, Any]] = []
    runs = [(seed, warmup, way) for seed in args.seeds for warmup in args.warmups for way in WAYS]
    for seed, warmup, way in tqdm(runs, unit="run"):
        folder = args.output / f"{way}-warmup{warmup}-seed{seed}"
        folder.mkdir()
        behind = {
            "data_path": pruning["data_path"],
            "reweight": "constant",
            "eval_interval": 0,
            "pipeline_model_parallel_size": RANKS,
            "micro_batch_size": 2,
            "global_batch_size": pruning["global_batch_size"],
            "seq_length": pruning["seq_length"],
            "lr": pruning["lr"],
            "lr_decay_iters": 10 * args.steps,
            "lr_warmup_iters": warmup,
            "train_iters": args.steps,
            "log_interval": 1,
            "seed": seed,
            "save": str(folder / "trained"),
            "tensorboard_dir": str(folder / "events"),
        }
        if way == "carried":
            shutil.copytree(args.quickstart / "pruned", args.output / "pruned")
            write(folder / "then.yaml", behind)
            write(folder / "prune.yaml", pruning | {"then_pretrain": str(folder / "then.yaml")})
            start("prune", folder / "prune.yaml")
            shutil.rmtree(args.output / "pruned")
        else:
            write(folder / "then.yaml", behind | {"load": str(args.quickstart / "cut")})
            start("pretrain", folder / "then.yaml")
        found.append({"seed": seed, "warmup": warmup, "way": way} | measured(folder, args.steps))
    (args.output / "handover.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found, args.warmups))
    return 0


def flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's keys for YAML, without those that have their defaults."""
    values: dict[str, Any] = {}
    for name, value in run.items():
        values |= value if name in _PARTS else {name: value}
    return {name: value for name, value in values.items() if value not in (None, (), [], {})}


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a run as YAML."""
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")


def start(command: str, config: Path) -> None:
    """Run a command on two ranks, with its log beside the configuration."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    with config.with_suffix(".log").open("w") as log:
        subprocess.run(
            [sys.executable, *torchrun, "-m", "megashear", command, "--config", str(config)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            check=True,
        )


def measured(folder: Path, steps: int) -> dict[str, Any]:
    """Return the training loss of every step, and the held-out mean at the end, nats per token."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    reader.Reload()
    losses = [event.value for event in reader.Scalars("train/lm-loss")]
    assert len(losses) == steps, f"{folder}: {len(losses)} losses"
    known = read_description(find_iteration(folder / "trained")).known
    held_out = statistics.mean(known.held_out_loss["loss"].values())
    return {"losses": losses, "held_out": held_out}


def table(found: Sequence[Mapping[str, Any]], warmups: Sequence[int]) -> str:
    """Return the table of means over seeds: windows of training loss, last held-out loss."""
    steps = len(found[0]["losses"])
    windows = [(0, 5), (5, 10), (10, 20), (20, steps)]
    head = " | ".join(f"steps {first + 1} to {last}" for first, last in windows)
    lines = [f"| warm-up | moments | {head} | held out, step {steps} |", "|---|---" * 3 + "|---|"]
    for warmup in warmups:
        for way in WAYS:
            runs = [run for run in found if (run["warmup"], run["way"]) == (warmup, way)]
            cells = [
                spread([statistics.mean(run["losses"][first:last]) for run in runs])
                for first, last in windows
            ]
            cells.append(spread([run["held_out"] for run in runs]))
            lines.append(f"| {warmup} steps | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return the mean, and with several values the standard deviation, as text."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
