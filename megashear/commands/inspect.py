"""Show what a checkpoint keeps and drops, or how two differ: megashear inspect CKPT [OTHER]."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import InspectConfig

PROG = "megashear inspect"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(
        InspectConfig,
        argv,
        prog=PROG,
        description=__doc__ or "",
        positional=("load", "compare"),
        check=check,
    )
    refuse_torchrun(PROG)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.report.inspection import inspect

    report(
        inspect(
            config.load,
            config.compare,
            mode=config.mode,
            image=config.image,
            json_file=config.json,
            weights=config.weights,
            contents=config.verify_checkpoint,
        )
    )
    return 0


def check(config: InspectConfig) -> None:
    """Refuse what the command would refuse before it reads.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "load", "compare")
    check_new(config, "image", "json")
