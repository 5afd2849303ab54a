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
"""Exit status where the user can mend the call."""
CANNOT_SAVE = 3
"""Exit status where an output could not be written; checkpoints that were there are whole."""
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that only a file that is written meets."""
_OF_DISKS = {errno.EIO, errno.ESTALE}
"""Errors of a disk or a server, which a read meets too: no call is to blame, so that they keep
their traceback unless it is known that an output met them."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as a shell would say it."""
UNSAVED = "checkpoints in --save are whole; the same command with --resume resumes from the last"
"""What a Ctrl-C leaves of a run that does not take it for a request to save."""


class UsageError(ValueError):
    """The command line or its YAML file cannot be understood."""


def user_errors(prog: str, *, interrupted: str = "nothing was written") -> Callable[[Main], Main]:
    """Wrap a command so that what a user can mend is one line on stderr, exit status 2.

    That is ValueError and what the file system says of a file that the user named; every other
    exception keeps its traceback. An output that cannot be written is one line too, exit status 3,
    and so is a run whose loss or weights are not finite, exit status 4. Ctrl-C is one line as well,
    exit status 130. What all ranks of a host find is printed by the first of them, see `_refuse`.

    Logging is configured on the way, so that whatever a command calls can speak.

    Args:
        prog: the command as the user typed it, ``megashear prune``.
        interrupted: what a Ctrl-C leaves of the command, and how to resume; a KeyboardInterrupt
            that carries a text of its own is reported with that instead.
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
    """Print an error on one line, and leave it where torchrun reports it last.

    Most errors are met by all ranks. The first rank of a host prints its own at once and leaves;
    torchrun then ends the others, which wait for that. A rank that is still there later was the
    only one to meet the error, and prints it with its number.
    """
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" on rank {rank}"
    line = f"{prog}: error{where}: {' '.join(message.splitlines())}"
    if os.environ.get("LOCAL_RANK", rank) != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run's own handler would only note it
        time.sleep(PATIENCE_S)
    # torchrun ends with a traceback of its own; the file puts this line below it
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    print(line, file=sys.stderr, flush=True)


PATIENCE_S = 10.0
"""Seconds that a rank leaves the first one of its host to meet the same error."""


def refuse_torchrun(prog: str) -> None:
    """Refuse to run in more than one process, where each would write the same output.

    Raises:
        UsageError: torchrun started several.
    """
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(
            f"{prog} runs in one process and torchrun started {world_size}; start it without"
        )


def is_first_rank() -> bool:
    """Whether this process is rank 0, or no torchrun started it."""
    return os.environ.get("RANK", "0") == "0"


def tell_stop(prog: str, result: RunResult, *, resumes: bool) -> None:
    """Print what a run that did not end as it should has saved and how to resume, on rank 0.

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
            f"{prog}: the last {steps} skipped, so that none shows the weights to be good; look at "
            f"the held-out losses, and at the text of {text}{way_on}",
            file=sys.stderr,
            flush=True,
        )
    if result.stopped is None:
        return
    outcome = f"saved step {result.step} in {result.checkpoint}; {again} resumes from it"
    if result.checkpoint is None:
        outcome = f"step {result.step} is not saved, for --save is not given"
    elif result.held_out:  # the signal came while a run that was done was evaluated
        outcome = f"step {result.step}, the run's last, is evaluated and in {result.checkpoint}"
    print(f"{prog}: stopped, for {result.stopped}; {outcome}", file=sys.stderr, flush=True)


def report(summary: object) -> None:
    """Print what a command did, on rank 0: a mapping as JSON, None not at all."""
    if summary is None or not is_first_rank():
        return
    if isinstance(summary, Mapping):
        summary = json.dumps(summary, indent=2, default=str)
    print(summary, flush=True)
