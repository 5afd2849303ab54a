"""Uniform shapes within a budget, nearest to the source's proportions first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megashear.config import TargetConfig
from megashear.masks.kinds import EXTENTS
from megashear.masks.target_flags import target_shape
from megashear.masks.targets import check_reachable, target_flag
from megashear.models import loadable
from megashear.planning.budget import Budget
from megashear.shape import ModelShape

MULTIPLE = 128
"""Hidden size and neurons are multiples of this, as the tiles of GPU kernels are."""
TOLERANCE = 0.05
"""Share of the parameters aimed at by which a shape may miss them, on either side."""
LEAST_USED = 0.8
"""Least share of the tightest limit that a shape must take, where limits alone are given."""
DIVISOR = 4
"""Layers and key/value heads that divide by this can be divided over 2 and 4 stages and ranks."""
INDIVISIBLE = 0.04
"""Distance of layers, and again of key/value heads, that do not."""
DEEPEST = 0.6
"""Hidden size per layer, over the source's, down to which a shape is taken to be as good as one
that keeps the source's. Sheared-LLaMA-1.3B has .67, 2.7B .62, Llama-3.2-3B .86,
Llama-3.1-Minitron-4B-Width .75 and Llama-3.2-1B 1."""
FARTHEST_HEADS = 1.5
"""Factor from the source's proportion of attention to hidden size within which heads are tried."""
FARTHEST_NEURONS = 1.1
"""Factor from the source's proportion of neurons to hidden size within which neurons are tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """What sets a shape apart from the source's proportions, as natural logarithms of ratios."""

    budget: float
    """Share of the budget that is used."""
    attention: float
    """Width of all heads over the hidden size, against the source; 0 where a model with grouped
    queries keeps all its heads."""
    neurons: float
    """Neurons over the hidden size, against the source."""
    depth: float
    """Hidden size per layer, against the source, as far as it is outside of `DEEPEST` to 1."""
    groups: float
    """Key/value heads against the source's, or their ratio to query heads, which is nearer."""
    layers_apart: float
    """`INDIVISIBLE` where the layers do not divide by `DIVISOR`."""
    groups_apart: float
    """`INDIVISIBLE` where the key/value heads do not divide by `DIVISOR`."""

    @property
    def distance(self) -> float:
        """Return the sum of all parts without their signs."""
        return sum(abs(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A shape to prune to."""

    shape: ModelShape
    deviation: Deviation

    def flags(self, source: ModelShape) -> str:
        """Return the flags of `prune`, `cut` and `plan` that name the shape."""
        words = []
        for extent in sorted(EXTENTS, key=[field.name for field in fields(ModelShape)].index):
            value = getattr(self.shape, extent)
            is_implied = extent == "num_query_groups" and source.heads_per_group == 1
            if value != getattr(source, extent) and not is_implied:
                words.append(f"{target_flag(extent)} {value}")
        return " ".join(words)


def deviation(shape: ModelShape, source: ModelShape, budget: Budget) -> Deviation:
    """Return how a shape differs from the source's proportions and uses the budget."""

    def kept(extent: str) -> float:
        return math.log(getattr(shape, extent) / getattr(source, extent))

    width, heads, groups = (
        kept("hidden_size"),
        kept("num_attention_heads"),
        kept("num_query_groups"),
    )
    has_groups = source.heads_per_group > 1
    flatness = width - kept("num_layers")
    outside = max(0.0, flatness) + min(0.0, flatness - math.log(DEEPEST))
    apart = {
        extent: INDIVISIBLE
        if getattr(shape, extent) % DIVISOR and getattr(shape, extent) != getattr(source, extent)
        else 0.0
        for extent in ("num_layers", "num_query_groups")
    }
    return Deviation(
        budget=math.log(budget.used(shape)),
        attention=0.0 if has_groups and heads == 0 else heads - width,
        neurons=kept("ffn_hidden_size") - width,
        depth=outside,
        groups=min(groups, groups - heads, key=abs),
        layers_apart=apart["num_layers"],
        groups_apart=apart["num_query_groups"],
    )


def proposals(
    source: ModelShape,
    budget: Budget,
    asked: TargetConfig,
    *,
    tensor: int = 1,
    stages: int = 1,
) -> list[Proposal]:
    """Return shapes within the budget, nearest first: the best of each hidden size.

    Where the user has chosen the hidden size, it is the best of each number of layers.

    Args:
        source: the model to prune; its head_dim, vocabulary and family are kept.
        budget: what the shapes may cost.
        asked: extents that the user has chosen; and whether shapes may be such as stock runtimes
            refuse.
        tensor: tensor ranks that key/value heads and neurons divide over.
        stages: model chunks that layers divide over.

    Raises:
        ValueError: the budget or a chosen extent is beyond the source, or no shape fits; with
            the nearest.
    """
    _check_reachable(source, budget)
    fixed = target_shape(asked, source)
    check_reachable(source, fixed)
    grid = _Grid(source, fixed, asked, tensor, stages)
    low, high = 1 - TOLERANCE, 1 + TOLERANCE
    if budget.params is None:
        low, high = LEAST_USED, 1.0
    best: dict[int, Proposal] = {}
    apart = "hidden_size" if asked.target_hidden_size is None else "num_layers"
    for shape in grid.within(budget, low, high):
        found = Proposal(shape=shape, deviation=deviation(shape, source, budget))
        place = getattr(shape, apart)
        if place not in best or _order(found) < _order(best[place]):
            best[place] = found
    if not best:
        raise ValueError(_nothing(grid, source, budget))
    return sorted(best.values(), key=_order)


def _order(found: Proposal) -> tuple[float, int]:
    """Return a key that sorts the nearest first, of equals the one of more parameters."""
    return round(found.deviation.distance, 6), -found.shape.num_params()


@dataclass(frozen=True, slots=True)
class _Grid:
    """All uniform shapes that masks reach from a source and that the user's choices allow."""

    source: ModelShape
    fixed: ModelShape
    asked: TargetConfig
    tensor: int
    stages: int

    def within(self, budget: Budget, low: float, high: float) -> Iterator[ModelShape]:
        """Yield the shapes that use a share of the budget from ``low`` to ``high``."""
        for narrow, wide, step in self._without_neurons():
            # neurons only add to what a model costs
            if budget.used(narrow) > high or budget.used(wide) < low or budget.limited(narrow) > 1:
                continue
            for neurons in range(narrow.ffn_hidden_size, wide.ffn_hidden_size + 1, step):
                shape = replace(narrow, ffn_hidden_size=neurons)
                is_within = low <= budget.used(shape) <= high and budget.limited(shape) <= 1
                if is_within and shape != self.source:
                    yield shape

    def ends(self) -> Iterator[ModelShape]:
        """Yield every choice of the other extents with the fewest and with the most neurons."""
        for narrow, wide, _ in self._without_neurons():
            yield from (narrow, wide)

    def _without_neurons(self) -> Iterator[tuple[ModelShape, ModelShape, int]]:
        """Yield every choice of the other extents, with the fewest and most neurons, and a step."""
        step = math.lcm(math.gcd(self.source.ffn_hidden_size, MULTIPLE), self.tensor)
        for hidden in self._multiples("hidden_size"):
            neurons = self._neurons(hidden, step)
            if neurons is None:
                continue
            for heads, groups in self._heads(hidden):
                for layers in self._choices("num_layers", self.stages):
                    extents: dict[str, Any] = {
                        "num_layers": layers,
                        "hidden_size": hidden,
                        "num_attention_heads": heads,
                        "num_query_groups": groups,
                    }
                    narrow = replace(self.source, ffn_hidden_size=neurons[0], **extents)
                    if not self.asked.force_unloadable_target and loadable.why_refused(narrow):
                        break
                    yield narrow, replace(narrow, ffn_hidden_size=neurons[1]), step

    def _is_chosen(self, extent: str) -> bool:
        return getattr(self.asked, "target_" + extent) is not None

    def _choices(self, extent: str, step: int) -> list[int]:
        """Return the values of an extent: the chosen one, or all multiples of ``step``."""
        if self._is_chosen(extent):
            return [n for n in (getattr(self.fixed, extent),) if n % step == 0]
        return list(range(step, getattr(self.source, extent) + 1, step))

    def _multiples(self, extent: str) -> list[int]:
        step = math.gcd(getattr(self.source, extent), MULTIPLE)
        return self._choices(extent, 1 if self._is_chosen(extent) else step)

    def _neurons(self, hidden: int, step: int) -> tuple[int, int] | None:
        """Return the fewest and the most neurons, which are multiples of ``step`` apart."""
        if self._is_chosen("ffn_hidden_size"):
            chosen = self.fixed.ffn_hidden_size
            return None if chosen % self.tensor else (chosen, chosen)
        most = self.source.ffn_hidden_size
        usual = most * hidden / self.source.hidden_size
        fewest = max(1, round(usual / FARTHEST_NEURONS / step)) * step
        highest = min(most, max(1, round(usual * FARTHEST_NEURONS / step)) * step) // step * step
        return (fewest, highest) if fewest <= highest else None

    def _heads(self, hidden: int) -> Iterator[tuple[int, int]]:
        """Yield query heads and key/value heads that suit a hidden size."""
        source = self.source
        usual = source.num_attention_heads * hidden / source.hidden_size
        chosen = self._is_chosen("num_attention_heads")
        for groups in range(self.tensor, source.num_query_groups + 1, self.tensor):
            if self._is_chosen("num_query_groups") and groups != self.fixed.num_query_groups:
                continue
            for each in range(1, source.heads_per_group + 1):
                heads = groups * each
                near = usual / FARTHEST_HEADS <= heads <= usual * FARTHEST_HEADS
                if heads == self.fixed.num_attention_heads if chosen else near:
                    yield heads, groups


def _check_reachable(source: ModelShape, budget: Budget) -> None:
    """Refuse a budget that the source itself does not exceed.

    Raises:
        ValueError: with both numbers.
    """
    if budget.params is not None and budget.params >= source.num_params():
        raise ValueError(
            f"{budget.flags} is not below the {source.num_params():,} parameters of --model, and "
            f"pruning only removes; give fewer"
        )
    if budget.params is None and budget.limited(source) <= 1:
        raise ValueError(
            f"--model itself is within {budget.flags}, so there is nothing to prune; give less"
        )


def _nothing(grid: _Grid, source: ModelShape, budget: Budget) -> str:
    """Return the message where no shape fits, with what comes nearest."""
    limits = replace(budget, params=None)
    nearest = min(
        (shape for shape in grid.ends() if limits.limited(shape) <= 1),
        key=lambda shape: abs(math.log(budget.used(shape))),
        default=None,
    )
    found = "none is below its limits"
    if nearest is not None:
        one = Proposal(shape=nearest, deviation=deviation(nearest, source, budget))
        found = f"the nearest takes {100 * budget.used(nearest):.3g} % of it: {one.flags(source)}"
    return (
        f"no shape near the proportions of --model, in multiples of {MULTIPLE}, with layers for "
        f"{grid.stages} model chunks and heads for {grid.tensor} tensor ranks, fits "
        f"{budget.flags}; {found}; change the budget, any --target-* extents, or "
        f"--tensor-model-parallel-size and --pipeline-model-parallel-size"
    )
