"""Law 3 for every family: from transformers to Megatron at any layout, and back bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

transformers = pytest.importorskip("transformers")

from megashear.checkpoint.store import load_weights  # noqa: E402
from megashear.config import ModelConfig, ParallelConfig  # noqa: E402
from megashear.conversion.hf import HfWeights  # noqa: E402
from megashear.conversion.hf_config import config_of_shape  # noqa: E402
from megashear.conversion.sharded_hf import load_hf  # noqa: E402
from megashear.models import weight_table  # noqa: E402
from megashear.models.core import rotary_frequencies  # noqa: E402
from megashear.models.llama import build_chunks  # noqa: E402
from megashear.parallel.groups import ParallelGroups  # noqa: E402
from megashear.shape import PRESETS, ModelShape  # noqa: E402
from tests.conversions import hf_to_megatron, megatron_to_hf  # noqa: E402
from tests.distributed.masked_model import (  # noqa: E402
    by_megatron_name,
    own_logits,
    whole_logits,
)
from tests.families import FAMILIES, pruned  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.tiny import layout, microbatches, relative_error, set_weights  # noqa: E402

OTHER_KERNELS = 1e-5
"""Relative (law 3); float32 sums of other kernels, over at most 4 shards, in another order."""
ROUNDING = 1e-6
"""Relative; a few roundings of float32 in another order."""
BROKEN = 0.01
"""Relative; whatever is broken here is off by more."""

MODELS = {
    **{name: replace(shape, vocab_size=65) for name, shape in FAMILIES.items()},
    **{
        f"{name}-pruned": pruned(FAMILIES[name])
        for name in ("llama3.2", "mistral", "qwen2", "qwen3")
    },
}
"""What is converted; a vocabulary of 65 is padded wherever TP is not 1."""
LAYOUTS = [layout(), layout(tp=2), layout(tp=4), layout(tp=2, pp=2)]


K, B = "self_attn.{}_proj.weight", "self_attn.{}_proj.bias"
Weights = dict[str, Tensor]
"""By Hugging Face name."""


class Converted(NamedTuple):
    """One model on its way there and back."""

    shape: ModelShape
    hf: Path
    checkpoint: Path
    logits: Tensor
    """What transformers computes, [sequences, s, v]."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for number, (name, shape) in enumerate(MODELS.items()):
        model = random_model(shape, seed=number)
        model.save_pretrained(folder / name / "hf")
        with torch.no_grad():
            logits = model(torch.cat([batch.tokens for batch in microbatches(0)])).logits
        made[name] = Converted(shape, folder / name / "hf", folder / name / "checkpoint", logits)

    def convert(rank: int) -> None:
        for model in made.values():
            hf_to_megatron(model.hf, model.checkpoint, progress=False)

    run_ranks(1, convert)
    return made


def random_model(shape: ModelShape, seed: int) -> Any:
    """A model of transformers' own, in float32, of which no bias is 0 and no norm 1."""
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_epsilon,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_parameters": {"rope_theta": shape.rotary_base, "rope_type": "default"},
    }
    scaling = shape.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        fields["rope_parameters"] |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        fields["rope_parameters"] |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if shape.family == "mistral":
        fields["sliding_window"] = shape.sliding_window
    config = transformers.AutoConfig.for_model(shape.family, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if name.endswith("bias") else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            parameter += float("norm" in name)
    return model.eval()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=["tp1-pp1", "tp2-pp1", "tp4-pp1", "tp2-pp2"])
def test_every_family_computes_at_any_layout_what_transformers_does(
    converted: Mapping[str, Converted], parallel: ParallelConfig
) -> None:
    fitting = {
        name: model
        for name, model in converted.items()
        if model.shape.num_query_groups % parallel.tensor_model_parallel_size == 0
        and model.shape.num_layers % parallel.pipeline_model_parallel_size == 0
    }
    from_hf = parallel.model_parallel_size > 1  # the other way in, each rank its own slices

    def body(rank: int) -> dict[str, Any]:
        groups = ParallelGroups.create(parallel)
        held = {}
        for name, model in fitting.items():
            chunks = build_chunks(model.shape, groups, parallel, ModelConfig(), variant="local")
            load_weights(model.checkpoint, chunks)
            logits = own_logits(chunks, microbatches(0))
            if from_hf:
                load_hf(model.hf, chunks, groups, progress=False)
                for ours, again in zip(logits, own_logits(chunks, microbatches(0))):
                    assert torch.equal(ours, again), name
            held[name] = {"tensor_rank": groups.tensor_rank, "logits": logits}
        return held

    ranks = run_ranks(parallel.model_parallel_size, body)
    assert fitting.keys() >= FAMILIES.keys() - {"llama2-mha"}
    for name, model in fitting.items():
        logits = whole_logits([rank[name] for rank in ranks])[..., : model.shape.vocab_size]
        assert relative_error(logits, model.logits) < OTHER_KERNELS, name


@pytest.mark.parametrize("preset", ["llama2-7b", "llama3-8b", "llama3.1-8b", "llama3.2-1b"])
def test_rotary_tables_of_released_models_are_those_of_transformers(preset: str) -> None:
    shape = PRESETS[preset]
    config = transformers.AutoConfig.for_model(**config_of_shape(shape, dtype="bfloat16"))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert rotary.attention_scaling == 1.0
    found = rotary_frequencies(shape)
    torch.testing.assert_close(found, rotary.inv_freq, rtol=ROUNDING, atol=0.0)
    if shape.rope_scaling is not None:
        plain = rotary_frequencies(replace(shape, rope_scaling=None))
        assert (found / plain).min() == pytest.approx(1 / shape.rope_scaling.factor)
        assert (found / plain).max() == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_is_the_same(
    converted: Mapping[str, Converted], tmp_path: Path, name: str
) -> None:
    shape, hf, checkpoint, logits = converted[name]
    assert HfWeights(hf).shape == shape
    megatron_to_hf(checkpoint, tmp_path / "back", progress=False)
    before, after = (load_file(d / "model.safetensors") for d in (hf, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert torch.equal(after[key], weight), key
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert type(model) is type(theirs)
    with torch.no_grad():
        again = model(torch.cat([batch.tokens for batch in microbatches(0)])).logits
    assert torch.equal(again, logits)


def broken_models(converted: Mapping[str, Converted]) -> dict[str, tuple[str, ModelShape, Weights]]:
    """What is broken: the model it is broken in, and the shape and weights that are built."""
    read = {name: dict(HfWeights(model.hf)) for name, model in converted.items()}
    found: dict[str, tuple[str, ModelShape, Weights]] = {}

    def add(what: str, name: str, weights: Weights, **changes: Any) -> None:
        found[what] = (name, replace(MODELS[name], **changes), weights)

    def swapped(name: str, one: str, other: str) -> Weights:
        at = "model.layers.1."
        pair = {at + one: read[name][at + other], at + other: read[name][at + one]}
        return {**read[name], **pair}

    for name in ("llama2", "qwen2", "qwen3-tied", "llama3.2"):
        add(f"nothing in {name}", name, read[name])
    add("keys for values", "llama2", swapped("llama2", K.format("k"), K.format("v")))
    add(
        "up before gate",
        "mistral",
        swapped("mistral", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    )
    heads = "model.layers.1.self_attn.q_proj.weight"
    turned = read["llama2"][heads].unflatten(0, (2, 4, 8)).transpose(0, 1).flatten(0, 2)
    add("heads by another group", "llama2", {**read["llama2"], heads: turned})
    add("biases for each other", "qwen2", swapped("qwen2", B.format("k"), B.format("v")))
    dropped = {n: w for n, w in read["qwen2"].items() if not n.endswith("bias")}
    add("no biases", "qwen2", dropped, qkv_bias=False)
    dropped = {n: w for n, w in read["qwen3"].items() if "q_norm" not in n and "k_norm" not in n}
    add("no head norms", "qwen3", dropped, qk_norm=False)
    norms = swapped("qwen3", "self_attn.q_norm.weight", "self_attn.k_norm.weight")
    norms["model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)
    add("a head norm of ones", "qwen3", norms)
    add("no stretching", "llama3.1", read["llama3.1"], rope_scaling=None)
    add("no linear stretching", "llama2-linear", read["llama2-linear"], rope_scaling=None)
    add("another base", "llama3", read["llama3"], rotary_base=10000.0)
    embedding = read["llama3.2"]["model.embed_tokens.weight"]
    add(
        "an output layer of its own",
        "llama3.2",
        {**read["llama3.2"], "lm_head.weight": embedding.roll(1, dims=0)},
        tied_embeddings=False,
    )
    return found


def test_whatever_is_lost_or_swapped_on_the_way_is_noticed(
    converted: Mapping[str, Converted],
) -> None:
    broken = broken_models(converted)

    def body(rank: int) -> dict[str, Tensor]:
        groups = ParallelGroups.create(layout())
        held = {}
        for what, (_, shape, weights) in broken.items():
            chunks = build_chunks(shape, groups, layout(), ModelConfig(), variant="local")
            set_weights(chunks, by_megatron_name(weights, shape), 0, 1)
            held[what] = torch.cat(own_logits(chunks, microbatches(0)))
        return held

    for what, logits in run_ranks(1, body)[0].items():
        error = relative_error(logits, converted[broken[what][0]].logits)
        assert error < OTHER_KERNELS if what.startswith("nothing") else error > BROKEN, what


@pytest.mark.parametrize("part", ["linear_qkv.bias", "linear_qkv.weight"])
def test_queries_keys_and_values_one_after_the_other_are_noticed(
    converted: Mapping[str, Converted], part: str
) -> None:
    shape, hf, _, logits = converted["qwen2"]
    weights = dict(HfWeights(hf))
    whole = by_megatron_name(weights, shape)
    for row, layer in weight_table.tensors(shape):
        if row.name.endswith(part):
            stacked = [weights[p.hf_name.format(layer=layer)] for p in row.parts]
            whole[row.name.format(layer=layer)] = torch.cat(stacked)

    def body(rank: int) -> Tensor:
        groups = ParallelGroups.create(layout())
        chunks = build_chunks(shape, groups, layout(), ModelConfig(), variant="local")
        set_weights(chunks, whole, 0, 1)
        return torch.cat(own_logits(chunks, microbatches(0)))

    assert relative_error(run_ranks(1, body)[0], logits) > BROKEN


def test_a_tied_model_called_untied_lacks_its_output_layer(
    converted: Mapping[str, Converted], tmp_path: Path
) -> None:
    shutil.copytree(converted["llama3.2"].hf, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks one weight, lm_head\.weight, and its config"):
        HfWeights(tmp_path / "hf")
