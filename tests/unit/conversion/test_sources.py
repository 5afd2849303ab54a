"""Older models come in and out: LLM-Shearing's files, and published Hugging Face directories."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.__main__ import main
from megashear.checkpoint.description import read_description
from megashear.checkpoint.weights import CheckpointWeights
from megashear.conversion import hf
from megashear.conversion.sources import open_source
from megashear.shape import ModelShape
from tests.composer import state_dict, write_trainer
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import CUT_MULTI_HEAD

PUBLISHED = ModelShape(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=56,
    vocab_size=64,
)
"""Sheared LLaMA in small: the head dim is hidden size over heads, and config.json leaves it out."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 64,
}
"""Fields of the time, as transformers 4.31 wrote them."""
WEIGHTS = random_weights(PUBLISHED)


def write_published(directory: Path, num_files: int, weights: dict[str, Any] = WEIGHTS) -> None:
    """A directory of pytorch_model.bin files, rotary tables among the weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tables = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)
    }
    found = {**weights, **tables}
    if num_files == 1:
        torch.save(found, directory / "pytorch_model.bin")
        return
    names = list(found)
    weight_map = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        own = names[number::num_files]
        torch.save({name: found[name] for name in own}, directory / file)
        weight_map |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_published_directory_goes_in_and_comes_out(tmp_path: Path, num_files: int) -> None:
    write_published(tmp_path / "published", num_files)
    hf_to_megatron(tmp_path / "published", tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    back = hf.HfWeights(tmp_path / "back")
    assert back.shape == PUBLISHED
    assert list(back) == list(WEIGHTS)
    assert all(torch.equal(back[name], weight) for name, weight in WEIGHTS.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    kept = {name: config[name] for name in CONFIG if name in config}
    assert kept == {name: CONFIG[name] for name in kept}
    assert config["head_dim"] == 8


def test_of_mapped_files_a_rank_reads_its_slices(tmp_path: Path) -> None:
    write_published(tmp_path / "published", 2)
    weights = hf.HfWeights(tmp_path / "published")
    name = "model.layers.1.self_attn.o_proj.weight"
    part = weights.read_slice(name, (slice(3, 7), slice(8, 16)))
    assert torch.equal(part, WEIGHTS[name][3:7, 8:16])
    assert part.untyped_storage().nbytes() == part.nbytes  # not the map behind it
    assert weights[name].untyped_storage().nbytes() == WEIGHTS[name].nbytes


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        (
            lambda d: torch.save(
                {"x": Malicious(d / "ran")}, d / "pytorch_model-00002-of-00002.bin"
            ),
            r"00002-of-00002\.bin wants to load posix\.mkdir when it is read; .*refused",
        ),
        (
            lambda d: (d / "pytorch_model-00001-of-00002.bin").unlink(),
            r"names pytorch_model-00001-of-00002\.bin, which is missing; download it again",
        ),
        (
            lambda d: os.truncate(d / "pytorch_model-00001-of-00002.bin", 9000),
            r"00001-of-00002\.bin \(9,000 bytes\) cannot .*is truncated or damaged: down",
        ),
        (
            lambda d: (d / "pytorch_model-00001-of-00002.bin").write_bytes(b"other"),
            r"is not in the format that torch\.save writes since release 1\.6",
        ),
        (
            lambda d: torch.save({"x": [1]}, d / "pytorch_model-00001-of-00002.bin"),
            r"00001-of-00002\.bin: x is a list, not a tensor",
        ),
        (
            lambda d: (d / "pytorch_model.bin.index.json").unlink(),
            r"has neither model\.safetensors nor .*, nor pytorch_model\.bin nor",
        ),
    ],
)
def test_a_bad_file_of_torch_is_refused(
    tmp_path: Path, harm: Callable[[Path], object], wanted: str
) -> None:
    write_published(tmp_path / "published", 2)
    harm(tmp_path / "published")
    with pytest.raises(ValueError, match=wanted):
        hf.HfWeights(tmp_path / "published")
    assert not (tmp_path / "published" / "ran").exists()


def test_integers_are_no_weights(tmp_path: Path) -> None:
    name = "model.norm.weight"
    write_published(tmp_path / "published", 1, {**WEIGHTS, name: WEIGHTS[name].to(torch.int8)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as int8, wanted one of"):
        hf.HfWeights(tmp_path / "published")


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("write", ["state_dict", "trainer"])
def test_an_llm_shearing_file_becomes_a_checkpoint_or_a_directory(
    tmp_path: Path, write: str
) -> None:
    shape = replace(CUT_MULTI_HEAD, norm_epsilon=1e-3, rotary_base=500.0)
    weights = random_weights(shape)
    file = tmp_path / "latest-rank0.pt"
    if write == "trainer":
        write_trainer(file, weights)
    else:
        torch.save(state_dict(weights), file)
    said = ("--head-dim", 8, "--norm-epsilon", 1e-3, "--rotary-base", 500)
    assert convert("--input", file, "--output", tmp_path / "checkpoint", *said) == 0
    assert read_description(tmp_path / "checkpoint" / "iter_0000000").shape == shape
    to_hf = ("--output-format", "hf", "--dtype", "bfloat16")
    assert convert("--input", file, "--output", tmp_path / "hf", *said, *to_hf) == 0
    read: dict[str, dict[str, Tensor]] = {
        "checkpoint": dict(CheckpointWeights(tmp_path / "checkpoint")),
        "hf": dict(hf.HfWeights(tmp_path / "hf", shape)),
    }
    for name, weight in weights.items():
        assert torch.equal(read["checkpoint"][name], weight), name
        assert torch.equal(read["hf"][name], weight.bfloat16()), name
    assert convert("--check", tmp_path / "checkpoint") == 0
    assert convert("--check", tmp_path / "hf") == 0


def test_old_files_become_safetensors(tmp_path: Path) -> None:
    write_published(tmp_path / "published", 2)
    to_hf = ("--output", tmp_path / "new", "--output-format", "hf")
    assert convert("--input", tmp_path / "published", *to_hf) == 0
    assert (tmp_path / "new" / "model.safetensors").is_file()
    new = hf.HfWeights(tmp_path / "new")
    assert all(torch.equal(new[name], weight) for name, weight in WEIGHTS.items())


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"head_dim": 8}, "--head-dim 8 is for a LLM-Shearing file; .* says it itself"),
        ({"rotary_base": 1e4}, "--rotary-base 10000 is for a LLM-Shearing file; .* is a Hugging"),
        (
            {"vocab_size": 60},
            "--vocab-size 60 is for a Megatron-LM checkpoint; .* is a Hugging Fac",
        ),
    ],
)
def test_what_a_source_says_itself_is_not_asked_for(
    tmp_path: Path, said: dict[str, Any], wanted: str
) -> None:
    write_published(tmp_path / "published", 1)
    open_source(tmp_path / "published")
    with pytest.raises(ValueError, match=wanted):
        open_source(tmp_path / "published", **said)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ("--verify",),
            "--verify compares a checkpoint with a Hugging Face directory; .* is a LLM",
        ),
        (
            ("--vocab-size", 8),
            "--vocab-size 8 is for a Megatron-LM checkpoint; .* is a LLM-Shearing",
        ),
        (("--head-dim", 0), "--head-dim is 0; wanted 1 to 2147483647"),
        (("--norm-epsilon", -1), r"--norm-epsilon is -1\.0; wanted 1e-30 to 1"),
        ((), r"wq\.weight has 40 rows, which is no multiple of --head-dim 128; give the width"),
    ],
)
def test_bad_words_about_an_llm_shearing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[Any, ...], wanted: str
) -> None:
    import re

    file = tmp_path / "model.pt"
    torch.save(state_dict(random_weights(CUT_MULTI_HEAD)), file)
    known = () if not words or words[0] == "--head-dim" else ("--head-dim", 8)
    assert convert("--input", file, "--output", tmp_path / "out", *known, *words) == 2
    error = capsys.readouterr().err
    assert re.search(wanted, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
