"""The masks of a run at an evaluation: what they keep, in numbers and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megashear.masks.census import Census
from megashear.masks.targets import MaskPart
from megashear.models.kept import KeptUnits
from megashear.monitor import tags
from megashear.monitor.mask_pictures import mask_pictures
from megashear.monitor.sinks import Sink, tolerated
from megashear.shape import ModelShape
from megashear.train.evaluations import Moment, is_due


@dataclass(frozen=True, kw_only=True)
class MaskSurvey:
    """Where the masks stood at an evaluation; equal on every rank."""

    log_alpha: dict[str, Tensor]
    """Whole, by kind, [num_rows, num_units]."""
    kept: KeptUnits
    """What deterministic gates in expected mode keep, which evaluation measures."""
    chances: KeptUnits
    """The chance of every unit to be kept."""
    census: dict[str, Census]
    target_sizes: dict[str, float]
    """Units that a row shall leave open, by kind, at the step that was taken last."""
    changed: dict[str, int]
    """Gates that changed side since the last survey, by kind."""


class SurveyOfMasks:
    """Looks at all masks at every evaluation, and draws them where a sink takes images.

    Args:
        take: makes a survey after a number of steps; collective over the replica's model group and
            the pipeline group.
        parts: what this process holds, by kind; only how rows are counted is read.
        targets: units that each row shall keep, by kind.
        target: shape to end with.
        interval: steps between evaluations within the run; 0 for none.
    """

    def __init__(
        self,
        take: Callable[[int], MaskSurvey],
        parts: Mapping[str, MaskPart],
        targets: Mapping[str, int],
        target: ModelShape,
        interval: int,
    ) -> None:
        self._take = take
        self._parts, self._targets, self._target = parts, targets, target
        self._interval = interval

    def due(self, moment: Moment) -> bool:
        """Return whether masks are to be looked at, once at every step at most."""
        # at the end of the run an evaluation within it may just have done so
        return is_due(self._interval, moment.step) != moment.is_end

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Survey the masks, draw them, and return points by tag."""
        survey = self._take(moment.step)
        show_masks(sink, moment.step, survey, self._parts, self._targets)
        return survey_points(survey, self._target)


def survey_points(survey: MaskSurvey, target: ModelShape) -> dict[str, float]:
    """Return the numbers of a survey, by tag.

    Args:
        survey: of this evaluation.
        target: shape to end with.
    """
    points = {
        tags.EXPECTED_PARAMETERS: survey.chances.expected_params(),
        tags.ACTUAL_PARAMETERS: float(survey.kept.num_params()),
        tags.TARGET_PARAMETERS: float(target.num_params()),
    }
    for kind, counted in survey.census.items():
        points[tags.expected_size(kind)] = counted.expected_open
        points[tags.actual_size(kind)] = counted.actual_open
        points[tags.target_size(kind)] = survey.target_sizes[kind]
        points[tags.undecided(kind)] = counted.num_undecided / counted.num_gates
        points[tags.churn(kind)] = survey.changed[kind] / counted.num_gates
        points[tags.rounding(kind)] = counted.num_changed / counted.num_gates
    return points


def show_masks(
    sink: Sink,
    step: int,
    survey: MaskSurvey,
    parts: Mapping[str, MaskPart],
    targets: Mapping[str, int],
) -> None:
    """Give a picture and a histogram of every kind of mask to a sink that takes images.

    Args:
        sink: of the rank that writes.
        step: steps done.
        survey: of this evaluation.
        parts: of this process, by kind; only how rows are counted is read.
        targets: units that each row shall keep, by kind.
    """
    if not sink.takes_images:
        return
    with tolerated(f"step {step}: masks are not drawn"):
        pictures = mask_pictures(
            {kind: survey.kept.of_kind(kind).numpy() for kind in parts},
            {kind: survey.chances.of_kind(kind).numpy() for kind in parts},
            rows_per_layer={kind: part.rows_per_layer for kind, part in parts.items()},
            targets=targets,
        )
        sink.images(step, {tags.mask_image(kind): each.pixels for kind, each in pictures.items()})
    sink.histograms(
        step, {tags.log_alpha(kind): values.numpy() for kind, values in survey.log_alpha.items()}
    )
