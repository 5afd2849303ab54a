"""Learn masks and weights together, under tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import UNSAVED, report, status_of, tell_stop, user_errors
from megashear.commands.parse import parse
from megashear.config import PretrainRun, PruneRun

PROG = "megashear prune"


@user_errors(PROG, interrupted=UNSAVED)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    config = parse(PruneRun, argv, prog=PROG, description=__doc__ or "")
    then = None
    if config.then_pretrain is not None:
        then = parse(
            PretrainRun,
            ["--config", config.then_pretrain],
            prog=f"{PROG} --then-pretrain",
            description="",
        )
    # Here, not above: torch and megatron-core take seconds that --help should not.
    from megashear.train.run import prune

    reached = prune(config, then, command=["prune", *argv])
    report(reached)
    tell_stop(PROG, reached, resumes=config.train.resume)
    return status_of(reached)
