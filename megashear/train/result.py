"""What a run reached: fields for the code that asks, a summary for people and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STANDARD_ERROR = "standard error"
"""Key of the standard errors in what commands print and write."""
_EXIT_STATUS = "exit status"

Losses = Mapping[str, Mapping[str, float]]
"""Nats per token, by mode of the evaluation and domain."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where a run stands when it ends, and why it ends."""

    step: int
    """Steps done."""
    stopped: str | None
    """Why the run was stopped; None where nothing stopped it."""
    exit_status: int
    """What the process should return."""
    skipped_last: int
    """Steps that were skipped at the end for numbers that are not finite."""
    held_out: Losses
    """Loss of all held-out text; empty where the run did not come to its end."""
    held_out_errors: Mapping[str, Mapping[str, float | None]]
    """Standard errors of ``held_out``, None for one that is not known."""
    eval_sequences: int
    """Held-out sequences per domain in an evaluation within the run."""
    evaluation_share: float
    """Share of the wall time that evaluations took."""
    checkpoint: Path | None
    """The last iteration that was saved."""
    tensorboard: str | None
    """Directory of the event files."""
    ended_early: str | None = None
    """Which text ran out before the last step; None where none did."""
    pruning: RunResult | None = None
    """What the pruning before it in the same job reached."""

    def summary(self) -> dict[str, Any]:
        """Return the result as plain values, in words that people and scripts read."""
        if self.pruning is None:
            return self._values()
        parts = {"pruning": self.pruning._values(), "continued pretraining": self._values()}
        for part in parts.values():
            del part[_EXIT_STATUS]
        return parts | {_EXIT_STATUS: self.exit_status}

    def _values(self) -> dict[str, Any]:
        values = {
            "step": self.step,
            "stopped": self.stopped,
            _EXIT_STATUS: self.exit_status,
            "steps skipped at the end": self.skipped_last,
            "held-out loss": self.held_out,
            STANDARD_ERROR: self.held_out_errors,
            "evaluation": {
                "sequences per domain": self.eval_sequences,
                "share of wall time": round(self.evaluation_share, 4),
            },
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "tensorboard": self.tensorboard,
        }
        return values if self.ended_early is None else values | {"ended early": self.ended_early}
