"""TensorBoard: every tag's name, and the file they go to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
"""Attention and MLP parameters that the masks expect to keep, at evaluations."""
EVAL_MEAN_LOSS = "eval/mean-loss"
"""Held-out loss, nats per token, mean over domains, each counted once."""
EVAL_MEAN_ERROR = "eval/mean-standard-error"
"""Standard error of the same, nats per token."""
FULL_MEAN_LOSS = "eval/full-mean-loss"
"""The same over all held-out text, at the end of a run."""
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

EVALUATION_SHARE = "system/evaluation-share"
"""Share of the wall time so far that evaluations within the run took, between 0 and 1."""


def expected_sparsity(kind: str) -> str:
    """Share of a kind's units that the masks expect to close, between 0 and 1."""
    return f"prune/expected-sparsity/{kind}"


def target_sparsity(kind: str) -> str:
    """Share of a kind's units that shall be closed at this step, between 0 and 1."""
    return f"prune/target-sparsity/{kind}"


def linear_multiplier(kind: str) -> str:
    """Multiplier of a kind's distance from its target."""
    return f"prune/lambda1/{kind}"


def quadratic_multiplier(kind: str) -> str:
    """Multiplier of the square of a kind's distance from its target."""
    return f"prune/lambda2/{kind}"


def mixture_weight(domain: str) -> str:
    """Share of the samples that a domain is owed, between 0 and 1; 0 once it is exhausted."""
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


class TensorBoardSink:
    """Writes scalars to a directory of event files; without a directory it takes them and is still.

    Args:
        directory: where event files go, made if need be; None writes none. Give one rank a
            directory, not all.
        purge_step: first step that this process will write; points that an earlier process left
            at it or later are hidden, so that a resumed run does not overlap itself.
        suffix: end of the event file's name.
    """

    def __init__(
        self, directory: str | Path | None, *, purge_step: int | None = None, suffix: str = ""
    ) -> None:
        self._writer: SummaryWriter | None = None
        if directory is not None:
            # Here, not above: it imports torch, and most commands log nothing.
            from torch.utils.tensorboard import SummaryWriter

            self._directory = Path(directory)
            self._writer = SummaryWriter(
                str(directory), purge_step=purge_step, filename_suffix=suffix
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write points at ``step``, optimizer steps done, by tag; a NaN is shown as a gap."""
        if self._writer is None:
            return
        for tag, value in values.items():
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, step)

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
