"""A weight that is not finite is named by file, tensor and place wherever weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import write_weights
from megashear.conversion import hf
from megashear.conversion.convert import to_checkpoint, to_hf
from megashear.conversion.sources import Source, open_composer, open_source
from tests import composer
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import MULTI_HEAD

SHAPE = MULTI_HEAD
NAME, PLACE = "model.layers.2.mlp.down_proj.weight", (7, 40)
DESCRIPTION = Description(shape=SHAPE, iteration=0, stage="converted")


def poisoned(value: float) -> dict[str, Tensor]:
    weights = random_weights(SHAPE)
    weights[NAME][PLACE] = value
    return weights


def as_safetensors(folder: Path, weights: dict[str, Tensor]) -> Source:
    hf.write_directory(folder, weights, SHAPE, max_shard_bytes=40_000)
    return open_source(folder)


def as_bin(folder: Path, weights: dict[str, Tensor]) -> Source:
    hf.write_directory(folder, weights, SHAPE)
    (folder / hf.SINGLE).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return open_source(folder)


def as_checkpoint(folder: Path, weights: dict[str, Tensor]) -> Source:
    write_weights(folder, weights, DESCRIPTION)
    return open_source(folder)


def as_composer(folder: Path, weights: dict[str, Tensor]) -> Source:
    torch.save(composer.state_dict(weights), folder.with_suffix(".pt"))
    return open_composer(folder.with_suffix(".pt"), head_dim=SHAPE.head_dim)


THEIRS = "model.transformer.blocks.2.mlp.down_proj.weight"
SOURCES = pytest.mark.parametrize(
    ("store", "named"),
    [
        (as_safetensors, f"source/model-0....-of-0....\\.safetensors: {NAME}"),
        (as_bin, f"source/pytorch_model.bin: {NAME}"),
        (as_checkpoint, f"checkpoint .*source/iter_0000000: {NAME}"),
        (as_composer, f"source.pt: {THEIRS}"),
    ],
)


@SOURCES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_convert_names_it_and_writes_nothing(
    store: Callable[[Path, dict[str, Tensor]], Source], named: str, value: float, tmp_path: Path
) -> None:
    source = store(tmp_path / "source", poisoned(value))
    before = sorted(tmp_path.iterdir())
    for write in (to_checkpoint, to_hf):
        with pytest.raises(ValueError, match=named + rf"\[7, 40\] is {value}; .*download .* again"):
            write(source, tmp_path / "output", progress=False)
        assert sorted(tmp_path.iterdir()) == before


@SOURCES
def test_a_number_as_large_as_can_be_is_converted(
    store: Callable[[Path, dict[str, Tensor]], Source], named: str, tmp_path: Path
) -> None:
    source = store(tmp_path / "source", poisoned(torch.finfo(torch.float32).max))
    to_hf(source, tmp_path / "output", progress=False)
    assert float(hf.HfWeights(tmp_path / "output")[NAME][PLACE]) == torch.finfo(torch.float32).max


def test_a_slice_names_the_place_in_the_whole_weight(tmp_path: Path) -> None:
    hf.write_directory(tmp_path / "model", poisoned(math.nan), SHAPE)
    weights = hf.HfWeights(tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(f"{NAME}[7, 40] is nan")):
        weights.read_slice(NAME, (slice(5, 10), slice(32, 64)))
    # the twin: what is not read is not looked at
    weights.read_slice(NAME, (slice(8, 10), slice(32, 64)))


def test_a_tied_output_layer_that_is_nan_is_not_called_another_one(tmp_path: Path) -> None:
    weights = random_weights(SHAPE)
    weights["model.embed_tokens.weight"][3, 4] = math.nan
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    hf.write_directory(tmp_path / "model", weights, SHAPE)
    path = tmp_path / "model/config.json"
    text = path.read_text()
    path.write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert path.read_text() != text
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight\[3, 4\] is nan"):
        hf.HfWeights(tmp_path / "model")


@pytest.mark.parametrize("to", ["checkpoint", "hf"])
def test_a_number_that_float16_does_not_hold_is_named(to: str, tmp_path: Path) -> None:
    source = as_safetensors(tmp_path / "source", poisoned(1e5))
    write = {"checkpoint": to_checkpoint, "hf": to_hf}[to]
    message = (
        re.escape(f"{NAME}[7, 40] is 100000, and float16 holds at most 65504; ")
        + ".*bfloat16 or float32"
    )
    with pytest.raises(ValueError, match=message):
        write(source, tmp_path / "output", dtype="float16", progress=False)
    assert not (tmp_path / "output").exists()
    write(source, tmp_path / "output", dtype="bfloat16", progress=False)  # the twin
