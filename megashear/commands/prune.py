"""Learn masks and weights together, under tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.checkpoint.description import holds_iterations
from megashear.commands.outcome import UNSAVED, report, report_stop, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_outputs, check_run_paths
from megashear.config import PretrainRun, PruneRun

PROG = "megashear prune"


@user_errors(PROG, interrupted=UNSAVED)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(PruneRun, argv, prog=PROG, description=__doc__ or "", check=check)
    then = _then(config)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.train.run import prune

    reached = prune(config, then, command=["prune", *argv])
    report(reached.summary())
    report_stop(PROG, reached, resumes=config.train.resume)
    return reached.exit_status


def check(config: PruneRun) -> None:
    """Refuse what the run would refuse before its processes meet.

    Raises:
        ValueError: anything a user can correct.
    """
    then = _then(config)
    # a job of both that is resumed after its pruning reads nothing of the pruning run
    if then is None or not (config.train.resume and holds_iterations(then.train.save)):
        check_run_paths(config)
    if then is not None:
        check_outputs(then.train, " of --then-pretrain")
    from megashear.train.run import prepare_prune

    prepare_prune(config, then, is_dry_run=True)


def _then(config: PruneRun) -> PretrainRun | None:
    """Return the run that follows in the same job."""
    if config.then_pretrain is None:
        return None
    return parse(
        PretrainRun,
        ["--config", config.then_pretrain],
        prog=f"{PROG} --then-pretrain",
        description="",
    )
