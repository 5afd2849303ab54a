"""Iterations of a checkpoint made from others."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from megashear.checkpoint.description import iteration_name, read_description, write_description
from megashear.files import integrity


def copy_iteration(source: Path, step: int, root: Path | None = None) -> Path:
    """Copy one as that of another step, beside it or in ``root``: whole, and rightly named."""
    copy = (root or source.parent) / iteration_name(step)
    shutil.copytree(source, copy)
    write_description(copy, dataclasses.replace(read_description(source), iteration=step))
    integrity.write(copy)
    return copy
