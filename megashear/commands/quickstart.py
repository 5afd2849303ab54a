"""Run every stage on this machine: text, a source LLaMA, pruning, cut, recovery, Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import QuickstartConfig
from megashear.files.output import check_writable

PROG = "megashear quickstart"


@user_errors(
    PROG,
    interrupted="finished stages are kept in --output; remove it, or choose another, to start anew",
)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(QuickstartConfig, argv, prog=PROG, description=__doc__ or "", check=check)
    refuse_torchrun(PROG)
    # Imported here, because they take time that --help should not take.
    from megashear.parallel import device
    from megashear.quickstart.pipeline import Quickstart
    from megashear.quickstart.recipe import FULL, SHORT

    check_writable("--output", config.output)
    data = None if config.data is None else Path(config.data)
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data} is not a directory of jsonl files, one for each domain")
    if device.has_cuda():
        report(
            "this machine has a GPU, but the quickstart uses the CPU on purpose: two ranks on "
            "every machine make its numbers comparable; docs/tutorial.md has commands for GPUs"
        )
    recipe = SHORT if config.short else FULL
    Quickstart(output=Path(config.output), recipe=recipe, seed=config.seed, data=data).run()
    return 0


def check(config: QuickstartConfig) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "data")
    check_new(config, "output")
