"""What writers do with tied weights and indexes is read, and not called damaged."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megashear.conversion import hf
from megashear.conversion.hf_config import config_of_shape
from tests.families import FAMILIES
from tests.reference_llama import random_weights

SHAPE = FAMILIES["llama3.2"]
WEIGHTS = random_weights(SHAPE)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ONE, TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"


def write_config(directory: Path) -> None:
    directory.mkdir()
    config = config_of_shape(SHAPE, dtype="float32")
    (directory / hf.CONFIG).write_text(json.dumps(config))


def write_bin(
    directory: Path,
    output: Tensor | None,
    *,
    listed: tuple[str, ...],
    extra_bytes: int = 0,
    beside: bool = True,
) -> None:
    """A tied model in two files: `output` beside the embedding or in the other file, the names that
    the index has of the two, and what it counts beyond the weights."""
    write_config(directory)
    names = list(WEIGHTS)
    files = {ONE: {name: WEIGHTS[name] for name in names[:5]}}
    files[TWO] = {name: WEIGHTS[name] for name in names[5:]}
    index = {name: file for file, held in files.items() for name in held if name != EMBEDDING}
    where = ONE if beside else TWO
    if output is not None:
        files[where][OUTPUT] = output
    index |= {name: ONE if name == EMBEDDING else where for name in listed}
    for file, held in files.items():
        torch.save(held, directory / file)
    total = sum(weight.nbytes for weight in WEIGHTS.values()) + extra_bytes
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "pytorch_model.bin.index.json").write_text(text)


def check_read(directory: Path) -> None:
    read = hf.HfWeights(directory)
    assert list(read) == list(WEIGHTS)
    assert all(torch.equal(read[name], weight) for name, weight in WEIGHTS.items())
    assert torch.equal(read.read_slice(EMBEDDING, (slice(3, 5),)), WEIGHTS[EMBEDDING][3:5])


ALIAS = WEIGHTS[EMBEDDING]


@pytest.mark.parametrize(
    "tied",
    [
        {"output": ALIAS, "listed": (EMBEDDING, OUTPUT)},  # one memory under two names
        {"output": ALIAS, "listed": (EMBEDDING, OUTPUT), "extra_bytes": ALIAS.nbytes},
        {"output": ALIAS, "listed": (EMBEDDING,)},
        {"output": ALIAS, "listed": (OUTPUT,)},
        {"output": None, "listed": (EMBEDDING, OUTPUT)},
        {
            "output": ALIAS.clone(),
            "listed": (EMBEDDING, OUTPUT),
            "beside": False,
            "extra_bytes": ALIAS.nbytes,
        },
    ],
)
def test_a_tied_embedding_in_sharded_files_is_read_whatever_names_it_has(
    tmp_path: Path, tied: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    write_bin(tmp_path / "model", **tied)
    check_read(tmp_path / "model")
    assert not caplog.records


def test_an_output_layer_that_is_not_the_tied_embedding_is_noticed(tmp_path: Path) -> None:
    other = ALIAS.clone()
    other[63, 39] += 1.0
    write_bin(tmp_path / "model", other, listed=(EMBEDDING, OUTPUT), beside=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight; set"):
        hf.HfWeights(tmp_path / "model")


def test_a_tied_embedding_under_the_output_layers_name_alone_is_read(tmp_path: Path) -> None:
    write_config(tmp_path / "model")
    held = {OUTPUT if name == EMBEDDING else name: weight for name, weight in WEIGHTS.items()}
    save_file(held, tmp_path / "model" / hf.SINGLE)
    check_read(tmp_path / "model")
    held[OUTPUT] = held[OUTPUT][:-1].clone()
    save_file(held, tmp_path / "model" / hf.SINGLE)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight has shape \[63, 40\]"):
        hf.HfWeights(tmp_path / "model")


def test_a_total_size_that_is_wrong_is_told_of_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_bin(tmp_path / "model", ALIAS, listed=(EMBEDDING, OUTPUT), extra_bytes=7)
    check_read(tmp_path / "model")
    assert "gives total_size 318,887 bytes, the files hold 329,120; passed over" in caplog.text


@pytest.mark.parametrize(("stored", "listed"), [(True, False), (False, True), (True, True)])
def test_stored_rotary_tables_need_not_be_where_the_index_says(
    tmp_path: Path, stored: bool, listed: bool
) -> None:
    write_bin(tmp_path / "model", ALIAS, listed=(EMBEDDING, OUTPUT))
    path = tmp_path / "model" / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]
    if listed:
        index["weight_map"][TABLE] = ONE
    path.write_text(json.dumps(index))
    if stored:
        held = torch.load(tmp_path / "model" / TWO) | {TABLE: torch.ones(4)}
        torch.save(held, tmp_path / "model" / TWO)
    check_read(tmp_path / "model")
    index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"does not list model.norm.weight .*correct the index"):
        hf.HfWeights(tmp_path / "model")


def test_more_missing_than_the_output_layer_is_not_taken_for_a_tie(tmp_path: Path) -> None:
    shape = FAMILIES["llama2"]
    held = {name: w for name, w in random_weights(shape).items() if "norm" not in name}
    hf.write_directory(tmp_path / "model", random_weights(shape), shape)
    held.pop(OUTPUT)
    save_file(held, tmp_path / "model" / hf.SINGLE)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of this model: lm_head.weight, model"):
        hf.HfWeights(tmp_path / "model")


def unknown_format(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"Q32"'))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unknown_format, "cannot be read as .*nothing is cut off: another release of safetensors"),
        (lambda p: p.write_text("<html>no such file</html>"), "it is no safetensors file, or dam"),
        (lambda p: p.write_bytes(p.read_bytes()[:90]), "its header is truncated or damaged: down"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"is truncated, its header wants [\d,]+ b"),
        (lambda p: p.write_bytes(b""), "it is no safetensors file, or damaged: download"),
    ],
)
def test_only_what_is_damaged_is_called_so(
    tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    write_config(tmp_path / "model")
    save_file(WEIGHTS, tmp_path / "model" / hf.SINGLE)
    assert load_file(tmp_path / "model" / hf.SINGLE).keys() == WEIGHTS.keys()
    harm(tmp_path / "model" / hf.SINGLE)
    with pytest.raises(ValueError, match=message):
        hf.HfWeights(tmp_path / "model")


def test_an_archive_of_something_else_is_not_called_damaged(tmp_path: Path) -> None:
    write_config(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model" / "pytorch_model.bin", "w") as archive:
        archive.writestr("notes.txt", "no weights")
    with pytest.raises(ValueError, match=r"cannot be read as weights by name: .*; save its tens"):
        hf.HfWeights(tmp_path / "model")
