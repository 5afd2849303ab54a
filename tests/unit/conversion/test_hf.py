"""Hugging Face directories written and read back, and every refusal of foreign ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megashear.checkpoint.description import find_iteration, read_description, write_description
from megashear.checkpoint.details import HF_CONFIG
from megashear.conversion import hf
from megashear.conversion.hf_config import config_of_shape, read_shape, shape_of_config
from megashear.conversion.sources import open_hf
from megashear.files import integrity
from megashear.files.integrity import DamagedError
from megashear.models.formats import DTYPES
from megashear.shape import ModelShape
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.families import FAMILIES
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import CUT_GROUPED, GROUPED, MULTI_HEAD

WEIGHTS = random_weights(GROUPED)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    hf.write_directory(tmp_path / "model", WEIGHTS.items(), GROUPED)
    return tmp_path / "model"


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))


@pytest.mark.parametrize("shape", [GROUPED, MULTI_HEAD, CUT_GROUPED])
def test_shapes_survive_config_json(shape: ModelShape) -> None:
    assert shape_of_config(config_of_shape(shape, dtype="float32"), "X") == shape


@pytest.mark.parametrize("max_shard_bytes", [hf.MAX_SHARD_BYTES, 40_000])
def test_weights_are_read_back_bit_by_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    output = tmp_path / "model"
    written = hf.write_directory(output, WEIGHTS.items(), GROUPED, max_shard_bytes=max_shard_bytes)
    read = hf.HfWeights(output)
    assert list(read) == list(WEIGHTS)
    assert all(torch.equal(read[name], weight) for name, weight in WEIGHTS.items())
    files = sorted(path for path in output.iterdir() if path.suffix == ".safetensors")
    assert (output / hf.INDEX).exists() == (len(files) > 1)
    assert written == 4 * GROUPED.num_params()
    if max_shard_bytes == 40_000:
        assert len(files) > 3
        assert all(path.stat().st_size < 40_000 + 2_000 for path in files)  # weights and header


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 3):
        hf.write_directory(
            tmp_path / str(workers), WEIGHTS, GROUPED, max_shard_bytes=40_000, workers=workers
        )
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "13")
    assert one == three


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    mixed = {
        name: weight.bfloat16() if "norm" in name else weight for name, weight in WEIGHTS.items()
    }
    hf.write_directory(tmp_path / "model", mixed, GROUPED)
    read = load_file(tmp_path / "model" / hf.SINGLE)
    assert read.keys() == mixed.keys()
    for name, weight in mixed.items():
        assert read[name].dtype == weight.dtype
        assert torch.equal(read[name], weight), name
        assert read[name].data_ptr() % weight.itemsize == 0, f"{name} is not aligned"


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_stored_in_the_format_asked_for(tmp_path: Path, dtype: str) -> None:
    hf.write_directory(tmp_path / "model", WEIGHTS.items(), GROUPED, dtype=dtype)
    for name, weight in hf.HfWeights(tmp_path / "model").items():
        assert torch.equal(weight, WEIGHTS[name].to(DTYPES[dtype])), name
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == dtype


def test_nothing_is_left_of_a_directory_that_could_not_be_finished(tmp_path: Path) -> None:
    weights = dict(WEIGHTS)
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights of this model: model.norm.weight"):
        hf.write_directory(tmp_path / "model", weights.items(), GROUPED)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(directory: Path) -> None:
    before = (directory / hf.SINGLE).read_bytes()
    with pytest.raises(ValueError, match="model exists; choose another output"):
        hf.write_directory(directory, WEIGHTS.items(), GROUPED)
    assert (directory / hf.SINGLE).read_bytes() == before


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is 'fp8', wanted one of float32, bfloat16"):
        hf.write_directory(tmp_path / "model", WEIGHTS.items(), GROUPED, dtype="fp8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma', wanted one of llama, mistral, qwen2"),
        ({"model_type": "qwen2"}, r"architectures is \['Llama.*'\], wanted \['Qwen2ForCausalLM'\]"),
        ({"architectures": ["LlamaModel"]}, r"architectures is \['LlamaModel'\], wanted"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", wanted "silu"'),
        ({"attention_bias": True}, "attention_bias is true, wanted false"),
        ({"mlp_bias": True}, "mlp_bias is true, wanted false"),
        ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2; it must be true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, wanted 1.0"),
        ({"sliding_window": 4096}, "sliding_window is 4096, wanted absent or null"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*save the model in float"),
        ({"auto_map": {"AutoModel": "x.X"}}, "auto_map is .*never run"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0, wanted 1.0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: low_freq_factor is missing; it must be a positive number",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "contradicts itself: rope_scaling .*linear.* and rope_parameters .*default",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [1.0]}},
            "rope_type 'linear' has no short_factor",
        ),
        *(
            ({"rope_parameters": {"rope_type": kind}}, f"rope_parameters has rope_type '{kind}'")
            for kind in ("yarn", "dynamic", "longrope", "proportional")
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention, wanted"),
        ({"use_sliding_window": True}, "use_sliding_window is true, wanted false"),
        (
            {"nope_interval": 4, "clip_qkv": 8.0, "absent": None},
            r"does not know.*: nope_interval \(4\), clip_qkv \(8.0\); if they do not, remove them",
        ),
        ({"is_causal": False}, "is_causal is false, wanted true"),
        ({"layer_types": 5}, "layer_types is 5; it must be a list or null"),
        ({"layer_types": [[1]]}, r"layer_types has \[1\], wanted full_attention alone"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], wanted one of llama"),
        ({"rope_scaling": {"rope_type": [1]}}, r"rope_scaling has rope_type \[1\], wanted one of"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a positive number"),
        ({"per_layer_config": {"0": {"x": 1}}}, "per_layer_config is .*, wanted"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5, wanted 1.0",
        ),
        ({"rope_theta": 5e5}, r"contradicts itself: .*theta 10000 and rope_theta 500000"),
        ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object or null"),
        ({"hidden_size": "drop"}, "hidden_size is missing; it must be a positive integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; it must be a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a positive number"),
        ({"head_dim": None, "num_attention_heads": 7}, "head_dim is not given and hidden_size 40"),
    ],
)
def test_other_mathematics_is_refused(
    directory: Path, fields: dict[str, Any], message: str
) -> None:
    edit_config(directory, **fields)
    with pytest.raises(ValueError, match=message):
        read_shape(directory)


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"rope_theta": 5e5, "rope_parameters": "drop"}, 5e5),
        ({"rope_theta": "drop", "rope_parameters": {"rope_theta": 7e4}}, 7e4),
        ({"rope_theta": "drop", "rope_parameters": None, "rope_scaling": "drop"}, 1e4),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "default"}}, 1e4),
    ],
)
def test_rotary_base_is_found_where_any_release_put_it(
    directory: Path, fields: dict[str, Any], base: float
) -> None:
    edit_config(directory, **fields)
    assert read_shape(directory).rotary_base == base


PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2": {
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
    },
    "Falcon 3": {"activation": "swiglu", "sliding_window": None},
    "Mistral derivative": {"neftune_noise_alpha": 0.0, "use_flash_attn": True, "eos_token": "</s>"},
    "of a classifier": {"classifier_dropout": 0.1, "loss_type": "ForCausalLM", "num_labels": 2},
    "of other tools": {
        "rotary_percent": 1.0,
        "rope_traditional": False,
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "use_qkv_bias": False,
        "quantization": None,
        "mergekit_version": "0.0.5",
    },
}
"""What published config.json files have beside the model's extents."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_models_say_beside_their_extents_is_accepted(
    directory: Path, name: str
) -> None:
    wanted = read_shape(directory)
    edit_config(directory, **PUBLISHED[name])
    assert read_shape(directory) == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_interleaved": True}, "rope_interleaved is true, wanted false"),
        ({"is_llama_config": False}, "is_llama_config is false, wanted true"),
        ({"rotary_percent": 0.25}, "rotary_percent is 0.25, wanted 1.0"),
        ({"rope_ratio": 2.0}, "rope_ratio is 2.0, wanted 1.0"),
        ({"activation": "geglu"}, 'activation is "geglu", wanted "silu" or "swiglu" or "swish"'),
        ({"norm_type": "layernorm"}, 'norm_type is "layernorm", wanted "rmsnorm" or'),
        ({"position_embedding_type": "alibi"}, 'position_embedding_type is "alibi", wanted "rope"'),
        ({"use_qkv_bias": True}, "use_qkv_bias is true, wanted false"),
        ({"quantization": {"bits": 4}}, "quantization is .*wanted absent or null; save the model"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1, wanted 0"),
    ],
)
def test_the_same_fields_at_a_value_that_changes_something_are_refused(
    directory: Path, fields: dict[str, Any], message: str
) -> None:
    edit_config(directory, **fields)
    with pytest.raises(ValueError, match=message):
        read_shape(directory)


def test_what_is_not_used_comes_back_as_it_went_in(directory: Path, tmp_path: Path) -> None:
    kept = {"attention_dropout": 0.1, "initializer_range": 0.04, "use_cache": False}
    edit_config(directory, **kept)
    hf_to_megatron(directory, tmp_path / "there")
    megatron_to_hf(tmp_path / "there", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: back[name] for name in kept} == kept
    # what is of another kind is left behind, and nothing is written as it was never said
    edit_config(directory, attention_dropout=True, initializer_range=None, use_cache="yes")
    assert open_hf(directory).kept_fields == {}
    edit_config(directory, attention_dropout="drop", initializer_range=1, use_cache="drop")
    assert open_hf(directory).kept_fields == {"initializer_range": 1}
    assert config_of_shape(GROUPED, dtype="float32")["use_cache"] is True


def test_a_foreign_checkpoint_puts_no_other_field_into_config_json(
    directory: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "there"
    hf_to_megatron(directory, checkpoint)
    iteration = find_iteration(checkpoint)
    description = read_description(iteration)
    foreign = {
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
        "quantization_config": {"bits": 4},
        "architectures": ["Other"],
        "model_type": "other",
    }

    def describe(kept: Any) -> None:
        write_description(iteration, replace(description, details={HF_CONFIG: kept}))
        integrity.write(iteration)

    describe({"use_cache": False} | foreign)
    assert read_description(iteration).hf_config == {HF_CONFIG: {"use_cache": False}}
    megatron_to_hf(checkpoint, tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["use_cache"] is False  # what is kept still comes back
    assert back["architectures"] == ["LlamaForCausalLM"]
    assert back["model_type"] == "llama"
    assert not {"auto_map", "quantization_config"} & back.keys()
    describe(["use_cache"])
    with pytest.raises(
        DamagedError, match=r"in its details, hf_config is \['use_cache'\]; wanted dict"
    ):
        read_description(iteration)


def test_fields_without_effect_are_ignored(directory: Path) -> None:
    fields = {"pretraining_tp": 2, "use_cache": False, "head_dim": None, "_name_or_path": "x"}
    edit_config(directory, **fields, num_attention_heads=5, num_key_value_heads=None)
    shape = read_shape(directory)
    assert (shape.head_dim, shape.num_query_groups) == (8, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_survives_config_json(name: str) -> None:
    shape = FAMILIES[name]
    for release in (("rope_parameters",), ("rope_scaling", "rope_theta")):  # 5 and before
        config = config_of_shape(shape, dtype="float32")
        for field in release:
            del config[field]
        assert shape_of_config(config, "X") == shape
    dropped = config_of_shape(shape, dtype="float32") | {"rope_scaling": None}
    if shape.rope_scaling is not None:  # the twin: one of two places speaks up
        del dropped["rope_parameters"]
        assert shape_of_config(dropped, "X") != shape


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_mean_what_transformers_makes_of_them(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    least = {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 1024,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
    }
    theirs = transformers.AutoConfig.for_model(**least)
    shape = shape_of_config(least, "X")
    assert shape.num_query_groups == theirs.num_key_value_heads
    assert shape.head_dim == getattr(theirs, "head_dim", 16)
    assert shape.norm_epsilon == theirs.rms_norm_eps
    assert shape.rotary_base == theirs.rope_parameters["rope_theta"]
    assert shape.max_position_embeddings == theirs.max_position_embeddings
    assert shape.tied_embeddings == theirs.tie_word_embeddings
    assert shape.sliding_window == getattr(theirs, "sliding_window", None)
    # and every field that transformers itself writes is known
    assert shape_of_config(theirs.to_dict(), "X") == shape
    with pytest.raises(ValueError, match=r"does not know.*: clip_qkv"):
        shape_of_config(theirs.to_dict() | {"clip_qkv": 8.0}, "X")
    alike = shape_of_config(least | {"num_key_value_heads": None}, "X")
    assert alike.num_query_groups == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": True}, "qkv_bias is True, and a llama model .* has False"),
        ({"qk_norm": True}, "qk_norm is True, and a llama model .* has False"),
        ({"family": "qwen2"}, "qkv_bias is False, and a qwen2 model .* has True"),
        ({"sliding_window": 8}, "sliding_window is 8, and a llama model .* has none"),
    ],
)
def test_what_no_config_json_describes_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    odd = replace(GROUPED, **change)
    with pytest.raises(ValueError, match=message):
        hf.write_directory(tmp_path / "model", random_weights(odd).items(), odd)
    assert not list(tmp_path.iterdir())


def test_an_output_layer_beside_a_tied_embedding_must_be_the_embedding(tmp_path: Path) -> None:
    shape = FAMILIES["qwen3-tied"]
    weights = random_weights(shape)
    hf.write_directory(tmp_path / "model", weights.items(), shape)
    embedding = weights["model.embed_tokens.weight"]
    resave(tmp_path / "model", lambda w: w.update({"lm_head.weight": embedding.clone()}))
    assert list(hf.HfWeights(tmp_path / "model")) == list(weights)
    other = embedding.clone()
    other[63, 39] += 1.0
    resave(tmp_path / "model", lambda w: w.update({"lm_head.weight": other}))
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight; set"):
        hf.HfWeights(tmp_path / "model")


def truncate(directory: Path) -> None:
    data = (directory / hf.SINGLE).read_bytes()
    (directory / hf.SINGLE).write_bytes(data[: len(data) // 2])


def foreign(directory: Path) -> None:
    (directory / hf.SINGLE).rename(directory / "pytorch_model.bin")


def wrap(weights: dict[str, torch.Tensor], names: list[str], wrapper: str = "_orig_mod") -> None:
    for name in names:
        weights[f"{wrapper}.{name}"] = weights.pop(name)


def resave(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / hf.SINGLE)
    change(weights)
    save_file(weights, directory / hf.SINGLE)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json; is it the right directory"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "holds a list, not a JSON object"),
        (lambda d: (d / hf.SINGLE).unlink(), "has neither model.safetensors nor .*index.json$"),
        (
            lambda d: (d / hf.SINGLE).rename(d / "model-00001-of-00001.safetensors"),
            r"of weights it holds model-00001-of-00001\.safetensors, whose index is missing: down",
        ),
        (
            lambda d: (d / hf.SINGLE).rename(d / "consolidated.00.pth"),
            r"of weights it holds consolidated\.00\.pth: save the model with transformers'",
        ),
        (
            truncate,
            r"model.safetensors \([\d,]+ bytes\) cannot be read.*its header wants 333,088 bytes",
        ),
        (foreign, r"pytorch_model\.bin is not in the format that torch\.save writes since"),
        (
            lambda d: resave(d, lambda w: w.pop("lm_head.weight")),
            "lacks one weight, lm_head.weight, and its config.json does not say tie_word_emb",
        ),
        (
            lambda d: resave(d, lambda w: wrap(w, list(w))),
            r"all 39 weights begin with '_orig_mod\.', which torch.compile puts there; save the",
        ),
        (
            lambda d: resave(d, lambda w: wrap(w, list(w), "language_model")),
            r"all 39 weights begin with 'language_model\.'; save the model alone, not the one it",
        ),
        (
            lambda d: resave(d, lambda w: wrap(w, list(w)[:2])),
            "has 2 weights this model does not know: _orig_mod.*; it lacks 2 weights",
        ),
        (
            lambda d: resave(d, lambda w: w.update({"x.bias": torch.ones(2)})),
            "has 1 weights this model does not know: x.bias",
        ),
        (
            lambda d: resave(d, lambda w: w.update({"model.norm.weight": torch.ones(41)})),
            r"model.norm.weight has shape \[41\], its shape in this model is \[40\]",
        ),
        (
            lambda d: resave(d, lambda w: w.update({"model.norm.weight": torch.ones(40).char()})),
            "model.norm.weight is stored as I8, wanted one of",
        ),
    ],
)
def test_broken_directories_are_refused(
    directory: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(directory)
    with pytest.raises(ValueError, match=message):
        hf.HfWeights(directory)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Hugging Face checkpoint at .*nowhere"):
        hf.HfWeights(tmp_path / "nowhere")


def test_stored_rotary_tables_are_passed_over(directory: Path) -> None:
    names = ("inv_freq", "cos_cached", "sin_cached")
    table = {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4) for name in names}
    resave(directory, lambda weights: weights.update(table))
    assert list(hf.HfWeights(directory)) == list(WEIGHTS)
    with pytest.raises(KeyError):
        hf.HfWeights(directory)["model.layers.0.self_attn.rotary_emb.inv_freq"]


def reindex(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / hf.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


FIRST, LAST = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i["weight_map"].update({FIRST: i["weight_map"][LAST]}),
            r"puts model.embed_tokens.weight into model-(\d+)-of-\1.*, it is in model-00001-of-",
        ),
        (
            lambda i: i["weight_map"].update({"x.weight": i["weight_map"][LAST]}),
            "puts x.weight into .*, it is in none of them; the files may be of two downloads",
        ),
        (lambda i: i["weight_map"].pop(FIRST), "does not list model.embed_tokens.weight of model-"),
        (lambda i: i.update({"metadata": {"total_size": "?"}}), "is not an index of safetensors"),
    ],
)
def test_an_index_of_other_files_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    hf.write_directory(tmp_path / "model", WEIGHTS, GROUPED, max_shard_bytes=40_000)
    reindex(tmp_path / "model", lambda index: index["metadata"].update({"total_parameters": 1}))
    assert len(hf.HfWeights(tmp_path / "model")) == len(WEIGHTS)  # fields without effect
    reindex(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        hf.HfWeights(tmp_path / "model")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    hf.write_directory(tmp_path / "model", WEIGHTS, GROUPED, max_shard_bytes=40_000)
    sorted((tmp_path / "model").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-.*, which is missing; download"):
        hf.HfWeights(tmp_path / "model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "b.safetensors"}}, "names b.safetensors, which is missing"),
        ({"weight_map": {"a": "../b.safetensors"}}, "is not a file inside of"),
        ({}, "is not an index of safetensors: no weight_map in it"),
    ],
)
def test_broken_indexes_are_refused(directory: Path, index: dict[str, Any], message: str) -> None:
    (directory / hf.SINGLE).unlink()
    (directory / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        hf.HfWeights(directory)


def test_a_weight_in_two_files_is_refused_where_they_differ(directory: Path) -> None:
    one, two = "one.safetensors", "two.safetensors"
    save_file(WEIGHTS, directory / one)
    again = WEIGHTS["lm_head.weight"].clone()
    save_file({"lm_head.weight": again}, directory / two)
    (directory / hf.SINGLE).unlink()
    index = dict.fromkeys(WEIGHTS, one) | {"lm_head.weight": two}
    (directory / hf.INDEX).write_text(json.dumps({"weight_map": index}))
    assert all(torch.equal(hf.HfWeights(directory)[name], w) for name, w in WEIGHTS.items())
    again[63, 39] += 1
    save_file({"lm_head.weight": again}, directory / two)
    with pytest.raises(
        ValueError, match=r"two.safetensors: lm_head.weight is in one.safe.* too, with an"
    ):
        hf.HfWeights(directory)
