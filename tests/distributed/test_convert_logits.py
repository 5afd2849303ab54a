"""convert --verify: megatron-core on what was written against transformers, before it appears."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from megashear.checkpoint import hf
from megashear.checkpoint.certificate import CERTIFICATE
from megashear.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megashear.models import layout
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

Converted = dict[str, Any]


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
def test_rounded_weights_have_a_bound_of_their_own(model: Path, tmp_path: Path, dtype: str) -> None:
    done = alone(lambda: hf_to_megatron(model, tmp_path / "out", dtype=dtype, verify=()))
    assert 1e-5 < done["logits"]["relative_error"] < done["logits"]["bound"] <= 0.1


def test_a_wrong_interleaving_never_appears(model: Path, tmp_path: Path) -> None:
    def stacked(row: layout.MegatronTensor, parts: list[Tensor], shape: object) -> Tensor:
        return torch.cat(list(parts))

    def broken() -> Converted:
        layout.fuse = stacked  # type: ignore[assignment]  # of this process alone
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
