"""Each layer gets its own gates, and a model without gates is the model of before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.config import ModelConfig, ParallelConfig
from megashear.masks.mask_set import MaskSet
from megashear.masks.targets import MaskPart, whole_parts
from megashear.models.binding import MaskBinding
from megashear.models.llama import build_llama, check_layout, own_layers, unwrap
from megashear.models.parts import own_parts
from megashear.parallel.groups import ParallelGroups
from tests.ranks import run_ranks
from tests.tiny import PAIRS, SOURCE, layout

# query heads in groups and groups: every kind of mask
GROUPED, TARGET = PAIRS["8-groups-of-4"]


def parts_of_rank(parallel: ParallelConfig) -> tuple[tuple[int, ...], Any]:
    groups = ParallelGroups.create(parallel)
    chunks = build_llama(GROUPED, groups, parallel, ModelConfig(), variant="local")
    layers = own_layers(chunks)
    return layers, own_parts(whole_parts(GROUPED, TARGET), layers, groups)


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [
        # interleaved: each rank's layers have gaps between them
        (layout(pp=2, vpp=2), [(0, 2), (1, 3)]),
        (layout(pp=2), [(0, 1), (2, 3)]),
        (layout(tp=2, pp=2, vpp=2), [(0, 2), (0, 2), (1, 3), (1, 3)]),
    ],
    ids=["pp2-vpp2", "pp2", "tp2-pp2-vpp2"],
)
def test_every_gate_is_held_by_the_ranks_that_hold_its_weights(
    parallel: ParallelConfig, layers: list[tuple[int, ...]]
) -> None:
    tp = parallel.tensor_model_parallel_size
    found = run_ranks(len(layers), lambda rank: parts_of_rank(parallel))
    whole = whole_parts(GROUPED, TARGET)
    assert [own for own, _ in found] == layers
    for rank, (own, parts) in enumerate(found):
        assert parts["hidden"] == whole["hidden"]
        assert list(parts["layer"].units) == list(own)
        # whole rows, of the key/value heads that this rank holds
        own_groups = range(rank % tp * 8 // tp, (rank % tp + 1) * 8 // tp)
        assert list(parts["head"].rows) == [
            8 * layer + group for layer in own for group in own_groups
        ]
        assert list(parts["head"].units) == [0, 1, 2, 3]
        assert parts["group"].units == own_groups
        for kind in ("group", "intermediate"):
            width = whole[kind].num_units // tp
            start = (rank % tp) * width
            assert list(parts[kind].rows) == list(own)
            assert list(parts[kind].units) == list(range(start, start + width))
    assert whole.keys() == {"hidden", "head", "group", "intermediate", "layer"}
    for kind, times in {"intermediate": 1, "head": 1, "group": 1, "layer": tp}.items():
        held = torch.zeros(whole[kind].num_rows, whole[kind].num_units)
        for _, parts in found:
            held[list(parts[kind].rows)] += count(parts[kind])
        assert bool((held == times).all()), kind


def count(part: MaskPart) -> Tensor:
    ones = torch.zeros(len(part.rows), part.num_units)
    ones[:, list(part.units)] = 1.0
    return ones


def masked_model() -> tuple[Any, MaskBinding]:
    groups = ParallelGroups.create(layout())
    chunks = build_llama(GROUPED, groups, layout(), ModelConfig(), variant="local")
    parts = own_parts(whole_parts(GROUPED, TARGET), own_layers(chunks), groups)
    binding = MaskBinding(chunks, MaskSet(parts), GROUPED, groups, sequence_parallel=False)
    return unwrap(chunks[0]), binding


def logits(model: Any, stream: Tensor | None) -> Tensor:
    tokens = torch.arange(12)[None] % GROUPED.vocab_size
    positions = torch.arange(12)[None]
    with torch.no_grad():
        return model(tokens, positions, stream)


def test_released_gates_leave_the_unmasked_model_bit_by_bit() -> None:
    def body(rank: int) -> None:
        model, binding = masked_model()
        before = logits(model, None)
        with torch.no_grad():
            binding.bind({3: binding.masks.sample(seed=1, step=0, stream=3)})
        masked = logits(model, binding.select(model, 3))
        assert not torch.equal(masked, before)
        binding.release()
        assert torch.equal(logits(model, None), before)

    run_ranks(1, body)


def test_each_stream_meets_its_own_gates() -> None:
    def body(rank: int) -> None:
        model, binding = masked_model()
        with torch.no_grad():
            sampled = {s: binding.masks.sample(seed=1, step=0, stream=s) for s in (0, 1)}
        alone = {}
        for stream in sampled:
            binding.bind({stream: sampled[stream]})
            alone[stream] = logits(model, binding.select(model, stream))
        assert not torch.equal(alone[0], alone[1])
        binding.bind(sampled)
        for stream in (1, 0, 1):
            assert torch.equal(logits(model, binding.select(model, stream)), alone[stream])

    run_ranks(1, body)


@pytest.mark.parametrize(
    ("parallel", "change", "message"),
    [
        (
            layout(tp=8),
            {},
            r"source num_query_groups 4 is not a multiple of --tensor-model-parallel-size 8; the "
            r"source divides by 1, 2, 4$",
        ),
        (
            layout(tp=4),
            {"num_query_groups": 8, "num_attention_heads": 8, "ffn_hidden_size": 98},
            r"source ffn_hidden_size 98 is not a multiple of .* 4; the source divides by 1, 2$",
        ),
        (
            layout(tp=2),
            {"num_query_groups": 1},
            r"source num_query_groups 1 is not a multiple of .* 2; the source divides by 1$",
        ),
        (
            layout(pp=3),
            {},
            r"source num_layers 4 is not a multiple of --pipeline-model-parallel-size \* "
            r"--num-virtual-stages-per-pipeline-rank = 3 \* 1; their product may be 1, 2, 4$",
        ),
        (layout(pp=4, vpp=2), {}, r"source num_layers 4 .* = 4 \* 2; .* may be 1, 2, 4$"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_with_what_does(
    parallel: ParallelConfig, change: dict[str, int], message: str
) -> None:
    shape = dataclasses.replace(SOURCE, **change)
    with pytest.raises(ValueError, match=message):
        check_layout(shape, parallel, role="source")


def test_a_shape_that_divides_passes_and_a_vocabulary_need_not() -> None:
    for parallel in (layout(), layout(tp=4), layout(pp=4), layout(tp=2, pp=2, vpp=2)):
        check_layout(SOURCE, parallel)
    check_layout(dataclasses.replace(SOURCE, vocab_size=65), layout(tp=4))  # padded to 68
