"""`megashear <command>`, also as `python -m megashear` and `torchrun -m megashear`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from megashear import __version__
from megashear.commands.outcome import INTERRUPTED, USAGE, is_first_rank
from megashear.commands.settings import nearest

COMMANDS = {
    "quickstart": "the whole path on this machine, from text to a sheared Hugging Face model",
    "plan": "which layouts fit, how long a run takes and what it costs, before it",
    "preprocess": "jsonl per domain -> tokenised .bin/.idx and held-out sets",
    "convert": "Hugging Face directory -> checkpoint, or back",
    "prune": "learn masks and weights together",
    "cut": "fold the masks into the weights and drop what they closed",
    "pretrain": "train on, from a checkpoint or from fresh weights",
    "evaluate": "held-out loss of a checkpoint, per domain",
    "reference-loss": "what each domain's loss should be, from one model or several",
    "report": "a finished or running run as one HTML page",
    "inspect": "what a checkpoint keeps and drops, or how two differ",
    "plot-mixture": "weights and losses per domain over a run, as a figure",
}
"""What each command does; the module of the same name in megashear.commands, with
underscores, has its ``main``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
        argv: arguments after the program's name; the process's own unless given.

    Returns:
        Exit status: 0, 2 where the call can be mended; others are in docs/reliability.md.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else USAGE
    if command == "--version":
        print(f"megashear {__version__}")
        return 0
    if command == "help":  # the word that many tools have
        return main([*rest[:1], "--help"])
    if command == "completion":
        return _print_completion(rest)
    if command not in COMMANDS:
        if is_first_rank():
            print(
                f"megashear: error: unknown command {command}; nearest: "
                f"{nearest(command, COMMANDS)}; `megashear --help` lists all",
                file=sys.stderr,
            )
        return USAGE
    module = f"megashear.commands.{command.replace('-', '_')}"
    # One module, not all: what a command imports is its own affair.
    try:
        command_main = importlib.import_module(module).main
    except KeyboardInterrupt:  # from here on it is the command's to take
        if is_first_rank():
            print(f"megashear {command}: interrupted; nothing was begun", file=sys.stderr)
        return INTERRUPTED
    status: int = command_main(rest)
    return status


def _print_completion(words: Sequence[str]) -> int:
    from megashear.commands.completion import SHELLS, script

    if len(words) != 1 or words[0] not in SHELLS:
        found = " ".join(words) or "nothing"
        print(
            f"megashear completion: error: found {found}, wanted one of {', '.join(SHELLS)}; "
            f"source what it prints",
            file=sys.stderr,
        )
        return USAGE
    print(script(words[0], COMMANDS))
    return 0


def usage() -> str:
    """The commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megashear <command> [--config run.yaml] [--key value ...] [--dry-run]",
            "       torchrun --nproc-per-node N -m megashear <command> ...",
            "",
            *lines,
            "",
            "`megashear help <command>` lists the keys of a command. For completion of commands,",
            'flags and choices: `eval "$(megashear completion bash)"`, or zsh.',
        ]
    )


def recorded_main() -> int:
    """`main`, which leaves the traceback of an error where torchrun looks for it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main()
    # only here: importing torch takes seconds that --help should not; and its warnings, and those
    # of megatron-core, come while it is imported
    from megashear.monitor.console import configure_logging

    configure_logging(int(os.environ.get("RANK", "0")))
    from megashear.parallel.launch import recorded

    return recorded(main)


if __name__ == "__main__":  # worker processes re-import this module
    raise SystemExit(recorded_main())
