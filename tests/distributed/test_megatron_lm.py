"""Megatron-LM's checkpoints are read, and ours hold what it builds a model from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.__main__ import main
from megashear.checkpoint.description import Description, read_description
from megashear.checkpoint.megatron_lm_args import shape_of_arguments
from megashear.checkpoint.pickles import read_common
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.conversion.hf import HfWeights
from megashear.conversion.megatron_lm import MegatronLmWeights
from megashear.shape import ModelShape
from tests import megatron_lm
from tests.ranks import run_ranks
from tests.reference_llama import forward, random_weights, relative_error

OTHER_KERNELS = 1e-5  # relative, float32 (law 3)
VOCAB = 61
TOKENS = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(3))
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"group_query_attention": False, "num_query_groups": 1},
    "tied, biases": {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True},
    # waves long enough to be stretched
    "norms, stretched": {"qk_layernorm": True, "use_rope_scaling": True, "rotary_base": 1_000_000},
    "interpolated": {"rotary_seq_len_interpolation_factor": 4},
}
"""Arguments that differ from those of `megatron_lm.arguments`."""


def shape_of(args: argparse.Namespace) -> ModelShape:
    return shape_of_arguments(args, "the test", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each model as Megatron-LM writes it at TP 2 and PP 2; do not change them."""
    folder = tmp_path_factory.mktemp("megatron_lm")

    def write(name: str) -> Path:
        directory, args = folder / name, megatron_lm.arguments(**MODELS[name])
        shape = shape_of(args)
        if not directory.exists():
            weights = random_weights(shape)
            run_ranks(4, lambda rank: megatron_lm.write(directory, args, weights, shape, 2, 2))
        return directory

    return write


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_megatron_lm_is_read(written: Callable[[str], Path], name: str) -> None:
    args = megatron_lm.arguments(**MODELS[name])
    shape = shape_of(args)
    weights = random_weights(shape)
    read = MegatronLmWeights(written(name))
    assert read.shape == shape
    assert list(read) == list(weights)
    for weight, tensor in weights.items():
        assert torch.equal(read[weight], tensor), weight
    # and it is the model that megatron-core computes with them
    directory = written(name) / "iter_0000005"
    (theirs,) = run_ranks(1, lambda rank: logits_of(directory, args))
    ours = forward(dict(read), read.shape, TOKENS)
    assert relative_error(ours, theirs[..., :VOCAB]) < OTHER_KERNELS


def test_convert_makes_a_checkpoint_or_a_directory_of_it(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    source, name = written("norms, stretched"), "model.layers.2.self_attn.q_norm.weight"
    read = MegatronLmWeights(source)
    outputs = {"checkpoint": tmp_path / "ours", "hf": tmp_path / "hf"}
    for form, output in outputs.items():
        words = ["convert", "--input", source, "--output", output, "--output-format", form]
        assert main([str(word) for word in words]) == 0
    description = read_description(outputs["checkpoint"] / "iter_0000000")
    assert description.shape == read.shape
    assert description.details == {"megatron_lm_iteration": 5}
    found = CheckpointWeights(outputs["checkpoint"]), HfWeights(outputs["hf"])
    assert found[1].shape == read.shape
    for weights in found:
        assert list(weights) == list(read)
        assert all(torch.equal(weights[each], tensor) for each, tensor in read.items())
        assert not torch.equal(weights[name], read[name.replace("q_norm", "k_norm")])


@pytest.mark.parametrize("name", MODELS)
def test_megatron_core_builds_and_fills_the_model_from_our_checkpoint(
    tmp_path: Path, name: str
) -> None:
    shape = shape_of(megatron_lm.arguments(**MODELS[name]))
    weights = random_weights(shape)
    description = Description(shape=shape, iteration=7, stage="converted")
    write_weights(tmp_path / "ours", weights, description)
    directory = tmp_path / "ours" / "iter_0000007"
    common = read_common(directory)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 7)
    args = common["args"]
    if name == "grouped":  # and where a run pads the vocabulary, it loads the same checkpoint
        args.padded_vocab_size = 64
    (theirs,) = run_ranks(1, lambda rank: logits_of(directory, args))
    wanted = forward(weights, shape, TOKENS)
    assert relative_error(theirs[..., :VOCAB], wanted) < OTHER_KERNELS


def logits_of(directory: Path, args: argparse.Namespace) -> Tensor:
    return megatron_lm.logits(megatron_lm.load(directory, args), TOKENS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grouped", {"rotary_base": 10000}),
        ("grouped", {"norm_epsilon": 1e-5}),
        ("norms, stretched", {"use_rope_scaling": False}),
        ("interpolated", {"rotary_seq_len_interpolation_factor": None}),
    ],
)
def test_an_argument_that_is_lost_is_noticed(
    written: Callable[[str], Path], name: str, changes: dict[str, Any]
) -> None:
    other = megatron_lm.arguments(**{**MODELS[name], **changes})
    directory = written(name) / "iter_0000005"  # made before a rank is forked: ranks make none
    (theirs,) = run_ranks(1, lambda rank: logits_of(directory, other))
    read = MegatronLmWeights(written(name))
    ours = forward(dict(read), read.shape, TOKENS)
    assert relative_error(ours, theirs[..., :VOCAB]) > 100 * OTHER_KERNELS


def test_names_may_have_a_prefix_and_the_padding_may_be_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = megatron_lm.arguments(vocab_size=None)
    shape = replace(shape_of(args), vocab_size=VOCAB)
    weights = random_weights(shape)
    run_ranks(2, lambda rank: megatron_lm.write(tmp_path, args, weights, shape, 2, prefix="model."))
    read = MegatronLmWeights(tmp_path, vocab_size=VOCAB)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    assert caplog.messages == []
    padded = MegatronLmWeights(tmp_path / "iter_0000005")
    assert padded.shape == replace(shape, vocab_size=64)
    assert padded["lm_head.weight"][VOCAB:].eq(9.0).all()
    assert "of the 64 rows of its vocabulary are tokens; all are kept" in caplog.text
    with pytest.raises(ValueError, match=r"--vocab-size is 65, and .* stores 64 rows"):
        MegatronLmWeights(tmp_path, vocab_size=65)
