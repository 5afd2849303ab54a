"""Curves, tables and figures of `quality.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measuring import table

from megashear.monitor.drawing import legend, new_figure, style
from megashear.monitor.figures import COLOURS, DASHES

_MOST_ABOVE = 2.0
"""Nats above the source up to which curves are drawn, or all but the first would look alike."""
Curve = Sequence[tuple[int, float]]
"""Tokens so far and held-out loss, by rising tokens."""
Found = Mapping[str, Any]
"""What one arm reached with one seed, as `quality.py` writes it."""


class Spread(NamedTuple):
    """Several measurements of one number."""

    mean: float
    error: float | None
    """Standard error of the mean; None of a single measurement."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" +- {self.error:.3f}" if self.error is not None else "")


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard error."""
    if len(values) < 2:
        return Spread(values[0], None)
    return Spread(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


def first_tokens(curve: Curve, loss: float) -> float | None:
    """Return after how many tokens a curve first reaches a loss; None if it never does.

    Between two points the curve is a line. Nothing is known before its first point, which counts if
    it lies below the loss already: the answer is then too large, never too small.
    """
    for number, (tokens, found) in enumerate(curve):
        if found <= loss:
            if not number:
                return float(tokens)
            before, above = curve[number - 1]
            return before + (tokens - before) * (above - loss) / (above - found)
    return None


def tokens_saved(arm: Sequence[Found], other: Sequence[Found]) -> list[float] | None:
    """Return by seed how many times fewer recovery tokens an arm needs for another's last loss.

    Both losses are read off the curves. None if a seed of the arm never reaches it, or no seed is
    in both.
    """
    by_seed = {each["seed"]: each for each in other}
    ratios = []
    for each in arm:
        if each["seed"] in by_seed:
            tokens, loss = by_seed[each["seed"]]["curve"][-1]
            needed = first_tokens(each["curve"], loss)
            if needed is None:
                return None
            ratios.append(tokens / needed)
    return ratios or None


def by_arm(runs: Sequence[Found], budget: str) -> dict[str, list[Found]]:
    """Return the runs of each arm with one budget, by their seeds."""
    found: dict[str, list[Found]] = {}
    for each in sorted(runs, key=lambda each: each["seed"]):
        if each["budget"] == budget:
            found.setdefault(each["arm"], []).append(each)
    return found


def mean_loss(run: Found) -> float:
    """Return the mean over domains, each with the same weight."""
    return statistics.mean(run["loss"].values())


def losses_table(runs: Sequence[Found], source: Mapping[str, float], budget: str) -> str:
    """Return what each arm reached, best first: mean, spread, every seed, the worst domain.

    The worst domain is that whose loss is furthest above the source's.
    """
    arms = by_arm(runs, budget)
    rows = []
    for found in sorted(arms.values(), key=lambda found: spread(list(map(mean_loss, found))).mean):
        losses = [mean_loss(each) for each in found]
        tokens = [found[0]["tokens"][phase] / 1e6 for phase in ("masks", "recovery")]
        excess = {
            domain: statistics.mean(each["loss"][domain] - loss for each in found)
            for domain, loss in source.items()
        }
        worst = max(excess, key=lambda domain: excess[domain])
        rows.append(
            [
                found[0]["label"],
                " + ".join(f"{each:.2f}" for each in tokens),
                f"{found[0]['flops'] / 1e12:.2f}",
                str(spread(losses)),
                ", ".join(f"{loss:.3f}" for loss in losses),
                f"{worst} {excess[worst]:+.3f}",
            ]
        )
    head = ["arm", "M tokens: masks + recovery", "Tflop", "held-out loss", "each seed", "worst"]
    return table(head, rows)


def pairs_table(runs: Sequence[Found], pairs: Sequence[tuple[str, str]]) -> str:
    """Return differences of pairs of arms at equal tokens, seed by seed, and tokens saved."""
    arms, rows = by_arm(runs, "tokens"), []
    for first, second in pairs:
        if not {first, second} <= arms.keys():
            continue
        losses = [{e["seed"]: mean_loss(e) for e in arms[name]} for name in (first, second)]
        both = sorted(losses[0].keys() & losses[1].keys())
        if not both:
            continue
        ratios = tokens_saved(arms[first], arms[second])
        rows.append(
            [
                f"{arms[first][0]['label']} - {arms[second][0]['label']}",
                str(spread([losses[0][seed] - losses[1][seed] for seed in both])),
                ", ".join(f"{losses[0][seed] - losses[1][seed]:+.3f}" for seed in both),
                "never" if ratios is None else f"{statistics.mean(ratios):.1f}",
            ]
        )
    head = ["difference", "nats", "each seed", "times fewer recovery tokens"]
    return table(head, rows)


def draw(runs: Sequence[Found], source: Mapping[str, float], output: Path) -> None:
    """Draw held-out loss over tokens, the mean over seeds of each arm at equal tokens."""
    figure = new_figure(6.4)
    figure.patch.set(facecolor="white", alpha=1.0)
    panel = figure.subplots()
    for number, found in enumerate(by_arm(runs, "tokens").values()):
        points = [_over_all_tokens(each) for each in found]
        tokens = [place / 1e6 for place, _ in points[0]]
        means = [statistics.mean(loss for _, loss in together) for together in zip(*points)]
        panel.plot(
            tokens,
            means,
            DASHES[number // len(COLOURS)],
            color=COLOURS[number % len(COLOURS)],
            label=found[0]["label"],
            linewidth=1.4,
        )
    level = statistics.mean(source.values())
    panel.axhline(level, color="black", linewidth=0.8, label="source")
    style(panel, xlabel="M tokens, masks and recovery", ylabel="held-out loss, nats per token")
    panel.set_ylim(level - 0.1, level + _MOST_ABOVE)
    legend(figure, loc="outside lower center")
    figure.savefig(output)


def _over_all_tokens(run: Found) -> list[tuple[int, float]]:
    masks = run["tokens"]["masks"]
    return [(masks + tokens, loss) for tokens, loss in run["curve"]]
