"""Measure how important each neuron, head, hidden dimension and layer of a model is."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_there
from megashear.config import ScoreRun

PROG = "megashear score"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(ScoreRun, argv, prog=PROG, description=__doc__ or "", check=check)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.train.score import score

    report(score(config, command=["score", *argv]))
    report(f"wrote {config.output}")
    return 0


def check(config: ScoreRun) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "load", "load_hf", "data_path")
    from megashear.train.score import prepare_score

    prepare_score(config)
