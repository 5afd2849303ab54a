"""Megatron checkpoints: what megatron-core loads from them, what is read back, what is refused."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.description import Description, find_iteration, read_description
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.models import weight_table
from megashear.shape import ModelShape
from tests.ranks import run_ranks
from tests.unit.checkpoint.gpt_model import load_into_gpt_model
from tests.unit.checkpoint.shapes import GROUPED, MULTI_HEAD

Checkpoints = dict[str, tuple[Path, ModelShape, dict[str, Tensor]]]
Harmed = Callable[[Callable[[Path], object]], Path]
NAMES = pytest.mark.parametrize("name", ["grouped", "multi-head"])


@NAMES
def test_weights_are_read_back_bit_by_bit(checkpoints: Checkpoints, name: str) -> None:
    directory, shape, weights = checkpoints[name]
    read = CheckpointWeights(directory)
    assert (read.shape, read.description.iteration) == (shape, 120)
    assert list(read) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(read[name], weight), name


@NAMES
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_megatron_core_loads_every_weight_at_any_layout(
    checkpoints: Checkpoints, name: str, tp: int, pp: int
) -> None:
    directory, shape, weights = checkpoints[name]
    iteration = directory / "iter_0000120"
    ranks = run_ranks(tp * pp, lambda rank: load_into_gpt_model(iteration, shape, tp, pp))
    per_stage = shape.num_layers // pp
    for row, layer in weight_table.tensors(shape):
        parts = [weights[part.hf_name.format(layer=layer)] for part in row.parts]
        if layer is None:
            stage, own = (0 if "embedding" in row.name else pp - 1), row.name
        else:
            stage, own = layer // per_stage, row.name.format(layer=layer % per_stage)
        # a tensor rank's shard: its part of every fused weight, which is what it computes with
        axis = 1 if "linear_proj" in own or "linear_fc2" in own else 0
        for rank in range(tp):
            shards = parts
            if "norm" not in own:
                shards = [part.chunk(tp, dim=axis)[rank] for part in parts]
            local = replace(
                shape,
                num_query_groups=shape.num_query_groups // tp,
                num_attention_heads=shape.num_attention_heads // tp,
            )
            wanted = weight_table.fuse(row, shards, local)
            assert torch.equal(ranks[stage * tp + rank][own], wanted), (own, rank)


def test_the_order_inside_a_fused_weight_matters_to_megatron_core(
    checkpoints: Checkpoints,
) -> None:
    directory, shape, weights = checkpoints["grouped"]
    iteration = directory / "iter_0000120"
    loaded = run_ranks(1, lambda rank: load_into_gpt_model(iteration, shape, 1, 1))[0]
    parts = [weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    qkv = loaded["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert not torch.equal(qkv, torch.cat(parts))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_are_stored_in_the_format_asked_for(
    tmp_path: Path, checkpoints: Checkpoints, stored: torch.dtype
) -> None:
    _, shape, weights = checkpoints["grouped"]
    description = Description(shape=shape, iteration=0, stage="converted")
    written = write_weights(tmp_path / "out", weights.items(), description, dtype=stored)
    assert written == 2 * shape.num_params()
    for name, weight in CheckpointWeights(tmp_path / "out").items():
        assert torch.equal(weight, weights[name].to(stored)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"model to be written lacks 1 weights.*: model.norm.weight"),
        ({"x.bias": torch.ones(1)}, r"written has 1 weights this model does not know: x.bias"),
        ({"lm_head.weight": torch.ones(2, 40)}, r"lm_head.weight has shape \[2, 40\]"),
        (
            {"model.layers.1.mlp.up_proj.weight": torch.ones(96, 40).half()},
            "up_proj.weight are of torch.float32, torch.float16.*one dtype for the output",
        ),
    ],
)
def test_nothing_is_left_of_weights_that_are_not_the_models(
    tmp_path: Path, checkpoints: Checkpoints, change: dict[str, Any], message: str
) -> None:
    weights = {n: w for n, w in (checkpoints["grouped"][2] | change).items() if w is not None}
    description = Description(shape=GROUPED, iteration=0, stage="converted")
    with pytest.raises(ValueError, match=message):
        write_weights(tmp_path / "out", weights.items(), description)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(checkpoints: Checkpoints) -> None:
    directory, shape, weights = checkpoints["grouped"]
    with pytest.raises(ValueError, match="grouped exists; choose another output"):
        write_weights(directory, weights.items(), Description(shape=shape, iteration=0, stage="x"))


def test_descriptions_are_read_back(checkpoints: Checkpoints) -> None:
    directory = find_iteration(checkpoints["grouped"][0])
    assert directory == find_iteration(directory) == find_iteration(directory.parent, 120)
    assert read_description(directory) == Description(
        shape=GROUPED, iteration=120, stage="pretrain", token_ids={"bos_token_id": 7}
    )


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SHAPE = GROUPED.to_dict()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "megashear.json").unlink(), "has no megashear.json: not written by"),
        (lambda d: (d / "megashear.json").write_text("[]"), "megashear.json is broken: no JSON"),
        (lambda d: edit(d / "megashear.json", format=9), "format 9, this megashear reads 2; use"),
        (lambda d: edit(d / "megashear.json", color=1), r"megashear.json is broken: .*'color'"),
        (
            lambda d: edit(d / "megashear.json", shape=SHAPE | {"num_layers": 6}),
            r"has shape \[4, 40\], its shape in this model is \[6, 40\]",
        ),
        (lambda d: (d / ".metadata").unlink(), "is no checkpoint, or was never finished"),
        (lambda d: (d / ".metadata").write_bytes(b"\x80\x05"), r"\.metadata is broken"),
        (
            lambda d: (d / ".metadata").write_bytes(pickle.dumps({})),
            "holds a dict, not a checkpoint's metadata",
        ),
        (lambda d: (d / "__0_0.distcp").unlink(), "is incomplete: .* which is missing; copy it"),
        (
            lambda d: (d / "__0_0.distcp").write_bytes(b"short"),
            "ends at byte [0-9,]+ of __0_0.distcp, which is 5 bytes",
        ),
    ],
)
def test_broken_checkpoints_are_refused(
    harmed: Harmed, harm: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointWeights(harmed(harm))


def test_a_wrong_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere: it is not a directory"):
        CheckpointWeights(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="it is a Hugging Face directory: convert it first"):
        CheckpointWeights(tmp_path)


def test_another_models_checkpoint_is_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(ValueError, match=r"linear_qkv.weight has shape \[4, 128, 40\]"):
        CheckpointWeights(checkpoints["grouped"][0], shape=MULTI_HEAD)
