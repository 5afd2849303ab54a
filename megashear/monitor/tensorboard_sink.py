"""Write points, pictures and histograms to TensorBoard's event files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTOGRAM_BINS = 64
"""Number of bars between the least and the largest value; TensorBoard shows fewer."""


class TensorBoardSink:
    """Writes to a directory of event files; without a directory it writes nothing.

    Args:
        directory: where event files go, made if missing; None writes none. Give only one rank a
            directory.
        purge_step: first step that this process will write; points that an earlier process left
            at it or later are hidden, so that a resumed run does not overlap itself.
        suffix: end of the event file's name.
        layout: tags by chart and category, shown as custom scalars.
        texts: Markdown by tag, shown in the text tab, at the step before ``purge_step``.
    """

    def __init__(
        self,
        directory: str | Path | None,
        *,
        purge_step: int | None = None,
        suffix: str = "",
        layout: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        self._writer: SummaryWriter | None = None
        self.takes_images = directory is not None
        self.name = f"--tensorboard-dir {directory}"
        if directory is not None:
            # Imported here, because it brings torch, and most commands log nothing.
            from torch.utils.tensorboard import SummaryWriter

            self._directory = Path(directory)
            self._writer = SummaryWriter(
                str(directory), purge_step=purge_step, filename_suffix=suffix
            )
            for tag, text in (texts or {}).items():
                self._writer.add_text(tag, text, max(0, (purge_step or 0) - 1))
            if layout:
                self._writer.add_custom_scalars(
                    {
                        category: {
                            # TensorBoard takes tags for patterns, and matches their beginnings
                            chart: ["Multiline", [f"{re.escape(tag)}$" for tag in of_chart]]
                            for chart, of_chart in charts.items()
                        }
                        for category, charts in layout.items()
                    }
                )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write points at ``step``, optimizer steps done, by tag; a NaN is shown as a gap."""
        if self._writer is None:
            return
        for tag, value in values.items():
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, step)

    def images(self, step: int, values: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """Write images at ``step`` by tag: red, green and blue, [height, width, 3]."""
        if self._writer is None:
            return
        for tag, pixels in values.items():
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def histograms(self, step: int, values: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Write the distribution of values at ``step`` by tag; of any shape."""
        if self._writer is None:
            return
        for tag, numbers in values.items():
            self._writer.add_histogram(tag, numbers, step, bins=HISTOGRAM_BINS)

    def replace(self, step: int, values: Mapping[str, float]) -> None:
        """Write points that an earlier process may already have written at this step.

        `purge_step` cannot hide these points alone: it hides all tags. They are written to a file
        of their own, which replaces the earlier file.
        """
        if self._writer is None:
            return
        self.flush()  # a reader goes from file to file and not back
        suffix = f".at-{step}"
        for path in self._directory.glob(f"events.out.tfevents.*{suffix}"):
            path.unlink()
        again = TensorBoardSink(self._directory, suffix=suffix)
        again.scalars(step, values)
        again.close()

    def flush(self) -> None:
        """Write what is buffered, which would be lost if this process were killed."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is still buffered; no scalars may follow."""
        if self._writer is not None:
            self._writer.close()
