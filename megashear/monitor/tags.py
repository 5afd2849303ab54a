"""TensorBoard: every tag's name, and the files they go to."""

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
"""Bars between the least and the largest value; TensorBoard shows fewer."""

LM_LOSS = "train/lm-loss"
"""Language-modelling loss, nats per token, mean over the log window."""
GRAD_NORM = "train/grad-norm"
"""Gradient norm of the weights before clipping."""
LEARNING_RATE = "train/learning-rate"
"""Learning rate of the weights."""
PENALTY = "prune/penalty"
"""What the constraint adds to the loss, summed over mask kinds."""
MASK_GRAD_NORM = "prune/grad-norm"
"""Gradient norm of log_alpha and multipliers before clipping."""
MASK_LEARNING_RATE = "prune/learning-rate"
"""Learning rate of log_alpha and multipliers."""
EXPECTED_PARAMETERS = "prune/expected-parameters"
"""Parameters of the whole model that the masks expect to keep, at evaluations."""
ACTUAL_PARAMETERS = "prune/actual-parameters"
"""Parameters of the whole model that the gates open in evaluation keep, at evaluations."""
TARGET_PARAMETERS = "prune/target-parameters"
"""Parameters of the target."""
EVAL_MEAN_LOSS = "eval/mean-loss"
"""Held-out loss, nats per token, mean over domains, each counted once."""
EVAL_MEAN_ERROR = "eval/mean-standard-error"
"""Standard error of the same, nats per token."""
FULL_MEAN_LOSS = "eval/full-mean-loss"
"""The same over all held-out text, at the end of a run."""
EXACT_MEAN_LOSS = "eval/exact-mean-loss"
"""Held-out mean loss under exactly the target's gates, those that are cut."""
RELAXED_MEAN_LOSS = "eval/relaxed-mean-loss"
"""Held-out mean loss under gates sampled as in training, where --eval-relaxed-masks asks for it."""
DISCRETISATION_GAP = "eval/discretisation-gap"
"""Held-out mean loss under exactly the target's gates, less that under the deterministic ones."""
TOKENS_PER_SECOND = "system/tokens-per-second"
"""Over all devices, training alone."""
TOKENS_PER_SECOND_PER_DEVICE = "system/tokens-per-second-per-device"
"""The same, per process."""
SAVE_SECONDS = "system/save-seconds"
"""From the beginning of a save until the checkpoint is visible, at the step that was saved."""
SAVE_STALL_SECONDS = "system/save-stall-seconds"
"""The part of it during which training stood still."""
SKIPPED_STEPS = "train/skipped-steps"
SECONDS_PER_STEP = "system/seconds-per-step"
"""Mean over the log window, training alone."""

MODEL_FLOPS_UTILISATION = "system/model-flops-utilisation"
"""Arithmetic that the model needs, a second and device, over the device's dense bfloat16 peak."""
MEMORY_ALLOCATED = "system/memory-allocated"
"""Most that tensors took on a CUDA device so far, GB, of the rank that has most."""
MEMORY_RESERVED = "system/memory-reserved"
"""Most that torch's allocator took from a CUDA device so far, GB, of the rank that has most."""
MEMORY_RESIDENT = "system/memory-resident"
"""Memory that a process has on its host, GB, of the rank that has most."""
MEMORY = {
    "allocated": MEMORY_ALLOCATED,
    "reserved": MEMORY_RESERVED,
    "resident": MEMORY_RESIDENT,
}
"""By the names of `device.memory_in_use`."""
PAUSES = ("evaluation", "checkpoint")
"""What training stands still for."""
STEP_PARTS = ("data", "forward-backward", "communication", "optimizer")
"""What the time of a step goes to."""


def expected_sparsity(kind: str) -> str:
    """Share of a kind's units that the masks expect to close, between 0 and 1."""
    return f"prune/expected-sparsity/{kind}"


def target_sparsity(kind: str) -> str:
    """Share of a kind's units that shall be closed at this step, between 0 and 1."""
    return f"prune/target-sparsity/{kind}"


def expected_size(kind: str) -> str:
    """Sum of a row's chances to be open, units, mean over rows, at evaluations."""
    return f"prune/expected-size/{kind}"


def actual_size(kind: str) -> str:
    """Gates of a row that evaluation leaves open, mean over rows, at evaluations."""
    return f"prune/actual-size/{kind}"


def target_size(kind: str) -> str:
    """Units that a row shall leave open at this step, at evaluations."""
    return f"prune/target-size/{kind}"


def undecided(kind: str) -> str:
    """Share of a kind's gates whose chance to be open is between .1 and .9, at evaluations."""
    return f"prune/undecided/{kind}"


def churn(kind: str) -> str:
    """Share of a kind's gates that changed side since the last evaluation."""
    return f"prune/churn/{kind}"


def rounding(kind: str) -> str:
    """Share of a kind's gates that the exact target puts on another side, at evaluations."""
    return f"prune/rounding/{kind}"


def mask_image(kind: str) -> str:
    """Picture of a kind's gates, at evaluations."""
    return f"prune/mask/{kind}"


def log_alpha(kind: str) -> str:
    """Histogram of a kind's log_alpha, at evaluations."""
    return f"prune/log-alpha/{kind}"


def linear_multiplier(kind: str) -> str:
    """Multiplier of a kind's distance from its target."""
    return f"prune/lambda1/{kind}"


def quadratic_multiplier(kind: str) -> str:
    """Multiplier of the square of a kind's distance from its target."""
    return f"prune/lambda2/{kind}"


def mixture_weight(domain: str) -> str:
    """Share of the samples after a step that a domain is owed, between 0 and 1; 0 once it is
    exhausted. At step 0, at every log line, and wherever it moves."""
    return f"mix/weight/{domain}"


def mixture_share(domain: str) -> str:
    """Share of the samples drawn so far that came from a domain, between 0 and 1."""
    return f"mix/share/{domain}"


def mixture_epoch(domain: str) -> str:
    """Times a domain's training text was read, 1.5 for once and a half."""
    return f"mix/epoch/{domain}"


def eval_loss(domain: str) -> str:
    """Held-out loss of a domain over the run's subsample, nats per token."""
    return f"eval/loss/{domain}"


def eval_error(domain: str) -> str:
    """Standard error of a domain's held-out loss, nats per token, from its sequences."""
    return f"eval/standard-error/{domain}"


def full_loss(domain: str) -> str:
    """Held-out loss of a domain over all its held-out text, at the end of a run."""
    return f"eval/full-loss/{domain}"


def eval_excess(domain: str) -> str:
    """Held-out loss of a domain less its reference loss, nats per token."""
    return f"eval/excess/{domain}"


def part_seconds(part: str) -> str:
    """Time that a part of a step takes, seconds, mean over ranks; parts are apart from another."""
    return f"system/step-seconds/{part}"


def part_share(part: str) -> str:
    """Share of the wall time since this start for which training stood still, 0 to 1."""
    return f"system/{part}-share"


def loss_term(name: str) -> str:
    """Mean of a term of the loss beside the cross entropy, on training text, without its weight."""
    return f"train/term/{name}"


class TensorBoardSink:
    """Writes to a directory of event files; without a directory it takes all and is still.

    Args:
        directory: where event files go, made if need be; None writes none. Give one rank a
            directory, not all.
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
            # Here, not above: it imports torch, and most commands log nothing.
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
        """Write points that an earlier process may have written at this very step already.

        `purge_step` cannot hide those alone: it hides all tags. They have a file of their own,
        which takes the place of the earlier one.
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
        """Write what is held back, which is lost if this process is killed."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is still held back; no scalars may follow."""
        if self._writer is not None:
            self._writer.close()
