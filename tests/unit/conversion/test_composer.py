"""Models of LLM-Shearing are read by Hugging Face name, and what is no such model is refused."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.conversion.composer import ComposerWeights
from megashear.files.torch_files import load_mapped
from tests.composer import state_dict, write_trainer
from tests.reference_llama import forward, random_weights, relative_error
from tests.unit.checkpoint.shapes import CUT_GROUPED, CUT_MULTI_HEAD, TOKENS

READ: dict[str, Any] = {"head_dim": 8, "norm_epsilon": 1e-3, "rotary_base": 500.0}
SHAPE = replace(CUT_MULTI_HEAD, norm_epsilon=1e-3, rotary_base=500.0)
"""A pruned model: the head dim is not hidden size over heads."""
WEIGHTS = random_weights(SHAPE)


def write_state_dict(path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(state_dict(weights), path)


@pytest.mark.parametrize("write", [write_state_dict, write_trainer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_read_bit_by_bit(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], None], dtype: torch.dtype
) -> None:
    weights = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    write(tmp_path / "latest-rank0.pt", weights)
    read = ComposerWeights(tmp_path / "latest-rank0.pt", **READ)
    assert read.shape == SHAPE
    assert list(read) == list(weights)
    assert read.dtypes == dict.fromkeys(weights, dtype)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


def test_what_the_tensors_do_not_say_counts(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model.pt", WEIGHTS)
    wanted = forward(WEIGHTS, SHAPE, TOKENS)
    for changes in ({}, {"norm_epsilon": 0.1}, {"rotary_base": 10000.0}, {"head_dim": 10}):
        read = ComposerWeights(tmp_path / "model.pt", **{**READ, **changes})
        error = relative_error(forward(dict(read), read.shape, TOKENS), wanted)
        assert (error == 0) == (not changes), changes


def table(head_dim: int, base: float) -> Tensor:
    return torch.tensor([base ** (-2 * pair / head_dim) for pair in range(head_dim // 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotary_table_of_the_file_must_be_that_of_the_flags(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "model.pt"
    torch.save(state_dict(WEIGHTS, table(8, 500.0).to(dtype)), path)
    assert ComposerWeights(path, **READ).shape == SHAPE
    with pytest.raises(ValueError, match=r"--rotary-base 10000; .* of a base of about (49|50)"):
        ComposerWeights(path, **READ | {"rotary_base": 10000.0})
    # twice as many heads of half the width: every weight has the same shape
    message = r"4 frequencies, which heads of width 8 have, and --head-dim is 4; give --head-dim 8"
    with pytest.raises(ValueError, match=message):
        ComposerWeights(path, **READ | {"head_dim": 4})


def test_names_of_two_weights_swapped_are_noticed(tmp_path: Path) -> None:
    at = "model.layers.1.mlp."
    swapped = dict(WEIGHTS)
    swapped[f"{at}up_proj.weight"], swapped[f"{at}gate_proj.weight"] = (
        WEIGHTS[f"{at}gate_proj.weight"],
        WEIGHTS[f"{at}up_proj.weight"],
    )
    write_state_dict(tmp_path / "model.pt", swapped)
    read = ComposerWeights(tmp_path / "model.pt", **READ)
    different = [name for name in WEIGHTS if not torch.equal(read[name], WEIGHTS[name])]
    assert different == [f"{at}gate_proj.weight", f"{at}up_proj.weight"]


def test_defaults_are_those_of_llama_2(tmp_path: Path) -> None:
    shape = replace(SHAPE, num_attention_heads=2, num_query_groups=2, head_dim=128)
    write_state_dict(tmp_path / "model.pt", random_weights(shape))
    expected = replace(shape, norm_epsilon=1e-5, rotary_base=10000.0, max_position_embeddings=4096)
    assert ComposerWeights(tmp_path / "model.pt").shape == expected


def test_grouped_queries_are_seen_in_the_rows(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model.pt", random_weights(CUT_GROUPED))
    assert ComposerWeights(tmp_path / "model.pt", head_dim=8).shape == CUT_GROUPED


def refused(path: Path, found: Any, wanted: str, **how: Any) -> None:
    torch.save(found, path)
    with pytest.raises(ValueError, match=wanted):
        ComposerWeights(path, **{**READ, **how})


def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    good = state_dict(WEIGHTS)
    masks = {f"model.l0_module.masks.{kind}.z_loga": torch.ones(3) for kind in ("head", "hidden")}
    refused(
        path, good | masks, r"still has its masks \(model\.l0_module\.masks\.head\.z_loga and 1"
    )
    refused(path, good | masks, r"prune_and_save_model \S+model\.pt\) and convert the pruned-model")
    refused(
        path, good, r"attn\.wq\.weight has 40 rows, which is no multiple of --head-d", head_dim=9
    )
    refused(path, WEIGHTS, r"has no model\.transformer\.wte\.weight, with which a model of LLM-Sh")
    refused(path, {"state": {"optimizers": {}}}, r"has no state\['model'\]; is it a trainer's")
    refused(path, [1, 2], r"holds a list, not weights by name")
    refused(path, good | {"model.step": 3}, r"model\.step is a int, not a tensor")
    refused(
        path, good | {"model.transformer.output.bias": torch.ones(64)}, r"unknown are model\.tra"
    )
    without = {n: t for n, t in good.items() if "blocks.1.ln_2" not in n}
    refused(path, without, r"missing are model\.transformer\.blocks\.1\.ln_2\.weight")
    gap = {n: t for n, t in good.items() if ".blocks.1." not in n}
    refused(path, gap, r"has layers 0, 2, wanted all from 0 on")
    odd = good | {"model.transformer.blocks.2.mlp.up_proj.weight": torch.ones(50, 30)}
    refused(
        path, odd, r"layers\.2\.mlp\.up_proj\.weight has shape \[50, 30\], its shape in this mod"
    )


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    state = {"model": state_dict(WEIGHTS), "callbacks": Malicious(ran)}
    refused(tmp_path / "model.pt", {"state": state}, r"wants to load posix\.mkdir .*refused")
    assert not ran.exists()


def test_damaged_and_old_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    write_state_dict(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"model\.pt \([\d,]+ bytes\) cannot .*is truncated or dam"
    ):
        load_mapped(path)
    torch.save(state_dict(WEIGHTS), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"is not in the format that torch\.save writes since rel"):
        load_mapped(path)
    with pytest.raises(ValueError, match=r"nothing\.pt is not a file"):
        load_mapped(tmp_path / "nothing.pt")
