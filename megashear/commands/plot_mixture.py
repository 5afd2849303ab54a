"""Draw weights and held-out losses of every domain over a run, from its TensorBoard files."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import PlotMixtureConfig

PROG = "megashear plot-mixture"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(PlotMixtureConfig, argv, prog=PROG, description=__doc__ or "", check=check)
    refuse_torchrun(PROG)
    # Imported here, because --help should not need the packages that read events and draw.
    from megashear.monitor.figures import plot_mixture

    plot_mixture(config.tensorboard_dir, config.output, title=config.title)
    report(f"wrote {config.output}")
    return 0


def check(config: PlotMixtureConfig) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "tensorboard_dir")
    check_new(config, "output")
