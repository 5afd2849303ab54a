"""Directories that appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(output: Path | str) -> Iterator[Path]:
    """Give an empty directory beside ``output`` that becomes ``output`` when the block ends well.

    If the block raises, the directory is removed and ``output`` never existed.

    Raises:
        ValueError: ``output`` exists already: nothing is ever overwritten.
    """
    output = Path(output).absolute()
    check_absent(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the output, or the rename would not be one step.
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp lets nobody else read
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def check_absent(output: Path | str) -> None:
    """Refuse an output that is there already, before long work for it.

    Raises:
        ValueError: it exists.
    """
    output = Path(output).absolute()
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; choose another output or remove it first")
