"""What --target-* flags ask for, and which targets the layout refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megashear.config import DataConfig, MaskConfig, PretrainRun, PruneRun
from megashear.masks.target_flags import target_shape
from megashear.shape import PRESETS, ModelShape
from megashear.train.target import check_target_layout
from tests.tiny import PAIRS, layout

WIDE, _ = PAIRS["8-groups-of-4"]
MULTI_HEAD, _ = PAIRS["multi-head"]
ONE_GROUP, _ = PAIRS["one-group"]


def masks(**extents: Any) -> MaskConfig:
    return MaskConfig(**{f"target_{name}": value for name, value in extents.items()})


@pytest.mark.parametrize(
    ("source", "flags", "wanted"),
    [
        # heads alone: every key/value head stays, and loses query heads
        (WIDE, {"num_attention_heads": 24}, (24, 8)),
        (WIDE, {"num_attention_heads": 8}, (8, 8)),
        # groups alone: each keeps all its query heads
        (WIDE, {"num_query_groups": 6}, (24, 6)),
        (WIDE, {"num_attention_heads": 12, "num_query_groups": 6}, (12, 6)),
        (WIDE, {"hidden_size": 24}, (32, 8)),
        (ONE_GROUP, {"num_attention_heads": 3}, (3, 1)),
        # without grouped queries they are one
        (MULTI_HEAD, {"num_attention_heads": 5}, (5, 5)),
        (MULTI_HEAD, {"num_query_groups": 5}, (5, 5)),
        (PRESETS["llama2-7b"], {"": "llama2-2.7b", "num_attention_heads": 16}, (16, 16)),
    ],
)
def test_heads_and_groups_that_flags_ask_for(
    source: ModelShape, flags: dict[str, Any], wanted: tuple[int, int]
) -> None:
    preset = flags.pop("", None)
    target = target_shape(replace(masks(**flags), target=preset), source)
    assert (target.num_attention_heads, target.num_query_groups) == wanted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"num_attention_heads": 20},
            r"--target-num-attention-heads 20 is not a multiple of --target-num-query-groups 8 "
            r"\(all are kept unless it is given\), .*the nearest --target-num-attention-heads is "
            r"16 or 24; 20 fits --target-num-query-groups 5$",
        ),
        (
            {"num_attention_heads": 13},
            r"13 is not a multiple of --target-num-query-groups 8 .* is 8 or 16$",  # 13 is a prime
        ),
        ({"num_attention_heads": 7}, r"the nearest --target-num-attention-heads is 8; 7 fits"),
        (
            {"num_attention_heads": 12, "num_query_groups": 5},
            r"12 is not a multiple of --target-num-query-groups 5, .* is 10 or 15; 12 fits "
            r"--target-num-query-groups 3 or 4 or 6$",
        ),
        ({"num_attention_heads": 25, "num_query_groups": 6}, r"heads is 24$"),
        (
            {"num_attention_heads": 0},
            r"^--target-num-attention-heads is 0; wanted 1 to 2147483647$",
        ),
        ({"num_query_groups": 0}, r"^--target-num-query-groups is 0; wanted 1 to 2147483647$"),
    ],
)
def test_heads_that_do_not_divide_are_refused_with_the_nearest(
    flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        target_shape(masks(**flags), WIDE)


def check(
    source: ModelShape,
    *,
    tp: int = 1,
    for_ranks: int | None = None,
    then_tp: int | None = None,
    **extents: int,
) -> None:
    data = DataConfig(data_path="data")
    run = PruneRun(
        parallel=layout(tp=tp),
        data=data,
        masks=MaskConfig(target_tensor_model_parallel_size=for_ranks),
    )
    then = None if then_tp is None else PretrainRun(parallel=layout(tp=then_tp), data=data)
    check_target_layout(replace(source, **extents), source, run, then)


@pytest.mark.parametrize(
    ("source", "tp", "extents", "message"),
    [
        (
            WIDE,
            4,
            {"num_query_groups": 6, "num_attention_heads": 12},
            r"target num_query_groups 6 is not a multiple of --tensor-model-parallel-size 4, .*"
            r"the nearest --target-num-query-groups is 4 or 8; to keep 6, .*it divides by 1, 2, 3$",
        ),
        (
            MULTI_HEAD,
            4,
            {"num_query_groups": 3, "num_attention_heads": 3},
            r"target num_attention_heads 3 .* --target-num-attention-heads is 4; .*by 1, 3$",
        ),
        (
            WIDE,
            4,
            {"ffn_hidden_size": 58},
            r"ffn_hidden_size 58 .* nearest --target-ffn-hidden-size is 56 or 60; .*by 1, 2$",
        ),
    ],
)
def test_a_target_that_tensor_ranks_do_not_divide_is_refused_with_the_nearest(
    source: ModelShape, tp: int, extents: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(source, tp=tp, **extents)
    # the way out: the model is cut for fewer ranks than it is pruned on
    check(source, tp=tp, for_ranks=1, **extents)


def test_the_cut_models_own_ranks_may_be_more_than_the_runs() -> None:
    extents = {"num_query_groups": 6, "num_attention_heads": 12}
    check(WIDE, tp=2, **extents)
    with pytest.raises(
        ValueError, match=r"not a multiple of --target-tensor-model-parallel-size 4, .* 4 or 8"
    ):
        check(WIDE, tp=2, for_ranks=4, **extents)
    # a job that goes on with the cut model says itself on how many
    check(WIDE, tp=4, then_tp=2, **extents)
    with pytest.raises(ValueError, match=r"model-parallel-size of --then-pretrain 4, .* 4 or 8"):
        check(WIDE, tp=2, then_tp=4, **extents)
    with pytest.raises(ValueError, match=r"--target-num-query-groups is none up to 8"):
        check(WIDE, for_ranks=16, **extents)
    with pytest.raises(
        ValueError, match=r"--target-tensor-model-parallel-size is 0; wanted 1 to 1048576"
    ):
        check(WIDE, for_ranks=0)


def test_every_shape_that_is_reached_and_passes_divides() -> None:
    passed = 0
    for groups in range(1, 9):
        for each in range(1, 5):
            target = replace(WIDE, num_query_groups=groups, num_attention_heads=groups * each)
            extents = {"num_query_groups": groups, "num_attention_heads": groups * each}
            if groups % 4 == 0:
                check(WIDE, tp=4, **extents)
                assert target.num_attention_heads % 4 == 0
                passed += 1
            else:
                with pytest.raises(ValueError, match="is not a multiple of"):
                    check(WIDE, tp=4, **extents)
    assert passed == 8
