"""Say under each figure of a run what the figure shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megashear.masks.kinds import KINDS
from megashear.monitor import tags
from megashear.monitor.figures import domains_of
from megashear.report.curves import (
    MEMORY_NAMES,
    kinds_of,
    parts_of,
)
from megashear.report.page import (
    large,
)
from megashear.report.record import RunRecord


def loss_caption(record: RunRecord, points: Mapping[str, Mapping[int, float]]) -> str:
    """Return the sentence under the loss."""
    losses = list(points[tags.LM_LOSS].values())
    words = (
        f"Loss on training text, blue, goes from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"
    )
    held_out = list(points.get(tags.EVAL_MEAN_LOSS, {}).values())
    if held_out:
        words += f", on held-out text, orange, from {held_out[0]:.2f} to {held_out[-1]:.2f}"
    if record.stage == "prune":
        words += "; it may rise while more and more of the model is closed, and falls after that"
    if tags.EVAL_MEAN_ERROR in points:
        words += "; the band is one standard error"
    return words + "."


def training_caption(record: RunRecord, points: Mapping[str, Mapping[int, float]]) -> str:
    """Return the sentence under learning rate and gradients."""
    rates = list(points.get(tags.LEARNING_RATE, {}).values())
    norms = sorted(points.get(tags.GRAD_NORM, {}).values())
    words = "Learning rate and norm of the gradients at every log line"
    if rates:
        words += f"; the rate of the weights goes to {max(rates):.1e} and ends at {rates[-1]:.1e}"
    if norms:
        words += f", the median norm is {norms[len(norms) // 2]:.2f}"
    skipped = record.points.get(tags.SKIPPED_STEPS, {})
    if skipped and max(skipped.values()) > 0:
        words += f"; {max(skipped.values()):.0f} steps were skipped, because they were not finite"
    return words + "."


def sparsity_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    """Return the sentence under the share that is pruned."""
    gaps = []
    for kind in kinds_of(points):
        expected = list(points[tags.expected_sparsity(kind)].values())[-1]
        target = list(points[tags.target_sparsity(kind)].values())[-1]
        gaps.append((abs(expected - target), kind, expected, target))
    _, kind, expected, target = max(gaps)
    return (
        f"The share of each kind to be pruned, dashed, grows from 0 to its target, and the share "
        f"that the masks expect to close, blue, follows it; farthest at the end are "
        f"{KINDS[kind].units}, {expected:.3f} where {target:.3f} is asked for."
    )


def settling_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    """Return the sentence under undecided gates and churn."""
    last = {
        kind: list(points[tags.undecided(kind)].values())[-1]
        for kind in kinds_of(points)
        if tags.undecided(kind) in points
    }
    most = max(last, key=lambda kind: last[kind])
    return (
        f"The share of gates whose chance to be open lies between 10 and 90 %, and the share that "
        f"opened or closed since the evaluation before: both fall as the masks settle; at the end "
        f"{100 * last[most]:.1f} % of the {KINDS[most].units} are undecided, the most of all kinds."
    )


def mixture_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    """Return the sentence under the domains."""
    shares = {
        name: list(points[tags.mixture_weight(name)].values())[-1] for name in domains_of(points)
    }
    most = next(iter(shares))
    words = (
        f"The share of each domain in the text to come; {most} has most at the end, "
        f"{100 * shares[most]:.0f} %"
    )
    if any(tags.eval_loss(name) in points for name in shares):
        words += ". Below, the held-out loss of each domain"
    if any(tags.eval_excess(name) in points for name in shares):
        words += (
            ", and how far it is above its reference: domains that are far above get a larger share"
        )
    return words + "."


def timeline_caption(record: RunRecord) -> str:
    """Return the sentence under the steps done over time."""
    times = "once" if len(record.sessions) == 1 else f"{len(record.sessions)} times"
    return (
        f"Steps done over time: the steeper, the faster. The run was started {times}; each grey "
        f"field is one start, circles are evaluations and triangles are checkpoints."
    )


def speed_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    """Return the sentence under speed and memory."""
    rates = sorted(points[tags.TOKENS_PER_SECOND].values())
    words = (
        f"Training tokens per second over all processes, without evaluations and checkpoints; the "
        f"median is {large(rates[len(rates) // 2])}"
    )
    if parts_of(points):
        words += "; below, what the time of a step goes to"
    utilisation = sorted(points.get(tags.MODEL_FLOPS_UTILISATION, {}).values())
    if utilisation:
        middle = 100 * utilisation[len(utilisation) // 2]
        words += f"; the median share of the device's peak arithmetic is {middle:.1f} %"
    if any(tag in points for tag in MEMORY_NAMES):
        words += "; last, memory of the rank that has most"
    return words + "."


def pruned_layers(layers: Sequence[int]) -> str:
    """Return a sentence that names the pruned layers."""
    if not layers:
        return "All layers are kept."
    numbers = ", ".join(map(str, layers))
    return f"Layer {numbers} is pruned." if len(layers) == 1 else f"Layers {numbers} are pruned."
