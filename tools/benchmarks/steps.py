"""Measure training steps over shapes, layouts, precisions and recompute, with `step.py` for each.

    python tools/benchmarks/steps.py --json steps.json
    python tools/benchmarks/steps.py --only base tp2 --rounds 40

Every variant is a run of its own, with one thread a rank, under torchrun if it has several ranks.
Each run interleaves masked, unmasked and transformers' steps. Ratios of variants can be compared.
Seconds of variants need not be comparable, because other work of the machine may have changed
between them. One table is printed and one JSON file is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import Measured, environment, median_seconds, ratio, report, table
from step import AGAIN, MASKED, PLAIN, UNMASKED
from tqdm import tqdm

SMALL_VOCABULARY = ("--vocab-size", "1024")
"""Vocabulary. With 32,000 tokens the output layer would be more than half of a small model's
arithmetic, and would hide the cost of masks in its layers."""
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "base": (1, SMALL_VOCABULARY),
    "vocabulary of 32,000": (1, ()),
    "bfloat16": (1, (*SMALL_VOCABULARY, "--bf16")),
    "full recompute": (1, (*SMALL_VOCABULARY, "--recompute-granularity", "full")),
    "grouped queries": (1, (*SMALL_VOCABULARY, "--num-query-groups", "2")),
    "four microbatches": (
        1,
        (*SMALL_VOCABULARY, "--micro-batch-size", "1", "--num-microbatches", "4"),
    ),
    "two streams": (
        1,
        (
            *SMALL_VOCABULARY,
            *("--micro-batch-size", "1", "--num-microbatches", "4", "--mask-noise-streams", "2"),
        ),
    ),
    "four streams": (
        1,
        (
            *SMALL_VOCABULARY,
            *("--micro-batch-size", "1", "--num-microbatches", "4", "--mask-noise-streams", "4"),
        ),
    ),
    "wide and shallow": (
        1,
        (
            *SMALL_VOCABULARY,
            *("--hidden-size", "1024", "--ffn-hidden-size", "2752"),
            *("--num-attention-heads", "16", "--num-layers", "1"),
        ),
    ),
    "tp2": (2, (*SMALL_VOCABULARY, "--tensor-model-parallel-size", "2")),
    "tp2, sequence parallel": (
        2,
        (*SMALL_VOCABULARY, "--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ),
    "pp2, four microbatches": (
        2,
        (
            *SMALL_VOCABULARY,
            *("--pipeline-model-parallel-size", "2"),
            *("--micro-batch-size", "1", "--num-microbatches", "4"),
        ),
    ),
}
"""Ranks and flags of `step.py` by name; the rest of the shape is `step.py`'s default."""


def command(ranks: int, flags: Sequence[str]) -> list[str]:
    """Return the command that runs `step.py` on a number of ranks."""
    script = [str(Path(__file__).with_name("step.py")), *flags]
    if ranks == 1:
        return [sys.executable, *script]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, *script]


def measure(name: str, extra: Sequence[str]) -> dict[str, Any]:
    """Return the results of `step.py` for a variant.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    ranks, flags = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        argv = [*flags, "--threads", "1", *extra, "--json", str(output)]
        done = subprocess.run(command(ranks, argv), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: step.py {' '.join(argv)} failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    found["environment"]["command"] = f"tools/benchmarks/step.py {' '.join(argv[:-2])}"
    found["measured"] = [Measured(**each) for each in found["measured"]]
    return found


def row(name: str, found: dict[str, Any]) -> list[object]:
    """Return the row of the table for a variant."""
    measured = found["measured"]
    ways = {each.way for each in measured}
    seconds = median_seconds(measured, UNMASKED)
    kept, sends = found["memory"], found["sent"]
    more = {key: sends[MASKED][key] - sends[UNMASKED][key] for key in ("calls", "bytes")}
    return [
        name,
        ratio(measured, MASKED, UNMASKED, clock="cpu_s"),
        ratio(measured, AGAIN, UNMASKED, clock="cpu_s"),
        ratio(measured, MASKED, UNMASKED),
        ratio(measured, AGAIN, UNMASKED),
        ratio(measured, PLAIN, UNMASKED, clock="cpu_s") if PLAIN in ways else "",
        f"{found['floors_s'][UNMASKED]['whole'] / seconds:.2f}",
        f"{kept[MASKED]['saved'] / kept[UNMASKED]['saved']:.3f}",
        f"{kept[MASKED]['folded']:,}",
        f"{kept[MASKED]['apart']:,}",
        f"{kept[MASKED]['peak'] / kept[UNMASKED]['peak']:.3f}",
        f"{sends[UNMASKED]['calls']}, {sends[UNMASKED]['bytes']:,}",
        f"{more['calls']}, {more['bytes']:,}",
    ]


HEAD = [
    *("variant", "masked over unmasked, CPU", "unmasked again, CPU"),
    *("masked over unmasked, clock", "unmasked again, clock", "transformers over unmasked, CPU"),
    *("floor over unmasked", "kept, masked over unmasked", "folded weights, bytes"),
    *("gradients apart, bytes", "peak, masked over unmasked"),
    *("rank 0 sends, calls and bytes", "masks add"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(VARIANTS),
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"of: {'; '.join(VARIANTS)}",
    )
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each way")
    parser.add_argument("--json", type=Path, help="file for every measurement; stdout if none")
    args, extra = parser.parse_known_args(argv)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name in tqdm(args.only, unit="variant", file=sys.stderr):
        try:
            found[name] = measure(name, ["--rounds", str(args.rounds), *extra])
        except RuntimeError as error:  # what the others took minutes for is not lost
            failed[name] = str(error)
            print(error, file=sys.stderr)
    report(
        "steps.py",
        [table(HEAD, [row(name, each) for name, each in found.items()])],
        {"environment": environment("steps.py", argv), "variants": found, "failed": failed},
        args.json,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
