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
    "quickstart": "run every stage on this machine, from text to a sheared Hugging Face model",
    "plan": "estimate which layouts fit, how long a run takes and what it costs",
    "preprocess": "tokenize text by domain into .bin/.idx and held-out sets",
    "convert": "turn a Hugging Face directory into a checkpoint, or back",
    "score": "measure how important each unit of a model is",
    "prune": "learn masks and weights together",
    "cut": "fold the masks in and drop the closed units, or keep the units of highest score",
    "pretrain": "train a checkpoint further, or fresh weights from the start",
    "finetune": "teach a model to answer, from conversations",
    "evaluate": "measure held-out losses of a model by domain, or its scores in tasks",
    "generate": "print how a model continues a text",
    "reference-loss": "find the loss each domain should reach, from one model or several",
    "report": "write one HTML page about a finished or running run",
    "inspect": "show what a checkpoint keeps and drops, or how two differ",
    "plot-mixture": "draw weights and losses by domain over a run",
}
"""What each command does, for `--help`. Its ``main`` is in the module of the same name in
megashear.commands, with underscores for dashes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
        argv: arguments after the program's name; the process's own unless given.

    Returns:
        Exit status: 0, or 2 if the user can correct the call; docs/reliability.md has the others.
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
    # Import one command alone: others may import what is slow or missing.
    try:
        command_main = importlib.import_module(module).main
    except KeyboardInterrupt:  # later the command itself handles it
        if is_first_rank():
            print(f"megashear {command}: interrupted before it began", file=sys.stderr)
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
    """Return a line for each command, and how to call them."""
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
    """Run `main`, and leave the traceback of an error where torchrun looks for it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main()
    # Imported here, because torch takes seconds that --help should not. Logging comes first,
    # because torch and megatron-core warn while they are imported.
    from megashear.monitor.console import configure_logging

    configure_logging(int(os.environ.get("RANK", "0")))
    from megashear.parallel.launch import recorded

    return recorded(main)


if __name__ == "__main__":  # worker processes re-import this module
    raise SystemExit(recorded_main())
