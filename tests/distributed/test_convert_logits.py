"""convert --verify: megatron-core on what was written against transformers, before it appears."""

import contextlib
import functools
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from megashear.__main__ import main
from megashear.checkpoint import store
from megashear.checkpoint.description import find_iteration, read_description, write_description
from megashear.checkpoint.details import HF_CONFIG
from megashear.checkpoint.shear import cut_checkpoint
from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import ModelConfig
from megashear.conversion import hf, logits
from megashear.conversion.certificate import CERTIFICATE, check
from megashear.files import integrity
from megashear.models import weight_table
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.distributed.test_resume import configuration, start
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.text_run import TextRun
from tests.tiny import layout
from tests.unit.checkpoint.shapes import GROUPED

Converted = dict[str, Any]
KEPT = {"attention_dropout": 0.1, "initializer_range": 0.04, "use_cache": False}
"""What the models' config.json had, and has again at the end."""


def alone(body: Callable[[], Converted]) -> Converted:
    """Run in a process of its own, where megatron-core's groups may be made and dropped."""
    return run_ranks(1, lambda rank: body())[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    hf.write_directory(tmp_path / "hf", random_weights(GROUPED), GROUPED)
    return tmp_path / "hf"


def test_logits_agree_both_ways_and_are_certified(model: Path, tmp_path: Path) -> None:
    there = alone(lambda: hf_to_megatron(model, tmp_path / "checkpoint", verify=()))
    assert there["logits"]["relative_error"] < there["logits"]["bound"] == 1e-5
    back = alone(lambda: megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", verify=[5, 6]))
    assert back["logits"]["relative_error"] < 1e-5
    assert back["logits"]["tokens"] == [[5, 6]]
    for output, done in (("checkpoint", there), ("back", back)):
        assert json.loads((tmp_path / output / CERTIFICATE).read_text())["logits"] == done["logits"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_sides_compute_with_rounded_weights(model: Path, tmp_path: Path, dtype: str) -> None:
    done = alone(lambda: hf_to_megatron(model, tmp_path / "out", dtype=dtype, verify=()))
    assert done["logits"]["relative_error"] < done["logits"]["bound"] == 1e-5


@pytest.fixture(scope="module")
def bf16_runs(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two short --bf16 runs saved, in folders "pretrain" and "prune", and the latter's cut."""
    folder = tmp_path_factory.mktemp("bf16")
    text = text._replace(checkpoint=shutil.copytree(text.checkpoint, folder / "model"))
    model = find_iteration(text.checkpoint)
    write_description(model, replace(read_description(model), details={HF_CONFIG: KEPT}))
    integrity.write(model)
    for stage in ("pretrain", "prune"):
        config = configuration(text, stage, layout(), folder / stage)
        train = replace(config.train, train_iters=4)
        start(replace(config, train=train, model=ModelConfig(bf16=True)), 1)
    run_ranks(
        1,
        lambda rank: cut_checkpoint(folder / "prune" / "saved", folder / "cut", exact_target=True),
    )
    return folder


WRITTEN: list[tuple[list[str], torch.dtype, str]] = [
    ([], torch.bfloat16, "in bfloat16 (what the --bf16 run computed with; --dtype float32"),
    (["--dtype", "float32"], torch.float32, "in float32\nlogits"),
    (["--output-format", "checkpoint"], torch.float32, "in float32 (the --bf16 run's masters"),
]
"""Flags of `convert`, the format that they write, and what the summary says of it."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("made", ["pretrain/saved", "cut"])
def test_what_a_bf16_run_made_is_written_in_bfloat16(
    bf16_runs: Path, tmp_path: Path, made: str
) -> None:
    def convert(words: list[str]) -> Converted:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["convert", *words]) == 0
        return {"said": said.getvalue()}

    exact = dict(CheckpointWeights(bf16_runs / made))
    assert {weight.dtype for weight in exact.values()} == {torch.float32}
    for flags, dtype, note in WRITTEN if made != "cut" else WRITTEN[:1]:
        output = tmp_path / "out"
        words = [f"--input={bf16_runs / made}", f"--output={output}", *flags]
        if "checkpoint" not in flags:
            words.append("--verify")
        assert note in alone(functools.partial(convert, words))["said"]
        is_hf = (output / "config.json").is_file()
        written = hf.HfWeights(output) if is_hf else CheckpointWeights(output)
        for name, weight in exact.items():
            assert torch.equal(written[name], weight.to(dtype)), name
        if is_hf:
            config = json.loads((output / "config.json").read_text())
            assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
            assert {name: config[name] for name in KEPT} == KEPT  # through runs and cut
        check(output)
        shutil.rmtree(output)


@pytest.mark.parametrize(
    ("dtype", "broken"), [("float32", (store, "MASTERS", "none")), (None, (logits, "_round", None))]
)
def test_sides_that_read_other_weights_of_a_bf16_run_are_noticed(
    bf16_runs: Path, tmp_path: Path, dtype: str | None, broken: tuple[Any, str, Any]
) -> None:
    def convert() -> Converted:
        owner, name, value = broken
        setattr(owner, name, value or (lambda *_: None))  # of this process alone
        with pytest.raises(ValueError, match=r"differ by [\d.e-]+ of their norm, at most 1e-05"):
            megatron_to_hf(bf16_runs / "pretrain" / "saved", tmp_path / "o", dtype=dtype, verify=())
        return {}

    alone(convert)
    assert not list(tmp_path.iterdir())


def test_a_wrong_interleaving_never_appears(model: Path, tmp_path: Path) -> None:
    def stacked(row: weight_table.MegatronTensor, parts: list[Tensor], shape: object) -> Tensor:
        return torch.cat(list(parts))

    def broken() -> Converted:
        weight_table.fuse = stacked  # type: ignore[assignment]  # of this process alone
        with pytest.raises(ValueError, match=r"transformers differ by [\d.]+ of their norm, at m"):
            hf_to_megatron(model, tmp_path / "out", dtype="bfloat16", verify=())
        return {}

    alone(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, 64], "--verify-tokens has 64; the model's vocabulary is 0 to 63"),
        ([1] * 5000, "--verify-tokens has 5000 tokens; the model reads 4096"),
    ],
)
def test_tokens_that_the_model_cannot_read_are_refused(
    model: Path, tmp_path: Path, tokens: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(model, tmp_path / "out", verify=tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_without_transformers_nothing_is_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'not installed: pip install "megashear\[verify\]", or'):
        hf_to_megatron(model, tmp_path / "out", verify=())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
