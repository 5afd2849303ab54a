"""Parameters that masks keep, against independent formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megashear.masks import gates
from megashear.models.kept import KeptUnits
from megashear.shape import ModelShape
from tests.families import FAMILIES
from tests.unit.masks import golden
from tests.unit.masks.test_targets import GQA, MHA, MQA, WIDE

FLOAT32 = 2e-6
"""Relative; the reference sums in float32."""
MATRICES = r".*\.(self_attn|mlp)\..*_proj\.weight"
"""Names of the weights that the reference counts: matrices of attention and MLP."""


def expected_params(masks: dict[str, Tensor], source: ModelShape, wanted: str = MATRICES) -> float:
    chances = {kind: gates.scores(mask) for kind, mask in masks.items()}
    return KeptUnits.expected(chances, source).expected_params(wanted)


def test_expected_params_equal_the_reference() -> None:
    found = expected_params(golden.log_alpha(), golden.shape("base"))
    assert found == pytest.approx(golden.facts()["expected_params"], rel=FLOAT32)


def test_expected_params_notice_a_missing_mask() -> None:
    masks = golden.log_alpha()
    del masks["layer"]
    found = expected_params(masks, golden.shape("base"))
    assert found != pytest.approx(golden.facts()["expected_params"], rel=0.1)


HEADS_AND_GROUPS = pytest.mark.parametrize(
    ("source", "heads"),
    [
        pytest.param(MHA, {"head": (4, 8)}, id="mha"),
        pytest.param(GQA, {"group": (4, 4)}, id="groups"),
        pytest.param(WIDE, {"head": (32, 4)}, id="heads-in-groups"),
        pytest.param(WIDE, {"group": (4, 8), "head": (32, 4)}, id="both"),
        pytest.param(MQA, {"head": (4, 8)}, id="one-group"),
    ],
)


def outer_products(
    masks: dict[str, Tensor], source: ModelShape, heads_of: Callable[[int], Tensor]
) -> float:
    """Weighs every entry of every matrix with the chance that its row and column stay.

    ``heads_of`` gives a layer's scores of query heads, without their groups'.
    """
    hidden = gates.scores(masks["hidden"])[0]
    layers = gates.scores(masks["layer"])[0]
    wanted = 0.0
    for layer in range(4):
        heads = heads_of(layer)
        groups = torch.ones(source.num_query_groups, dtype=torch.float64)
        if "group" in masks:
            groups = gates.scores(masks["group"][layer])
        if source is MHA:
            groups, heads = heads, torch.ones(8, dtype=torch.float64)
        each = groups.repeat_interleave(source.heads_per_group) * heads
        queries = each.repeat_interleave(source.head_dim)
        keys = groups.repeat_interleave(source.head_dim)
        neurons = torch.ones(96, dtype=torch.float64)
        matrices = (queries, queries, keys, keys, neurons, neurons, neurons)
        wanted += float(layers[layer]) * sum(float(torch.outer(m, hidden).sum()) for m in matrices)
    return wanted


@HEADS_AND_GROUPS
def test_expected_params_are_the_outer_product_of_scores(
    source: ModelShape, heads: dict[str, tuple[int, int]]
) -> None:
    torch.manual_seed(3)
    units = {"hidden": (1, 40), "layer": (1, 4)} | heads  # intermediate: none
    masks = {kind: 3 * torch.randn(shape) for kind, shape in units.items()}

    def in_order(layer: int) -> Tensor:
        if "head" not in masks:
            return torch.ones(source.num_attention_heads, dtype=torch.float64)
        return gates.scores(masks["head"].reshape(4, -1)[layer])

    found = expected_params(masks, source)
    assert found == pytest.approx(outer_products(masks, source, in_order), rel=1e-12)
    if len(heads) == 2:  # the twin: heads and groups of a layer transposed meet the wrong groups

        def transposed(layer: int) -> Tensor:
            return in_order(layer).reshape(8, 4).T.flatten()

        assert found != pytest.approx(outer_products(masks, source, transposed), rel=1e-4)


def test_expected_params_without_masks_are_all() -> None:
    for source in (MHA, GQA, WIDE, MQA):
        assert expected_params({}, source) == source.num_layers * source.layer_params()


def test_embedding_head_and_norms_count_with_their_hidden_dimensions() -> None:
    torch.manual_seed(4)
    masks = {"hidden": 3 * torch.randn(1, 40), "layer": 3 * torch.randn(1, 4)}
    hidden, layers = (float(gates.scores(masks[kind]).sum()) for kind in ("hidden", "layer"))
    rest = hidden * (2 * MHA.vocab_size + 2 * layers + 1)
    found = expected_params(masks, MHA, ".*")
    assert found == pytest.approx(expected_params(masks, MHA) + rest, rel=1e-12)
    for shape in FAMILIES.values():  # biases, norms over heads, tied embeddings
        assert KeptUnits.expected({}, shape).expected_params() == shape.num_params()


@pytest.mark.parametrize("source", [MHA, WIDE], ids=["multi-head", "grouped"])
def test_units_go_with_what_they_stand_in(source: ModelShape) -> None:
    rows = source.num_layers * (1 if source.heads_per_group == 1 else source.num_query_groups)
    each = source.num_attention_heads * source.num_layers // rows
    given = {"head": torch.ones(rows, each), "layer": torch.ones(1, source.num_layers)}
    given["layer"][0, 2] = 0.0
    kept = KeptUnits.of(given, source)
    for units in (kept.units[kind] for kind in ("head", "group", "intermediate")):
        assert (~units).nonzero()[:, 0].unique().tolist() == [2]
        assert not units[2].any()
    assert kept.of_kind("head").shape == given["head"].shape
    assert kept.removed_layers == [2]
    open_layers = dict(given, layer=torch.ones(1, source.num_layers))
    assert KeptUnits.of(open_layers, source).units["head"].all()  # the twin: own gates are open
