"""How far preprocessing has come, for people."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0
"""Seconds between lines where there is no terminal for a bar."""
LONG_BYTES = 16_000_000
"""Size of text from which on it is said that nothing moves until it is tokenised, bytes."""


class Meter:
    """Bytes of input read, their rate and the time left; with documents per second.

    Compressed files count as they lie on the disk, the only size that is known beforehand.
    """

    def __init__(self, total: int, *, bar: bool, log: bool) -> None:
        """Begin at 0.

        Args:
            total: size of all input files, bytes.
            bar: show a bar on stderr.
            log: where there is no bar, log a line every ``LOG_INTERVAL_S``.
        """
        self.domain = ""
        """What is being read, shown behind the bar."""
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=not bar)
        self._total, self._log = total, log and not bar
        self._done = self._skipped = self._documents = 0
        self._in_file = 0
        self._start = self._logged = time.monotonic()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def skip(self, num_bytes: int) -> None:
        """Count what an earlier run did, which says nothing of the rate."""
        self._skipped += num_bytes
        self._done += num_bytes
        if not self._bar.disable:
            self._bar.initial += num_bytes
            self._bar.last_print_n += num_bytes
            self._bar.n += num_bytes
            self._bar.refresh()

    def begin(self, place: str, num_bytes: int) -> None:
        """Tell of a text that is so long that neither bar nor log move while it is tokenised.

        Args:
            place: file and number of the document.
            num_bytes: its size.
        """
        if num_bytes < LONG_BYTES:
            return
        told = f"{place}: {num_bytes / 1e6:.0f} MB in one piece, counted when it is tokenised"
        if not self._bar.disable:
            self._bar.write(told, file=sys.stderr)
            self._bar.refresh()
        elif self._log:
            logger.info("preprocess %s: %s", self.domain, told)

    def add(self, num_documents: int, position: int) -> None:
        """Count documents, up to a position in the current file, bytes."""
        self._documents += num_documents
        rate = self._documents / max(time.monotonic() - self._start, 1e-6)
        self._bar.set_postfix_str(f"{self.domain}, {rate:.0f} docs/s", refresh=False)
        self._move(position - self._in_file)
        self._in_file = position

    def end_file(self, size: int) -> None:
        """Count the rest of a file of ``size`` bytes."""
        self._move(size - self._in_file)
        self._in_file = 0

    def _move(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if self._log and now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            rate = (self._done - self._skipped) / (now - self._start)  # bytes/s
            left = (self._total - self._done) / rate if rate else float("inf")
            time_left = f"{left / 60:.0f} min left" if left >= 60 else "less than a minute left"
            logger.info(
                "preprocess %s: %.1f of %.1f MB | %.2f MB/s | %.0f docs/s | %s",
                *(self.domain, self._done / 1e6, self._total / 1e6, rate / 1e6),
                *(self._documents / (now - self._start), time_left),
            )
