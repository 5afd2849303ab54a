"""How far preprocessing has come, for people."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0
"""Seconds between log lines where there is no terminal for a bar."""
LONG_BYTES = 16_000_000
"""Size of a text, bytes, from which on a line says that nothing moves while it is tokenised."""


class _LogStream(io.TextIOBase):
    """Stream that logs what tqdm writes."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logger.info("preprocess: %s", line)
        return len(text)


class Meter:
    """Bytes of input read, their rate and the time left, with documents per second.

    Packed files count as they lie on the disk, the only size that is known beforehand.
    """

    def __init__(self, total: int, show: bool | None) -> None:
        """Begin at 0.

        Args:
            total: size of all input files, bytes.
            show: show a bar on stderr; None shows it on a terminal, and elsewhere logs a line every
                ``LOG_INTERVAL_S``.
        """
        self.domain = ""
        """Name of the domain being read, shown after the bar."""
        self._stream = None if show or sys.stderr.isatty() else _LogStream()
        options: dict[str, Any] = {}
        if self._stream is not None:
            options = {
                "file": self._stream,
                "bar_format": "{n_fmt}B of {total_fmt}B | {rate_fmt} | {remaining} left{postfix}",
                "mininterval": LOG_INTERVAL_S,
                "delay": LOG_INTERVAL_S,
                "miniters": 1,
                "smoothing": 0,  # the rate since the start
                "leave": False,
            }
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=show is False, **options)
        self._documents = self._in_file = 0
        self.close = self._bar.close

    def skip(self, num_bytes: int) -> None:
        """Count what an earlier run did, which does not count for the rate."""
        if not self._bar.disable:
            self._bar.initial += num_bytes
            self._bar.last_print_n += num_bytes
            self._bar.n += num_bytes

    def begin(self, place: str, num_bytes: int) -> None:
        """Say that a text is so long that neither bar nor log move while it is tokenised.

        Args:
            place: file and number of the document.
            num_bytes: size of the document.
        """
        if num_bytes >= LONG_BYTES and not self._bar.disable:
            line = f"{place}: {num_bytes / 1e6:.0f} MB in one piece, counted when it is tokenised"
            tqdm.write(line, file=self._stream or sys.stderr)

    def add(self, num_documents: int, position: int) -> None:
        """Count documents, up to a position in the current file, bytes."""
        self._documents += num_documents
        rate = self._documents / max(self._bar.format_dict["elapsed"], 1e-6)
        self._bar.set_postfix_str(f"{self.domain}, {rate:.0f} docs/s", refresh=False)
        self._bar.update(position - self._in_file)
        self._in_file = position

    def end_file(self, size: int) -> None:
        """Count the rest of a file of ``size`` bytes."""
        self._bar.update(size - self._in_file)
        self._in_file = 0
