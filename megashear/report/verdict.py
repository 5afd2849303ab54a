"""Whether the masks of a pruning run have settled, by thresholds that the docs name."""

from __future__ import annotations

from dataclasses import dataclass

from megashear.masks.kinds import KINDS
from megashear.monitor import tags
from megashear.report.kept import MaskReading
from megashear.report.record import RunRecord

LIMITS = {
    "undecided": 0.10,
    "changed side since the evaluation before": 0.02,
    "changed by rounding to the target": 0.05,
    "apart from the target": 0.05,
}
"""Largest share of a kind's gates (of the last, of a row's units) of a mask that has settled. A
single gate beyond a limit is always tolerated, because with few gates it is already a large share.
The last two leave room for the clamp of log_alpha: a gate that is as closed as it gets is open with
a chance of .047."""
UNDECIDED, CHURN, ROUNDING, DISTANCE = LIMITS


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measure of one kind of mask."""

    kind: str
    what: str
    """One of `LIMITS`."""
    share: float
    """Of the kind's gates; of the distance, of a row's units."""
    allowance: float
    """Share that is always tolerated: one gate of the kind; of the distance, a tenth of a unit."""

    @property
    def is_settled(self) -> bool:
        """Whether it is within its limit."""
        return self.share <= max(LIMITS[self.what], 1.001 * self.allowance)

    def __str__(self) -> str:
        name, limit = KINDS[self.kind].units, f"(at most {100 * LIMITS[self.what]:.0f} %"
        share = f"{100 * self.share:.1f} %"
        if self.what == DISTANCE:
            return (
                f"the expected number of {name} is {share} of a row away from the target {limit})"
            )
        verb = "are " if self.what == UNDECIDED else ""
        return f"{share} of the {name} {verb}{self.what} {limit} in settled masks)"


def findings(record: RunRecord) -> list[Finding]:
    """Return every measure of every kind of mask; none where no checkpoint has masks."""
    return [] if record.masks is None else list(_measured(record, record.masks))


def verdict(record: RunRecord, *, most: int = 3) -> str:
    """Return in a sentence or two whether the masks have settled; empty without masks.

    Args:
        record: of a pruning run.
        most: measures to name that are beyond their limit, the worst first.
    """
    found = findings(record)
    if not found:
        return ""
    restless = [one for one in found if not one.is_settled]
    churned = any(one.what == CHURN for one in found)
    without = "" if churned else " Nothing is known of gates that changed side between evaluations."
    if not restless:
        return f"The masks have settled: every kind is within all limits.{without}"
    worst = sorted(restless, key=lambda one: -one.share / LIMITS[one.what])
    listed = "; ".join(map(str, worst[:most]))
    more = f"; and {len(worst) - most} more" if len(worst) > most else ""
    if record.state != "finished":
        return f"The masks have not settled yet: {listed}{more}.{without}"
    return (
        f"The masks had not settled when the run ended: {listed}{more}. The cut changes what was "
        f"trained; more steps (--train-iters), or a higher --mask-lr, let them settle.{without}"
    )


def _measured(record: RunRecord, masks: MaskReading) -> list[Finding]:
    found = []
    for kind, one in masks.kinds.items():
        shares = {
            UNDECIDED: one.num_undecided / one.num_gates,
            ROUNDING: one.num_changed / one.num_gates,
        }
        churn = record.points.get(tags.churn(kind))
        if churn:
            shares[CHURN] = churn[max(churn)]
        found += [
            Finding(kind=kind, what=what, share=share, allowance=1 / one.num_gates)
            for what, share in shares.items()
        ]
        distance = abs(one.expected_open - one.target) / one.num_units
        allowance = 0.1 / one.num_units
        found.append(Finding(kind=kind, what=DISTANCE, share=distance, allowance=allowance))
    return found
