from __future__ import annotations

from dataclasses import replace

import pytest

from megashear.masks.constraint import SparsityConstraint
from megashear.masks.targets import MaskPart, target_units, whole_parts
from megashear.shape import PRESETS, ModelShape

MHA = ModelShape(
    num_layers=4,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=8,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=101,
)
GQA = replace(MHA, num_query_groups=4)
WIDE = replace(MHA, num_attention_heads=32, num_query_groups=8, head_dim=4)  # 8 groups of 4
MQA = replace(MHA, num_query_groups=1)


def test_2_7b_has_no_layer_mask_and_1_3b_has_one() -> None:
    source = PRESETS["llama2-7b"]
    assert target_units(source, PRESETS["llama2-2.7b"]) == {
        "hidden": 2560,
        "head": 20,
        "intermediate": 6912,
    }
    assert target_units(source, PRESETS["llama2-1.3b"]) == {
        "hidden": 2048,
        "head": 16,
        "intermediate": 5504,
        "layer": 24,
    }


def test_whole_parts_have_the_shapes_of_the_source() -> None:
    target = replace(
        MHA, num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=4,
        ffn_hidden_size=64,
    )  # fmt: skip
    parts = whole_parts(MHA, target)
    found = {kind: (part.num_rows, part.num_units) for kind, part in parts.items()}
    assert found == {"hidden": (1, 40), "head": (4, 8), "intermediate": (4, 96), "layer": (1, 4)}
    for part in parts.values():
        assert part.rows == tuple(range(part.num_rows))
        assert part.units == range(part.num_units)


@pytest.mark.parametrize(
    ("source", "heads", "groups", "rows", "units"),
    [
        pytest.param(WIDE, 16, 4, {"group": (4, 8)}, {"group": 4}, id="groups"),
        pytest.param(WIDE, 24, 8, {"head": (32, 4)}, {"head": 3}, id="heads-of-every-group"),
        pytest.param(
            WIDE, 10, 5, {"head": (32, 4), "group": (4, 8)}, {"head": 2, "group": 5}, id="both"
        ),
        pytest.param(WIDE, 8, 8, {"head": (32, 4)}, {"head": 1}, id="one-head-each"),
        pytest.param(MQA, 3, 1, {"head": (4, 8)}, {"head": 3}, id="one-group"),
    ],
)
def test_grouped_queries_have_masks_of_groups_and_of_heads_in_them(
    source: ModelShape,
    heads: int,
    groups: int,
    rows: dict[str, tuple[int, int]],
    units: dict[str, int],
) -> None:
    target = replace(source, num_attention_heads=heads, num_query_groups=groups)
    parts = whole_parts(source, target)
    assert {kind: (part.num_rows, part.num_units) for kind, part in parts.items()} == rows
    assert target_units(source, target) == units
    assert all(part.rows == tuple(range(part.num_rows)) for part in parts.values())
    assert all(part.units == range(part.num_units) for part in parts.values())
    # every target is a shape: each key/value head serves the same number of query heads
    assert units.get("group", source.num_query_groups) * units.get(
        "head", source.heads_per_group
    ) == (heads)


def test_rows_of_heads_in_groups_are_counted_layer_by_layer() -> None:
    part = whole_parts(WIDE, replace(WIDE, num_attention_heads=24))["head"]
    assert (part.rows_per_layer, part.extents, part.layers) == (8, (4, 8, 4), (0, 1, 2, 3))
    held = replace(part, rows=(10, 11, 26, 27))  # groups 2 and 3 of layers 1 and 3
    assert held.layers == (1, 3)
    assert whole_parts(MQA, replace(MQA, num_attention_heads=3))["head"].extents == (4, 8)


def test_context_length_may_differ() -> None:
    target = replace(MHA, hidden_size=24, max_position_embeddings=64)
    assert target_units(MHA, target) == {"hidden": 24}


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        ("head_dim", 16, 8),
        ("vocab_size", 100, 101),
        ("norm_epsilon", 1e-6, 1e-5),
        ("rotary_base", 5e5, 1e4),
    ],
)
def test_an_extent_without_a_mask_is_refused(name: str, found: float, wanted: float) -> None:
    target = replace(MHA, hidden_size=24, **{name: found})
    message = f"target {name} is {found}, the source has {wanted}.* set the target's {name} to"
    with pytest.raises(ValueError, match=message):
        whole_parts(MHA, target)


@pytest.mark.parametrize(
    ("name", "found", "most"),
    [("num_layers", 5, 4), ("hidden_size", 48, 40), ("ffn_hidden_size", 97, 96)],
)
def test_a_target_larger_than_its_source_is_refused(name: str, found: int, most: int) -> None:
    target = replace(MHA, **{name: found})
    flag = "--target-" + name.replace("_", "-")
    message = (
        f"target {name} is {found}, the source has {most}, and pruning only removes; "
        f"set {flag} to at most {most}"
    )
    with pytest.raises(ValueError, match=message):
        target_units(MHA, target)


def test_more_heads_or_groups_than_the_source_are_refused() -> None:
    more_heads = replace(MHA, num_attention_heads=16, num_query_groups=8)
    with pytest.raises(ValueError, match="num_attention_heads is 16, the source has 8"):
        target_units(MHA, more_heads)
    more_groups = replace(GQA, num_query_groups=8)
    with pytest.raises(ValueError, match="num_query_groups is 8, the source has 4"):
        target_units(GQA, more_groups)


def test_turning_heads_into_groups_is_refused() -> None:
    target = replace(MHA, num_attention_heads=6, num_query_groups=3)
    with pytest.raises(
        ValueError, match="do not merge them; set the target's num_query_groups to 6"
    ):
        target_units(MHA, target)


@pytest.mark.parametrize(
    ("heads", "groups", "ways_out"),
    [
        (15, 3, "set --target-num-attention-heads to 12 or --target-num-query-groups to 5"),
        (12, 2, "set --target-num-attention-heads to 8 or --target-num-query-groups to 3"),
        (30, 2, "set --target-num-attention-heads to 8$"),  # 30 in groups of at most 4: 10 groups
    ],
)
def test_more_heads_for_each_group_than_the_source_are_refused_with_the_ways_out(
    heads: int, groups: int, ways_out: str
) -> None:
    target = replace(WIDE, num_attention_heads=heads, num_query_groups=groups)
    message = (
        f"target has {heads} query heads in num_query_groups {groups}, {heads // groups} for each "
        f"key/value head; in the source each serves 4, and masks only remove; {ways_out}"
    )
    with pytest.raises(ValueError, match=message):
        whole_parts(WIDE, target)


def test_too_few_heads_for_each_group_are_refused_by_the_number_for_each() -> None:
    before = replace(MHA, num_attention_heads=64, num_query_groups=2)  # 32 for each
    after = replace(before, num_attention_heads=2)
    message = (
        r"target num_attention_heads 1 of 32 for each key/value head is a sparsity of 0.9688, and "
        r"masks reach 0.0020 to 0.9529; the nearest --target-num-attention-heads is 2 for each "
        r"key/value head$"
    )
    with pytest.raises(ValueError, match=message):
        SparsityConstraint(whole_parts(before, after), target_units(before, after), warmup_steps=1)


def test_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to prune: .*hidden_size 40.*lower at least one"):
        whole_parts(MHA, replace(MHA, max_position_embeddings=128))


@pytest.mark.parametrize(
    ("source", "target", "nearest"),
    [
        ({"ffn_hidden_size": 11008}, {"ffn_hidden_size": 11000}, 10985),
        ({"ffn_hidden_size": 11008}, {"ffn_hidden_size": 500}, 519),
        ({"num_layers": 32}, {"num_layers": 1}, 2),
        ({"hidden_size": 1000}, {"hidden_size": 999}, 997),
    ],
)
def test_a_target_beyond_the_clamp_is_refused_with_the_nearest_reachable(
    source: dict[str, int], target: dict[str, int], nearest: int
) -> None:
    ((name, wanted),) = target.items()
    before = replace(MHA, **source)

    def constrain(size: int) -> SparsityConstraint:
        after = replace(before, **{name: size})
        parts = whole_parts(before, after)
        return SparsityConstraint(parts, target_units(before, after), warmup_steps=10)

    flag = "--target-" + name.replace("_", "-")
    message = f"target {name} {wanted} of .*masks reach 0.0020 to 0.9529; the nearest {flag} is "
    with pytest.raises(ValueError, match=message + f"{nearest}$"):
        constrain(wanted)
    constrain(nearest)  # reachable
    step = 1 if wanted > nearest else -1
    with pytest.raises(ValueError, match=message.replace(f"{wanted} of", f"{nearest + step} of")):
        constrain(nearest + step)  # and none is nearer


def test_a_part_outside_the_whole_or_out_of_order_is_ours_to_prevent() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.\.3"):
        MaskPart(kind="head", num_rows=4, num_units=8, rows=(4,), units=range(8))
    with pytest.raises(AssertionError, match="do not rise"):
        MaskPart(kind="head", num_rows=4, num_units=8, rows=(0,), units=(3, 3))
    with pytest.raises(AssertionError, match="unknown kind"):
        MaskPart(kind="neuron", num_rows=4, num_units=8, rows=(0,), units=(3,))
