"""Fold the learned masks into the weights and drop the closed units, or cut by scores."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import CutConfig
from megashear.files.output import check_writable

PROG = "megashear cut"


@user_errors(PROG, interrupted="nothing of --output is left; the same command starts anew")
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(CutConfig, argv, prog=PROG, description=__doc__ or "", check=check)
    refuse_torchrun(PROG)
    check_writable("--output", config.output)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.checkpoint.shear import cut_by_scores, cut_checkpoint

    if config.scores is None:
        report(cut_checkpoint(config.load, config.output, exact_target=config.exact_target))
    else:
        report(cut_by_scores(config.load, config.output, config.scores, config))
    return 0


def check(config: CutConfig) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "load", "scores")
    check_new(config, "output")
    from megashear.checkpoint.shear import check_cut, check_cut_by_scores

    if config.scores is None:
        check_cut(config.load)
    else:
        check_cut_by_scores(config.load, config.scores, config)
