"""Write one HTML page about a finished or running run: megashear report RUN [RUN ...]."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import ReportConfig

PROG = "megashear report"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(
        ReportConfig, argv, prog=PROG, description=__doc__ or "", positional=("run",), check=check
    )
    refuse_torchrun(PROG)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.report.write import write_report

    written = write_report(
        config.run,
        tensorboard_dirs=config.tensorboard_dir,
        output=config.output,
        overwrite=config.overwrite,
        images=config.images,
        title=config.title,
        source=config.source_loss,
    )
    report("\n".join(f"wrote {path}" for path in written))
    return 0


def check(config: ReportConfig) -> None:
    """Refuse what the command would refuse before it reads.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "run", "tensorboard_dir")
    check_new(config, "images", *(() if config.overwrite else ("output",)))
