"""Measure the held-out loss of a checkpoint, domain by domain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megashear.commands.parse import parse
from megashear.commands.report import is_first_rank, report, user_errors
from megashear.config import EvaluateRun

PROG = "megashear evaluate"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    config = parse(EvaluateRun, argv, prog=PROG, description=__doc__ or "")
    if config.output is not None and Path(config.output).exists():
        raise ValueError(f"--output {config.output} exists; delete it or name another file")
    # Here, not above: torch and megatron-core take seconds that --help should not.
    from megashear.train import run

    summary = run.evaluate(config)
    report(summary)
    if config.output is not None and is_first_rank():
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {config.output}")
    return 0
