"""The losses that a report holds to each other: of a run, of its source, of its references."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from megashear.files.structured import read_json_object
from megashear.monitor import tags
from megashear.monitor.figures import domains_of
from megashear.report.record import RESULTS, RunRecord

SOURCE_MODEL = "source"
"""Name of the model before pruning in a quickstart's results."""


@dataclass(frozen=True, kw_only=True)
class MeanLoss:
    """A held-out loss, nats per token, mean over domains, each counted once."""

    domains: Mapping[str, float]
    """Loss of each domain."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Standard error of each loss, as far as they are known."""
    words: str = ""
    """What it was measured on."""
    on_subsample: bool = False
    """Whether that is the part of the held-out text that evaluations within a run read."""

    @property
    def mean(self) -> float:
        """The mean loss."""
        return sum(self.domains.values()) / len(self.domains)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None where that of a domain is not known."""
        if not self.domains.keys() <= self.errors.keys():
            return None
        return math.hypot(*(self.errors[name] for name in self.domains)) / len(self.domains)

    def __str__(self) -> str:
        return with_error(self.mean, self.error)


def with_error(loss: float, error: float | None) -> str:
    """Return a loss as text, with its standard error where it is known: ``2.114 +- 0.012``."""
    return f"{loss:.3f}" + ("" if error is None else f" +- {error:.3f}")


def final_loss(record: RunRecord) -> MeanLoss | None:
    """Return the held-out loss that says most of a run; None where there is none."""
    if record.description is not None:
        known = record.description.known
        for mode, words in (
            ("loss", "over all held-out text"),
            ("exact", "over all held-out text, cut to the target"),
        ):
            losses = known.held_out_loss.get(mode)
            if losses and all(map(math.isfinite, losses.values())):
                errors = known.held_out_standard_error.get(mode, {})
                return MeanLoss(domains=losses, errors=known_errors(errors), words=words)
    points = record.points
    steps = points.get(tags.EVAL_MEAN_LOSS)
    if not steps:
        return None
    step = max(steps)
    words = f"at step {step:,}, on the run's subsample"
    losses = _at(points, tags.eval_loss, step)
    if not losses or losses.keys() != {*domains_of(points)}:
        return MeanLoss(domains={"mean": steps[step]}, words=words, on_subsample=True)
    errors = known_errors(_at(points, tags.eval_error, step))
    return MeanLoss(domains=losses, errors=errors, words=words, on_subsample=True)


def references_of(record: RunRecord) -> dict[str, float]:
    """Return the reference loss of each domain, as far as the run compared losses with them."""
    points, found = record.points, {}
    for name in domains_of(points):
        losses, excess = points.get(tags.eval_loss(name), {}), points.get(tags.eval_excess(name))
        if excess:
            step = max(excess)
            if step in losses:
                found[name] = losses[step] - excess[step]
    return found


def mean_reference(record: RunRecord) -> float | None:
    """Return the mean of the reference losses; None where a domain has none."""
    references = references_of(record)
    if not references or references.keys() != {*domains_of(record.points)}:
        return None
    return sum(references.values()) / len(references)


def check_domains(source: MeanLoss, record: RunRecord, file: Path | str) -> None:
    """Refuse losses of other domains than a run's: the gap between two such means says nothing.

    Raises:
        ValueError: with the domains of both.
    """
    loss = final_loss(record)
    if loss is None or loss.domains.keys() in ({"mean"}, source.domains.keys()):
        return
    raise ValueError(
        f"--source-loss {file} has losses of {', '.join(sorted(source.domains))}, and the run of "
        f"{', '.join(sorted(loss.domains))}; evaluate the source on the run's --data-path"
    )


def source_loss(file: Path | str | None, folder: Path | None) -> MeanLoss | None:
    """Read the loss of the model before pruning; None where nobody says it.

    Args:
        file: of --source-loss, which ``megashear evaluate --output`` wrote.
        folder: of a quickstart, whose results have its source.

    Raises:
        ValueError: the file holds no losses by domain, or standard errors that are no numbers.
    """
    if file is not None:
        read = read_json_object(file, f"--source-loss {file}")
        losses = read.get("held-out loss")
        if not _are_losses(losses):
            raise ValueError(
                f"--source-loss {file} holds no losses by domain under 'held-out loss'; give what "
                f"`megashear evaluate --load SOURCE --output FILE` wrote"
            )
        errors = _checked_errors(read.get("standard error"), f"--source-loss {file}")
        return MeanLoss(domains=losses, errors=errors, words="source")
    if folder is None or not (folder / RESULTS).is_file():
        return None
    for model in read_json_object(folder / RESULTS).get("models", []):
        if model.get("name") == SOURCE_MODEL:
            errors = _checked_errors(model.get("errors"), str(folder / RESULTS))
            return MeanLoss(domains=model["losses"], errors=errors, words="source")
    return None


def _checked_errors(found: Any, file: str) -> dict[str, float]:
    """Return the standard errors that are known, of a file that anyone may have written."""
    found = {} if found is None else found
    wrong = (
        [f"{name}: {error!r}" for name, error in found.items() if not _is_error(error)]
        if isinstance(found, dict)
        else [repr(found)]
    )
    if wrong:
        raise ValueError(
            f"{file} holds a standard error that is no number ({wrong[0][:100]}); a number or null "
            f"is wanted for each domain; write it again with `megashear evaluate --output FILE`"
        )
    return known_errors(found)


def _is_error(found: Any) -> bool:
    return found is None or isinstance(found, int | float)


def _are_losses(found: Any) -> TypeGuard[dict[str, float]]:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(value, int | float) and math.isfinite(value) for value in found.values())
    )


def known_errors(errors: Mapping[str, float | None]) -> dict[str, float]:
    """Return the standard errors that are known."""
    return {
        name: error for name, error in errors.items() if error is not None and math.isfinite(error)
    }


def _at(points: Mapping[str, Mapping[int, float]], tag: Any, step: int) -> dict[str, float]:
    names = domains_of(points)
    return {name: points[tag(name)][step] for name in names if step in points.get(tag(name), {})}


BEFORE_PRUNING = "the model before pruning"
"""Name of the source where a loss is compared with it."""
SAME_LOSS = 5e-4
"""Nats; losses that differ less are one line, for three digits are shown."""


def levels_of(record: RunRecord, source: MeanLoss | None) -> dict[str, float]:
    """Return the losses that a run's are held to, by name; a source that is the reference once."""
    reference = mean_reference(record)
    levels = {}
    if source is not None:
        levels[BEFORE_PRUNING] = source.mean
    if reference is not None and (source is None or abs(reference - source.mean) > SAME_LOSS):
        levels["the mean of the references"] = reference
    return levels
