"""Writes one side of a domain, training or held out, so that a killed run can resume."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from megashear.data.context import largest_id
from megashear.data.indexed import read_documents, write_index
from megashear.preprocessing.documents import EncodedSide
from megashear.preprocessing.journal import FOLDER, SideState


class SideWriter:
    """Writes one .bin/.idx; a file holds the lengths of its documents until it is whole."""

    def __init__(self, directory: Path, name: str, dtype: str) -> None:
        """Write nothing yet.

        Args:
            directory: holds the output and the folder of the journal.
            name: name of the output, without ``.bin`` and ``.idx``.
            dtype: numpy type of the tokens.
        """
        self.prefix = directory / name
        self.lengths = directory / FOLDER / f"{name}.lengths"
        self.state = SideState()
        self._dtype = np.dtype(dtype)

    @property
    def _text(self) -> Path:
        return Path(f"{self.prefix}.bin")

    def reaches(self, state: SideState) -> bool:
        """Return whether the files exist and are at least as long as they were at ``state``."""
        return all(
            file.is_file() and file.stat().st_size >= wanted
            for file, wanted in self._sizes(state).items()
        )

    def open(self, state: SideState) -> None:
        """Resume at ``state``; what was written after it is cut off."""
        self.state = state
        for file, size in self._sizes(state).items():
            file.touch()
            os.truncate(file, size)
        self._streams = (self._text.open("ab"), self.lengths.open("ab"))

    def add(self, side: EncodedSide) -> None:
        """Write documents and note their lengths and largest id."""
        if not len(side.lengths):
            return
        assert side.tokens.dtype == self._dtype, (side.tokens.dtype, self._dtype)
        for stream, numbers in zip(self._streams, (side.tokens, side.lengths)):
            stream.write(numbers.tobytes())
        old, (largest, place) = self.state, largest_id(side.tokens)
        self.state = replace(
            old,
            documents=old.documents + len(side.lengths),
            tokens=old.tokens + len(side.tokens),
        )
        if largest > old.largest_id:
            self.state = replace(self.state, largest_id=largest, largest_id_at=old.tokens + place)

    def sync(self) -> None:
        """Bring everything written to the disk."""
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Write the index, which completes the side."""
        self.sync()
        for stream in self._streams:
            stream.close()
        write_index(Path(f"{self.prefix}.idx"), self.lengths, self._dtype.name)

    def move_text(self, chosen: int, other: SideWriter) -> None:
        """Write both sides anew, with document ``chosen`` and its copies on the empty ``other``.

        Only a domain of few documents can have an empty side, so there is never much to copy.
        """
        self.close()
        source = self.prefix.with_name(self.prefix.name + "~whole")  # no domain's name has a ~
        for suffix in (".bin", ".idx"):
            Path(f"{self.prefix}{suffix}").rename(f"{source}{suffix}")
        self.open(SideState())
        text = next(itertools.islice(read_documents(source), chosen, None))
        for tokens in read_documents(source):
            side = other if np.array_equal(tokens, text) else self
            side.add(EncodedSide(tokens, np.array([len(tokens)], dtype=np.int32)))
        for suffix in (".bin", ".idx"):
            Path(f"{source}{suffix}").unlink()

    def _sizes(self, state: SideState) -> dict[Path, int]:
        return {
            self._text: state.tokens * self._dtype.itemsize,
            self.lengths: state.documents * np.dtype(np.int32).itemsize,
        }
