"""transformers loads what we write, and computes what the plain LLaMA computes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from megashear.checkpoint.cut import cut  # noqa: E402
from megashear.conversion import hf  # noqa: E402
from megashear.shape import ModelShape  # noqa: E402
from tests.reference_llama import forward, random_weights, relative_error  # noqa: E402
from tests.unit.checkpoint.shapes import (  # noqa: E402
    CUT_GROUPED,
    CUT_MULTI_HEAD,
    GROUPED,
    MULTI_HEAD,
    TOKENS,
    random_gates,
)

OTHER_KERNELS = 1e-5  # relative, float32 (laws 2 and 3)


def logits_of(directory: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("shape", [MULTI_HEAD, GROUPED, CUT_MULTI_HEAD, CUT_GROUPED])
def test_transformers_computes_the_same_logits(tmp_path: Path, shape: ModelShape) -> None:
    weights = random_weights(shape)
    hf.write_directory(tmp_path / "model", weights.items(), shape)
    logits = logits_of(tmp_path / "model")
    assert relative_error(logits, forward(weights, shape, TOKENS)) < OTHER_KERNELS
    other = replace(shape, norm_epsilon=1e-2)
    assert relative_error(logits, forward(weights, other, TOKENS)) > 100 * OTHER_KERNELS


@pytest.mark.parametrize(
    ("source", "target"), [(MULTI_HEAD, CUT_MULTI_HEAD), (GROUPED, CUT_GROUPED)]
)
def test_cut_model_in_transformers_equals_masked_model(
    tmp_path: Path, source: ModelShape, target: ModelShape
) -> None:
    weights, gates = random_weights(source), random_gates(source, target)
    masked = forward(weights, source, TOKENS, gates)
    hf.write_directory(tmp_path / "model", cut(weights, gates, source, target), target)
    assert relative_error(logits_of(tmp_path / "model"), masked) < OTHER_KERNELS
    gates["group" if "group" in gates else "head"] *= 0.9  # the twin: other gates are noticed
    hf.write_directory(tmp_path / "twin", cut(weights, gates, source, target), target)
    assert relative_error(logits_of(tmp_path / "twin"), masked) > 0.01


@pytest.mark.parametrize("reader", ["rope_theta", "rope_parameters"])
def test_another_rotary_base_is_loaded_from_either_field(tmp_path: Path, reader: str) -> None:
    shape = replace(GROUPED, rotary_base=500.0)
    weights = random_weights(shape)
    hf.write_directory(tmp_path / "model", weights.items(), shape)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config[{"rope_theta": "rope_parameters", "rope_parameters": "rope_theta"}[reader]]
    path.write_text(json.dumps(config))
    logits = logits_of(tmp_path / "model")
    assert relative_error(logits, forward(weights, shape, TOKENS)) < OTHER_KERNELS
    assert relative_error(logits, forward(weights, GROUPED, TOKENS)) > 0.01


def test_directories_of_transformers_are_read(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        max_position_embeddings=4096,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    read = hf.HfWeights(tmp_path)
    assert read.shape == replace(GROUPED, rotary_base=500.0)
    assert dict(read).keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(read[name], weight), name


def test_number_format_is_the_one_written(tmp_path: Path) -> None:
    weights = random_weights(GROUPED)
    hf.write_directory(tmp_path / "model", weights.items(), GROUPED, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wide", "number_format"), [("norm", torch.float32), ("nothing", torch.bfloat16)]
)
def test_no_weight_is_rounded_by_a_reader_of_the_config(
    tmp_path: Path, wide: str, number_format: torch.dtype
) -> None:
    weights = {
        name: weight if wide in name else weight.bfloat16()
        for name, weight in random_weights(GROUPED).items()
    }
    hf.write_directory(tmp_path / "model", weights.items(), GROUPED)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["torch_dtype"] == str(number_format).removeprefix("torch.")
    # as vLLM and transformers load it unless told otherwise
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == number_format
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.float(), weights[name].float()), name
    # the twin: the format of most weights would round the others
    if wide == "norm":
        twin = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.bfloat16
        )
        name = "model.norm.weight"
        assert not torch.equal(twin.state_dict()[name].float(), weights[name])
