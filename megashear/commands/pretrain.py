"""Train on language modelling, from a checkpoint or from fresh weights."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import UNSAVED, report, report_stop, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_run_paths
from megashear.config import PretrainRun

PROG = "megashear pretrain"


@user_errors(PROG, interrupted=UNSAVED)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(PretrainRun, argv, prog=PROG, description=__doc__ or "", check=check)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.train.run import pretrain

    reached = pretrain(config, command=["pretrain", *argv])
    report(reached.summary())
    report_stop(PROG, reached, resumes=config.train.resume)
    return reached.exit_status


def check(config: PretrainRun) -> None:
    """Refuse what the run would refuse before its processes meet.

    Raises:
        ValueError: anything a user can correct.
    """
    check_run_paths(config)
    from megashear.train.prepare import prepare

    prepare(config, is_dry_run=True)
