"""What is said to stay is what the gates keep, by counts that are made another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megashear.masks.targets import whole_parts
from megashear.models.kept import KeptUnits
from megashear.report.kept import MaskReading
from megashear.shape import ModelShape
from tests.families import FAMILIES
from tests.families import pruned as pruned_shape
from tests.tiny import PAIRS

SHAPES = {**PAIRS, **{name: (shape, pruned_shape(shape)) for name, shape in FAMILIES.items()}}


def half_open(source: ModelShape, target: ModelShape, seed: int = 3) -> dict[str, Tensor]:
    """Whole log_alpha in the middle of pruning."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: (torch.randn(part.num_rows, part.num_units, generator=generator) * 2 + 1).clamp(-4, 4)
        for kind, part in whole_parts(source, target).items()
    }


def open_probability(log_alpha: float) -> float:
    """P(z > 0), from the distribution of a stretched concrete variable."""
    return 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - log_alpha))


@pytest.mark.parametrize("name", SHAPES)
def test_exact_masks_leave_the_parameters_of_the_target(name: str) -> None:
    source, target = SHAPES[name]
    reading = MaskReading.of(half_open(source, target), source, target)
    assert reading.exact.num_params() == target.num_params()
    assert KeptUnits.of({}, source).num_params() == source.num_params()
    assert len(reading.exact.kept_layers) == target.num_layers


@pytest.mark.parametrize("name", PAIRS)
def test_expected_masks_leave_what_a_sum_over_units_gives(name: str) -> None:
    source, target = PAIRS[name]
    log_alpha = half_open(source, target)
    kept = MaskReading.of(log_alpha, source, target).expected

    def keeps(kind: str, row: int) -> list[bool]:
        """The most open units of a row, as many as it is expected to keep."""
        if kind not in log_alpha:
            return [True] * {"head": source.heads_per_group, "group": source.num_query_groups}[kind]
        values = log_alpha[kind][row].tolist()
        closed = math.floor(sum(1 - open_probability(value) for value in values) + 0.5)
        order = sorted(range(len(values)), key=lambda unit: values[unit])
        return [unit not in order[:closed] for unit in range(len(values))]

    hidden = sum(keeps("hidden", 0))
    total = 2 * source.vocab_size * hidden + hidden
    for layer, layer_stays in enumerate(keeps("layer", 0)):
        if not layer_stays:
            continue
        if source.heads_per_group == 1:
            queries = keys = sum(keeps("head", layer))
        else:
            groups = keeps("group", layer)
            queries = sum(
                sum(keeps("head", layer * len(groups) + number))
                for number, stays in enumerate(groups)
                if stays
            )
            keys = sum(groups)
        neurons = sum(keeps("intermediate", layer))
        total += hidden * (2 * source.head_dim * (queries + keys) + 3 * neurons + 2)
    assert kept.num_params() == total


def test_a_gate_that_is_moved_is_noticed() -> None:
    source, target = PAIRS["8-groups-of-4"]
    log_alpha = half_open(source, target)
    before = MaskReading.of(log_alpha, source, target)
    log_alpha["layer"] = -log_alpha["layer"]
    after = MaskReading.of(log_alpha, source, target)
    assert after.exact.num_params() == before.exact.num_params()  # as many, but others
    assert after.exact.kept_layers != before.exact.kept_layers
    log_alpha["hidden"] -= 1.0
    assert MaskReading.of(log_alpha, source, target).expected.num_params() < (
        after.expected.num_params()
    )


def test_query_heads_go_with_their_group() -> None:
    source, _ = PAIRS["8-groups-of-4"]
    head = torch.ones(source.num_layers * source.num_query_groups, source.heads_per_group)
    group = torch.ones(source.num_layers, source.num_query_groups)
    head[1 * source.num_query_groups + 2, 3] = 0.0  # layer 1, group 2, its last head
    group[3, 5] = 0.0
    kept = KeptUnits.of({"head": head, "group": group}, source)
    gone = {(layer, unit) for layer, unit in (~kept.units["head"]).nonzero().tolist()}
    assert gone == {(1, 2 * 4 + 3), *((3, 5 * 4 + n) for n in range(4))}
    assert (~kept.units["group"]).nonzero().tolist() == [[3, 5]]


def test_summaries_of_kinds_are_counts_of_their_own() -> None:
    source, target = PAIRS["8-groups-of-4"]
    log_alpha = half_open(source, target)
    for kind, summary in MaskReading.of(log_alpha, source, target).kinds.items():
        chances = [[open_probability(v) for v in row] for row in log_alpha[kind].tolist()]
        assert summary.num_undecided == sum(0.1 < p < 0.9 for row in chances for p in row)
        assert summary.num_gates == sum(map(len, chances))
        kept = [len(row) - math.floor(sum(1 - p for p in row) + 0.5) for row in chances]
        assert (summary.fewest_open, summary.most_open) == (min(kept), max(kept))
        # rounding only ever adds or takes: gates are ordered alike in both modes
        assert summary.num_changed == sum(abs(number - summary.target) for number in kept)
        mean = sum(map(sum, chances)) / len(chances)
        assert summary.expected_open == pytest.approx(mean, rel=1e-6)


def test_numbers_of_kept_units_leave_out_layers_that_go() -> None:
    source, target = PAIRS["groups-alone"]
    kept = MaskReading.of(half_open(source, target), source, target).exact
    values = kept.to_dict()
    assert values["layers"] == kept.kept_layers
    assert list(values["neurons by layer"]) == kept.kept_layers
    for layer in kept.kept_layers:
        assert len(values["neurons by layer"][layer]) == target.ffn_hidden_size
        assert len(values["query heads by layer"][layer]) == target.num_attention_heads
    assert len(values["hidden"]) == target.hidden_size
