"""RunSummary: what one run did to a model, as checkpoints of later stages keep it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megashear.files.structured import check_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What a run did to a model; None, or empty, where its checkpoint does not say it."""

    stage: str
    """Kind of run: "prune", "pretrain" ..."""
    steps: int
    samples: int | None = None
    """Training samples read."""
    seq_length: int | None = None
    """Tokens of a sample, at the end of the run."""
    drawn: dict[str, int] = field(default_factory=dict)
    """Samples by domain."""
    constraint: str | None = None
    """What held masks to their target."""
    distill_from: str | None = None
    """Teacher, as the run named it."""
    held_out_loss: dict[str, dict[str, float]] = field(default_factory=dict)
    """Losses of the run's last evaluation, by mode and domain, nats per token."""
    held_out_standard_error: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Their standard errors."""

    @property
    def tokens(self) -> int | None:
        """Return the tokens that the run was trained on."""
        if self.samples is None or self.seq_length is None:
            return None
        return self.samples * self.seq_length

    @classmethod
    def read(cls, values: object) -> RunSummary:
        """Return an entry of a checkpoint's history; fields of later releases are passed over.

        Raises:
            TypeError: a value has another type than its field, or is missing.
        """
        check_fields(cls, values)
        assert isinstance(values, dict), "check_fields refuses all else"
        names = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
