"""Find the pointers that Git LFS leaves in place of files it did not fetch."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024
"""A pointer is shorter, bytes. Source: git-lfs, docs/spec.md."""


def is_pointer(path: Path | str) -> bool:
    """Return whether a file is a pointer of Git LFS; what is not there is none."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size >= _MAX_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def refuse_pointer(path: Path | str, name: str | None = None) -> None:
    """Refuse a pointer of Git LFS where a file's content is wanted.

    Args:
        path: of the file.
        name: what messages call it; by default the path.

    Raises:
        ValueError: the file is one; the way out is named.
    """
    if is_pointer(path):
        raise ValueError(
            f"{name or path} is a pointer of Git LFS, not the file itself; run `git lfs install` "
            f"and `git lfs pull` in the repository it is in, or download the file"
        )
