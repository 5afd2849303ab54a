"""Kill -9 tiny training jobs at random instants, start them again with --resume, and compare the
result, bit by bit, with jobs that were never killed.

Needs a checkout and `pip install -e ".[test]"`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ranks are forked, threads are not
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Kill and compare; return 0 if all starts succeed, nothing differs and no phase is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills",
        type=int,
        default=50,
        help="least number of kills; kills go on until each phase had one; default 50",
    )
    parser.add_argument(
        "--restarts", type=int, default=4, help="more kills, under torchrun --max-restarts"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all choices; default 0")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="new directory for crash_test.json, crash_test.md and jobs that failed",
    )
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"--output {args.output} exists; choose another one or remove it")

    import torch
    from tqdm import tqdm

    from tests import text_run
    from tests.crash.jobs import LAYOUTS, STAGES, Crashes, Scenario, phases_missed

    torch.set_num_threads(1)
    args.output.mkdir(parents=True)
    begin = time.monotonic()
    crashes = Crashes(args.output, text_run.make(args.output / "text"), args.seed)
    result = crashes.result
    with tqdm(total=args.kills + args.restarts, desc="kills", unit="kill") as bar:
        for scenario in crashes.run(args.kills):
            bar.set_postfix_str(f"{scenario}, {len(result.failures)} failures")
            bar.update()
        for turn in range((args.restarts + 1) // 2):
            scenario = Scenario(STAGES[turn % 2], "dp2", turn % 4 < 2)
            few = min(2, args.restarts - 2 * turn)
            phases = crashes.choice.sample(("training", "weights", "latest"), few)
            crashes.restarted_job(scenario, [crashes.kill(scenario, phase) for phase in phases])
            bar.update(few)
    missed = phases_missed(result, [(stage, name) for stage in STAGES for name in LAYOUTS])
    summary = {
        "seed": args.seed,
        "kills": len(result.kills),
        "of them under torchrun": sum(kill["launcher"] == "torchrun" for kill in result.kills),
        "jobs": result.jobs,
        "starts after a kill": result.resumes,
        "failures": result.failures,
        "phases that no kill fell in": missed,
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    table = result.table()
    report = json.dumps({**summary, "each kill": result.kills}, indent=1)
    (args.output / "crash_test.json").write_text(report + "\n")
    (args.output / "crash_test.md").write_text(table + "\n")
    print(table)
    print(json.dumps(summary, indent=1))
    print(f"written: {args.output / 'crash_test.json'}, {args.output / 'crash_test.md'}")
    return 1 if result.failures or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
