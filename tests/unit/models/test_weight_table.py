"""The weight table against independent names, shapes, counts and fusions."""

from dataclasses import replace

import pytest
import torch

from megashear.models import weight_table
from megashear.shape import PRESETS, ModelShape
from tests import reference_llama

TINY = ModelShape(
    num_layers=4,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=64,
)
MULTI_HEAD = ModelShape(**{**TINY.to_dict(), "num_query_groups": 8})
EVERYTHING = replace(TINY, qkv_bias=True, qk_norm=True, tied_embeddings=True)
SHAPES = pytest.mark.parametrize("shape", [TINY, MULTI_HEAD], ids=["grouped", "multi-head"])


@SHAPES
def test_hf_names_and_shapes_equal_those_spelled_out(shape: ModelShape) -> None:
    assert list(weight_table.hf_shapes(shape).items()) == list(
        reference_llama.hf_shapes(shape).items()
    )


@pytest.mark.parametrize("shape", [TINY, MULTI_HEAD, EVERYTHING, *PRESETS.values()])
def test_sizes_add_up_to_the_parameter_count(shape: ModelShape) -> None:
    for shapes in (
        weight_table.hf_shapes(shape).values(),
        [row.extents(shape) for row, _ in weight_table.tensors(shape)],
        weight_table.checkpoint_shapes(shape).values(),
    ):
        sizes = [torch.Size(extents).numel() for extents in shapes]
        assert sum(sizes) == shape.num_params()


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.2-1b", 1_235_814_400),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_as_many_parameters_as_the_released_models(
    preset: str, published: int
) -> None:
    assert PRESETS[preset].num_params() == published


@SHAPES
def test_split_undoes_fuse_bit_by_bit(shape: ModelShape) -> None:
    weights = reference_llama.random_weights(shape)
    seen = set()
    for row, layer in weight_table.tensors(shape):
        names = [part.hf_name.format(layer=layer) for part in row.parts]
        whole = weight_table.fuse(row, [weights[name] for name in names], shape)
        assert whole.shape == row.extents(shape)
        for name, part in zip(names, weight_table.split(row, whole, shape)):
            assert part.is_contiguous()
            assert torch.equal(part, weights[name]), name
            seen.add(name)
    assert seen == set(weights)


@SHAPES
def test_query_key_value_are_interleaved_by_group(shape: ModelShape) -> None:
    weights = reference_llama.random_weights(shape)
    q, k, v = (weights[f"model.layers.2.self_attn.{p}_proj.weight"] for p in "qkv")
    row = next(row for row in weight_table.table(shape) if "linear_qkv.weight" in row.name)
    whole = weight_table.fuse(row, [q, k, v], shape)
    d, n = shape.head_dim, shape.heads_per_group
    rows = []
    for group in range(shape.num_query_groups):
        rows += [q[(group * n + head) * d : (group * n + head + 1) * d] for head in range(n)]
        rows += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
    assert torch.equal(whole, torch.cat(rows))
    assert not torch.equal(whole, torch.cat([q, k, v]))  # the twin: stacked is another matrix


def test_biases_are_interleaved_as_the_rows_they_belong_to() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(rows, 1, generator=generator) for rows in (64, 32, 32))
    matrix, bias = (
        next(row for row in weight_table.table(EVERYTHING) if row.name.endswith(name))
        for name in ("linear_qkv.weight", "linear_qkv.bias")
    )
    as_rows = weight_table.fuse(matrix, [x.expand(-1, 40) for x in (q, k, v)], EVERYTHING)
    whole = weight_table.fuse(bias, [x[:, 0] for x in (q, k, v)], EVERYTHING)
    assert torch.equal(whole, as_rows[:, 0])
    for part, wanted in zip(weight_table.split(bias, whole, EVERYTHING), (q, k, v)):
        assert torch.equal(part, wanted[:, 0])


def test_rows_follow_what_the_shape_says() -> None:
    def names(**fields: bool) -> set[str]:
        return set(weight_table.hf_shapes(replace(TINY, num_layers=1, **fields)))

    at = "model.layers.0.self_attn."
    plain = names()
    assert names(qkv_bias=True) - plain == {f"{at}{x}_proj.bias" for x in "qkv"}
    assert names(qk_norm=True) - plain == {f"{at}{x}_norm.weight" for x in "qk"}
    assert plain - names(tied_embeddings=True) == {"lm_head.weight"}


def test_a_tied_matrix_carries_the_hidden_gates_once() -> None:
    def folds(shape: ModelShape) -> dict[str, tuple[tuple[str, ...], ...]]:
        return {name: weight.folds for name, weight, _ in weight_table.weights(shape)}

    free, tied = folds(TINY), folds(EVERYTHING)
    assert free["model.norm.weight"] == (("hidden",),)
    assert tied["model.norm.weight"] == ((),)
    for of in (free, tied):
        assert of["model.embed_tokens.weight"] == ((), ("hidden",))


def test_gate_comes_before_up() -> None:
    weights = reference_llama.random_weights(TINY)
    gate, up = (weights[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up"))
    row = next(row for row in weight_table.table(TINY) if "linear_fc1.weight" in row.name)
    whole = weight_table.fuse(row, [gate, up], TINY)
    assert torch.equal(whole[:96], gate)
    assert torch.equal(whole[96:], up)


def test_norms_are_stored_under_the_names_of_transformer_engine() -> None:
    keys = {row.name: row.key for row in weight_table.table(TINY)}
    at = "decoder.layers.{layer}."
    assert keys[at + "input_layernorm.weight"].endswith(
        "self_attention.linear_qkv.layer_norm_weight"
    )
    assert keys[at + "pre_mlp_layernorm.weight"].endswith("mlp.linear_fc1.layer_norm_weight")
    assert weight_table.checkpoint_shapes(TINY)[keys[at + "input_layernorm.weight"]] == (4, 40)


def test_unknown_and_missing_names_are_listed_in_natural_order() -> None:
    found = dict(weight_table.hf_shapes(TINY))
    del found["model.norm.weight"]
    found |= {f"model.layers.{layer}.self_attn.q_proj.bias": (64,) for layer in (10, 2)}
    with pytest.raises(
        ValueError,
        match=r"HF checkpoint X has 2 weights this model does not know: "
        r"model.layers.2.self_attn.q_proj.bias, model.layers.10.self_attn.q_proj.bias; "
        r"it lacks 1 weights of this model: model.norm.weight",
    ):
        weight_table.check_hf(found, TINY, "HF checkpoint X")


def test_stored_rotary_tables_are_passed_over() -> None:
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    weight_table.check_hf(weight_table.hf_shapes(TINY) | table, TINY, "X")


def test_another_shape_is_refused_with_both_shapes() -> None:
    found = weight_table.hf_shapes(TINY) | {"model.layers.3.mlp.up_proj.weight": (40, 96)}
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \[40, 96\].*is \[96, 40\]"):
        weight_table.check_hf(found, TINY, "X")
    stored = weight_table.checkpoint_shapes(TINY) | {"output_layer.weight": (128, 40)}
    with pytest.raises(ValueError, match=r"output_layer.weight has shape \[128, 40\]"):
        weight_table.check_stored(stored, TINY, "checkpoint X")
