"""Print how a model continues texts: greedy, or drawn at a temperature."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.commands.outcome import report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_there
from megashear.config import GenerateRun

PROG = "megashear generate"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(GenerateRun, argv, prog=PROG, description=__doc__ or "", check=check)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    from megashear.train.generate import generate

    report("\n----\n".join(generate(config)))
    return 0


def check(config: GenerateRun) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "load", "load_hf", "tokenizer_model", "prompt_file")
    from megashear.train.generate import prepare_generate

    prepare_generate(config)
