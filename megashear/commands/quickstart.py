"""The whole path on this machine: text, a source LLaMA, pruning, cut, recovery, Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import check_new, check_there, parse
from megashear.config import QuickstartConfig
from megashear.files.output import check_writable

PROG = "megashear quickstart"


@user_errors(
    PROG,
    interrupted="what is finished stays in --output; choose another, or remove it, to start anew",
)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    config = parse(QuickstartConfig, argv, prog=PROG, description=__doc__ or "", check=check)
    refuse_torchrun(PROG)
    # Here, not above: they take time that --help should not.
    from megashear.parallel import device
    from megashear.quickstart.pipeline import Quickstart
    from megashear.quickstart.recipe import FULL, SHORT

    check_writable("--output", config.output)
    data = None if config.data is None else Path(config.data)
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data} is not a directory of jsonl files, one a domain")
    if device.has_cuda():
        report(
            "this machine has a GPU, and the quickstart runs on the CPU on purpose: its ranks are "
            "two everywhere, and so are its numbers; docs/tutorial.md has the commands for GPUs"
        )
    recipe = SHORT if config.short else FULL
    Quickstart(output=Path(config.output), recipe=recipe, seed=config.seed, data=data).run()
    return 0


def check(config: QuickstartConfig) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can mend.
    """
    check_there(config, "data")
    check_new(config, "output")
