"""Measure the held-out losses of a model by domain, or its scores in downstream tasks."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_there
from megashear.config import EvaluateRun

PROG = "megashear evaluate"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(EvaluateRun, argv, prog=PROG, description=__doc__ or "", check=check)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    if config.tasks:
        from megashear.train.tasks import evaluate_tasks

        report(evaluate_tasks(config, command=["evaluate", *argv]))
    else:
        from megashear.train.measure import evaluate

        report(evaluate(config))
    if config.output is not None:
        report(f"wrote {config.output}")
    return 0


def check(config: EvaluateRun) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "load", "load_hf", "data_path", "include_path", "tokenizer_model")
    if config.tasks:
        from megashear.train.tasks import prepare_tasks

        prepare_tasks(config)
    else:
        from megashear.train.measure import prepare_evaluate

        prepare_evaluate(config)
