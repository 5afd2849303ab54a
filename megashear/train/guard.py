"""Judge which steps are taken: not those whose loss or gradients are not finite, nor spikes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megashear.config import TrainConfig

logger = logging.getLogger(__name__)

_MEMORY = 0.9
"""Weight of the past in the running mean of losses: about the last ten steps."""
_WARM_UP = 10
"""Steps before a loss can be a spike: the first ones fall fast."""


@dataclass
class StepGuard:
    """Judges steps before weights move; its state is part of every checkpoint.

    Every rank runs the same guard on the same numbers, so all skip the same steps.

    Args:
        train: the flags.
    """

    train: TrainConfig
    skipped: int = 0
    """Steps skipped since the run began."""
    in_a_row: int = 0
    """Steps skipped since the last one taken."""
    not_finite: int = 0
    """Steps of this process that were not finite, since the last one that was. No checkpoint
    keeps the number: whoever starts again has seen how the run ended."""
    mean_loss: float = 0.0
    """Running mean of the losses of steps taken, nats per token."""
    num_losses: int = 0
    """Losses in the running mean."""

    def judge(self, loss: float, norms: Mapping[str, float]) -> str | None:
        """Return why a step must not be taken; None if it may.

        Args:
            loss: mean over the global batch, nats per token, equal on every rank.
            norms: gradient norms by what they are of; finite on every rank or on none.
        """
        reason = self._not_finite(loss, norms)
        self.not_finite = self.not_finite + 1 if reason else 0
        reason = reason or self._spike(loss)
        if reason is None:
            self.in_a_row = 0
            self.mean_loss += (1 - _MEMORY) * (loss - self.mean_loss) if self.num_losses else loss
            self.num_losses += 1
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    @property
    def gives_up(self) -> bool:
        """Whether more steps in a row were skipped than allowed."""
        return self.in_a_row > self.train.max_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "mean_loss": self.mean_loss,
            "num_losses": self.num_losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where the guard that gave ``state`` stood."""
        self.skipped = int(state["skipped"])
        self.in_a_row = int(state["in_a_row"])
        self.mean_loss = float(state["mean_loss"])
        self.num_losses = int(state["num_losses"])

    def _not_finite(self, loss: float, norms: Mapping[str, float]) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        for what, norm in norms.items():
            if not math.isfinite(norm):
                return f"the gradient norm of {what} is {norm}"
        return None

    def _spike(self, loss: float) -> str | None:
        factor = self.train.loss_spike_factor
        if factor and self.num_losses >= _WARM_UP and loss > factor * self.mean_loss:
            return (
                f"the loss {loss:.4f} is above --loss-spike-factor {factor:g} times the mean "
                f"{self.mean_loss:.4f} of the last steps"
            )
        return None
