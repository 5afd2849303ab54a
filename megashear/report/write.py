"""Do what `megashear report` does: read runs, describe them, write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megashear.files import durable
from megashear.files.output import check_writable, writing
from megashear.monitor.drawing import require_matplotlib
from megashear.report.losses import check_domains, source_loss
from megashear.report.page import page, save_figures
from megashear.report.record import RESULTS, read_runs
from megashear.report.story import headline, sections_of, title_of

NAME = "report.html"
"""The page, where no other name is given."""


def write_report(
    run: Sequence[Path | str],
    *,
    tensorboard_dirs: Sequence[Path | str] = (),
    output: Path | str | None = None,
    overwrite: bool = False,
    images: Path | str | None = None,
    title: str | None = None,
    source: Path | str | None = None,
) -> list[Path]:
    """Write the report of one run or several that belong together.

    Nothing that a run left is changed. The page appears in one step.

    Args:
        run: what `record.read_runs` takes.
        tensorboard_dirs: where event files lie, if not where the run says.
        output: the page; ``report.html`` in the first of ``run`` unless given.
        overwrite: replace the page if it is there.
        images: directory to write every figure to as well.
        title: of the page.
        source: losses of the model before pruning, as `losses.source_loss` reads them.

    Returns:
        What was written: the page first, then the figures.

    Raises:
        ValueError: no run there, an output exists, matplotlib is not installed, or the losses
            of the source cannot be read.
    """
    path = Path(run[0]) / NAME if output is None else Path(output)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {path} ends in {path.suffix!r}; wanted .html")
    if path.exists() and not overwrite:
        raise ValueError(
            f"--output {path} exists; add --overwrite to replace it, or choose another"
        )
    if images is not None and Path(images).exists():
        raise ValueError(f"--images {images} exists; choose another directory or remove it first")
    check_writable("--output", path)
    if images is not None:
        check_writable("--images", images)
    require_matplotlib()
    records = read_runs(run, tensorboard_dirs)
    folder = Path(run[0]) if (Path(run[0]) / RESULTS).is_file() else None
    before = source_loss(source, folder)
    if source is not None and before is not None:
        check_domains(before, records[-1], source)
    sections = sections_of(records, folder, before)
    lead = headline(records, before)
    content = page(title or title_of(records), lead, sections, now=records[0].now)
    with writing("--output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, content)
    if images is None:
        return [path]
    with writing("--images", images):
        return [path, *save_figures(sections, Path(images))]
