"""Law 2 on one process: the masked model and the cut one compute the same logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.cut import cut
from megashear.masks.mask_set import exact_gates
from megashear.models import weight_table
from megashear.shape import ModelShape
from tests.families import FAMILIES, pruned
from tests.reference_llama import forward, random_weights, relative_error
from tests.unit.checkpoint.shapes import (
    CUT_GROUPED,
    CUT_MULTI_HEAD,
    CUT_ONE_GROUP,
    CUT_WIDE,
    GROUPED,
    MULTI_HEAD,
    ONE_GROUP,
    TOKENS,
    WIDE,
    random_gates,
)

FOLDING_ORDER = 1e-5  # relative, float32: the same products in another order (law 2)
PAIRS = pytest.mark.parametrize(
    ("source", "target"),
    [
        (MULTI_HEAD, CUT_MULTI_HEAD),
        (GROUPED, CUT_GROUPED),
        (WIDE, CUT_WIDE),
        (ONE_GROUP, CUT_ONE_GROUP),
    ],
    ids=["multi-head", "grouped", "8-groups-of-4", "one-group"],
)


def error_of_cut(
    source: ModelShape, target: ModelShape, gates: dict[str, Tensor], **changed: Tensor
) -> float:
    weights = random_weights(source)
    cut_weights = dict(cut(weights, gates, source, target)) | changed
    masked = forward(weights, source, TOKENS, gates)
    return relative_error(forward(cut_weights, target, TOKENS), masked)


@PAIRS
def test_cut_equals_masked_model(source: ModelShape, target: ModelShape) -> None:
    assert error_of_cut(source, target, random_gates(source, target)) < FOLDING_ORDER


@PAIRS
def test_folding_the_output_layer_too_is_noticed(source: ModelShape, target: ModelShape) -> None:
    gates = random_gates(source, target)
    keep = gates["hidden"][0].nonzero().flatten()
    head = (random_weights(source)["lm_head.weight"] * gates["hidden"])[:, keep]
    error = error_of_cut(source, target, gates, **{"lm_head.weight": head})
    assert error > 0.01  # as the reference does it


@PAIRS
@pytest.mark.parametrize("axis", [0, 1])
def test_a_missing_fold_is_noticed(
    monkeypatch: pytest.MonkeyPatch, source: ModelShape, target: ModelShape, axis: int
) -> None:
    def without(row: weight_table.MegatronTensor) -> weight_table.MegatronTensor:
        if "linear_proj" not in row.name:
            return row
        folds = tuple(() if a == axis else kinds for a, kinds in enumerate(row.parts[0].folds))
        return replace(row, parts=(replace(row.parts[0], folds=folds),))

    rows = tuple(map(without, weight_table.table(source)))
    monkeypatch.setattr(weight_table, "table", lambda shape: rows)
    assert error_of_cut(source, target, random_gates(source, target)) > 0.01


def test_gates_transposed_within_their_groups_are_noticed() -> None:
    gates = random_gates(WIDE, CUT_WIDE)
    weights = random_weights(WIDE)
    masked = forward(weights, WIDE, TOKENS, gates)
    small = dict(cut(weights, gates, WIDE, CUT_WIDE))
    assert relative_error(forward(small, CUT_WIDE, TOKENS), masked) < FOLDING_ORDER
    # the same gates of a layer, but head j of group g takes that of head g of "group" j
    by_layer = gates["head"].view(4, 8, 4)
    transposed = gates | {"head": by_layer.transpose(1, 2).reshape(32, 4)}
    assert relative_error(forward(weights, WIDE, TOKENS, transposed), masked) > 0.01
    with pytest.raises(ValueError, match=r"layer \d group \d: its head mask keeps . of 4"):
        cut(weights, transposed, WIDE, CUT_WIDE)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_cut_to_what_the_masks_compute(name: str) -> None:
    source = FAMILIES[name]
    target = pruned(source)
    assert error_of_cut(source, target, random_gates(source, target)) < FOLDING_ORDER


def test_biases_that_keep_other_rows_than_their_weights_are_noticed() -> None:
    source = FAMILIES["qwen2"]
    target = pruned(source)
    gates = random_gates(source, target)
    name = "model.layers.0.self_attn.q_proj.bias"
    first = random_weights(source)[name][: target.num_attention_heads * target.head_dim]
    assert error_of_cut(source, target, gates, **{name: first}) > 0.01


@pytest.mark.parametrize("name", ["llama3.2", "qwen3-tied"])
def test_a_final_norm_folded_beside_a_tied_matrix_is_noticed(name: str) -> None:
    source = FAMILIES[name]
    target = pruned(source)
    gates = random_gates(source, target)
    keep = gates["hidden"][0].nonzero().flatten()
    norm = (random_weights(source)["model.norm.weight"] * gates["hidden"][0])[keep]
    assert error_of_cut(source, target, gates, **{"model.norm.weight": norm}) > 0.01


def test_heads_counted_by_layer_instead_of_by_group_are_refused() -> None:
    gates = random_gates(WIDE, CUT_WIDE)
    log_alpha = torch.randn(4 * 8, 4, generator=torch.Generator().manual_seed(5))
    counted = exact_gates({"head": log_alpha}, {"head": 3})["head"]  # by group
    cut(random_weights(WIDE), gates | {"head": counted}, WIDE, CUT_WIDE)
    by_layer = exact_gates({"head": log_alpha.view(4, 32)}, {"head": 24})["head"]
    assert bool(((by_layer != 0).sum(dim=1) == 24).all())  # as many heads, in uneven groups
    with pytest.raises(
        ValueError, match=r"layer \d group \d: its head mask keeps . of 4.* wants 3"
    ):
        cut(Unread(), gates | {"head": by_layer}, WIDE, CUT_WIDE)


@pytest.mark.parametrize(
    ("kind", "extents"),
    [
        ("hidden", {"hidden_size": 24}),
        ("group", {"num_query_groups": 3, "num_attention_heads": 6}),
        ("intermediate", {"ffn_hidden_size": 56}),
        ("layer", {"num_layers": 3}),
    ],
)
def test_kinds_that_are_absent_stay_open(kind: str, extents: dict[str, int]) -> None:
    gates = {kind: random_gates(GROUPED, CUT_GROUPED)[kind]}
    assert error_of_cut(GROUPED, replace(GROUPED, **extents), gates) < FOLDING_ORDER


def test_weights_keep_their_format_and_are_rounded_once() -> None:
    weights = {name: w.bfloat16() for name, w in random_weights(GROUPED).items()}
    gates = random_gates(GROUPED, CUT_GROUPED)
    exact = dict(cut({n: w.float() for n, w in weights.items()}, gates, GROUPED, CUT_GROUPED))
    for name, weight in cut(weights, gates, GROUPED, CUT_GROUPED):
        assert torch.equal(weight, exact[name].bfloat16()), name


def test_names_and_shapes_are_the_targets_in_order() -> None:
    pieces = cut(random_weights(GROUPED), random_gates(GROUPED, CUT_GROUPED), GROUPED, CUT_GROUPED)
    shapes = [(name, tuple(weight.shape)) for name, weight in pieces]
    assert shapes == list(weight_table.hf_shapes(CUT_GROUPED).items())


class Unread(dict[str, Tensor]):
    """Weights that may not be read."""

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 25},
            "cannot cut: the hidden mask keeps 24 of 40, target wants 25; train the masks longer "
            "or cut with --exact-target, which keeps the 25 most open",
        ),
        ({"num_layers": 2}, "cannot cut: the layer mask keeps 3 of 4, target wants 2"),
        ({"ffn_hidden_size": 57}, r"layer \d: its intermediate mask keeps 56 of 96.* wants 57"),
        (
            {"num_attention_heads": 4, "num_query_groups": 2},
            r"layer \d: its group mask keeps 3 of 4, target wants 2",
        ),
        ({"num_attention_heads": 3}, r"layer \d group \d: its head mask keeps 2 of 2.* wants 1"),
        ({"head_dim": 16}, "target head_dim is 16, the source has 8, and no mask changes it"),
        ({"vocab_size": 32}, "target vocab_size is 32, the source has 64"),
    ],
)
def test_another_count_than_the_targets_is_refused_before_any_weight_is_read(
    change: dict[str, int], message: str
) -> None:
    gates = random_gates(GROUPED, CUT_GROUPED)
    with pytest.raises(ValueError, match=message):
        cut(Unread(), gates, GROUPED, replace(CUT_GROUPED, **change))


def test_one_deviating_row_is_refused_by_its_layer() -> None:
    gates = random_gates(MULTI_HEAD, CUT_MULTI_HEAD)
    gates["layer"] = torch.tensor([[0.5, 0.6, 0.0, 0.9]])
    gates["head"][3] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="cut layer 3: its head mask keeps 4 of 8, target wants 5"):
        cut(Unread(), gates, MULTI_HEAD, CUT_MULTI_HEAD)
    gates["layer"] = torch.tensor([[0.5, 0.6, 0.9, 0.0]])
    cut(Unread(), gates, MULTI_HEAD, CUT_MULTI_HEAD)  # a layer that goes need keep nothing
