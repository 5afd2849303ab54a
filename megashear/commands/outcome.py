"""What a command tells its user: errors on one line, and what it did."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megashear.files.integrity import SaveError
from megashear.files.output import WAYS_OUT, UnwritableError
from megashear.monitor.console import configure_logging
from megashear.train.result import RunResult
from megashear.train.stops import DIVERGED, DivergedError

Main = Callable[[Sequence[str]], int]
"""A command: arguments after its name in, exit status out."""

USAGE = 2
"""Exit status if the user can correct the call."""
CANNOT_SAVE = 3
"""Exit status if an output could not be written; earlier checkpoints are unharmed."""
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that occur only in writing a file."""
_OF_DISKS = {errno.EIO, errno.ESTALE}
"""Errors of a disk or a server, which also occur in reading. No call is to blame, so they keep
their traceback unless they are known to come from an output."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, the same as a shell's."""
UNSAVED = "checkpoints in --save are whole; the same command with --resume resumes from the last"
"""What to say after a Ctrl-C on a run that does not save for it."""


class UsageError(ValueError):
    """The command line or its YAML file cannot be understood."""


def user_errors(prog: str, *, interrupted: str = "nothing was written") -> Callable[[Main], Main]:
    """Wrap a command so that an error that a user can correct is one line on stderr.

    Its exit status is 2 for ValueError and for errors of the file system about a file that the user
    named, 3 for an output that cannot be written, 4 for a run whose loss or weights are not finite,
    and 130 for Ctrl-C. Every other exception keeps its traceback. An error that all ranks of a host
    meet is printed by the first of them, see `_refuse`. The wrapper also configures logging.

    Args:
        prog: the command as the user typed it, ``megashear prune``.
        interrupted: what a Ctrl-C leaves of the command, and how to resume; replaced by the text of
            the KeyboardInterrupt if it has one.
    """

    def wrap(main: Main) -> Main:
        @functools.wraps(main)
        def wrapped(argv: Sequence[str]) -> int:
            configure_logging(int(os.environ.get("RANK", "0")))
            try:
                return main(argv)
            except (ValueError, FileExistsError, FileNotFoundError) as error:
                _refuse(prog, str(error))
                if isinstance(error, UnwritableError):
                    return CANNOT_SAVE
            except OSError as error:
                is_of_writing = error.errno in _OF_WRITING
                is_known = error.errno in WAYS_OUT.keys() - _OF_DISKS
                if not is_known or not (error.filename or is_of_writing):
                    raise
                where = f"{os.fspath(error.filename)}: " if error.filename else ""
                _refuse(prog, f"{where}{error.strerror}")
                return CANNOT_SAVE if is_of_writing else USAGE
            except SaveError as error:
                _refuse(prog, str(error))
                return CANNOT_SAVE
            except DivergedError as error:
                _refuse(prog, str(error))
                return DIVERGED
            except KeyboardInterrupt as error:
                if is_first_rank():
                    print(f"{prog}: interrupted; {str(error) or interrupted}", file=sys.stderr)
                return INTERRUPTED
            return USAGE

        return wrapped

    return wrap


def _refuse(prog: str, message: str) -> None:
    """Print an error on one line, and write it where torchrun reports it last.

    All ranks meet most errors. The first rank of a host prints the error at once and exits;
    torchrun then ends the other ranks, which wait for that. A rank that is not ended was the only
    one to meet the error, and prints it with its number.
    """
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" on rank {rank}"
    line = f"{prog}: error{where}: {' '.join(message.splitlines())}"
    if os.environ.get("LOCAL_RANK", rank) != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run's own handler would not exit
        time.sleep(PATIENCE_S)
    # torchrun ends with its own traceback and prints this file below it
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    print(line, file=sys.stderr, flush=True)


PATIENCE_S = 10.0
"""Seconds that a rank waits for the first rank of its host to meet the same error."""


def refuse_torchrun(prog: str) -> None:
    """Refuse to run in more than one process, where each would write the same output.

    Raises:
        UsageError: torchrun started several.
    """
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(
            f"{prog} runs in one process and torchrun started {world_size}; use no torchrun"
        )


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or was not started by torchrun."""
    return os.environ.get("RANK", "0") == "0"


def report_stop(prog: str, result: RunResult, *, resumes: bool) -> None:
    """Print, on rank 0, what a run that stopped early or skipped steps saved and how to resume.

    Args:
        prog: the command as the user typed it.
        result: what the run reached.
        resumes: whether the command had --resume.
    """
    if not is_first_rank():
        return
    again = "the same command" if resumes else "the same command with --resume"
    if result.skipped_last:
        alone = result.skipped_last == 1
        steps = "step was" if alone else f"{result.skipped_last} steps were"
        text = "that step" if alone else "these steps"
        way_on = f"; {again} takes the weights as they are" if result.checkpoint else ""
        print(
            f"{prog}: the last {steps} skipped, so no later step shows that the weights are good; "
            f"look at the held-out losses, and at the text of {text}{way_on}",
            file=sys.stderr,
            flush=True,
        )
    if result.stopped is None:
        return
    outcome = f"saved step {result.step} in {result.checkpoint}; {again} resumes from it"
    if result.checkpoint is None:
        outcome = f"step {result.step} is not saved, because --save is not given"
    elif result.held_out:  # the signal came in the last evaluation
        outcome = f"the last step, {result.step}, is evaluated and saved in {result.checkpoint}"
    print(f"{prog}: stopped because {result.stopped}; {outcome}", file=sys.stderr, flush=True)


def report(summary: object) -> None:
    """Print on rank 0 what a command did; a mapping as JSON, None not at all."""
    if summary is None or not is_first_rank():
        return
    if isinstance(summary, Mapping):
        summary = json.dumps(summary, indent=2, default=str)
    print(summary, flush=True)
