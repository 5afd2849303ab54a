"""Measure how long a save stops training: in the background, and waited for, in turn.

    python tools/benchmarks/save_stall.py --output /some/disk --megabytes 400 --pairs 10

One process with the tensors of one rank prints each pair, and the median of the ratios of pairs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megashear.parallel import cpu_megatron, device

_TENSORS = 8
"""Number of tensors of the state; a rank writes two files at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and remove the files written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True, help="Directory; must not exist.")
    parser.add_argument("--megabytes", type=int, default=400, help="Size of the state, MB.")
    parser.add_argument("--pairs", type=int, default=10, help="Saves of each kind.")
    args = parser.parse_args(argv)
    if args.output.exists():
        print(f"--output {args.output} exists; choose another", file=sys.stderr)
        return 2
    cpu_megatron.install()
    device.select(0)
    from megatron.core.dist_checkpointing import ShardedTensor

    from megashear.parallel.launch import process_group

    length = args.megabytes * 10**6 // 4 // _TENSORS
    with process_group():
        state = {
            f"part{number}": ShardedTensor.from_rank_offsets(
                f"part{number}", torch.randn(length, device=device.device())
            )
            for number in range(_TENSORS)
        }
        ratios = []
        try:
            for pair in range(args.pairs):
                behind, its_end = measure(args.output, pair, state, background=True)
                waited, _ = measure(args.output, pair, state, background=False)
                ratios.append(waited / behind)
                print(
                    f"background: stands still {behind:.3f} s, done after {its_end:.3f} s | waited "
                    f"for: {waited:.3f} s | ratio {ratios[-1]:.1f}",
                    flush=True,
                )
        finally:
            shutil.rmtree(args.output, ignore_errors=True)
    print(f"median ratio {statistics.median(ratios):.1f} over {len(ratios)} pairs")
    return 0


def measure(
    root: Path, iteration: int, state: dict[str, Any], *, background: bool
) -> tuple[float, float]:
    """Return the seconds until a save returns, and until the checkpoint is visible."""
    from megashear.checkpoint.description import Description
    from megashear.checkpoint.saver import Saver
    from megashear.config import ParallelConfig
    from megashear.parallel.groups import ParallelGroups
    from megashear.shape import PRESETS

    groups = ParallelGroups.create(ParallelConfig())
    groups.destroy()  # a saver asks only where its rank stands
    saver = Saver(root / str(background), groups, background=background)
    shape = next(iter(PRESETS.values()))
    device.synchronize()
    start = time.monotonic()
    saver.save(Description(shape=shape, iteration=iteration, stage="benchmark"), dict(state))
    stall = time.monotonic() - start
    saver.wait()
    end = time.monotonic() - start
    shutil.rmtree(root / str(background))
    return stall, end


if __name__ == "__main__":
    raise SystemExit(main())
