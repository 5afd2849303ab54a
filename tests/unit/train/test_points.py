"""Utilisation is what published runs say of theirs, and absent where no peak is known."""

from __future__ import annotations

import math
import types

import pytest
import torch

from megashear.monitor import tags
from megashear.parallel import device
from megashear.shape import PRESETS
from megashear.train import points
from megashear.train.points import utilisation_points
from megashear.train.schedule import SequenceLosses


@pytest.mark.parametrize(
    ("shape", "tokens_per_second", "percent"),
    [("llama2-2.7b", 4957, 32), ("llama2-1.3b", 8684, 29)],
)
def test_published_throughput_gives_the_published_utilisation(
    shape: str, tokens_per_second: float, percent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LLM-Shearing's README prints throughput and MFU of continued pretraining on A100-80G
    monkeypatch.setattr(device, "name", lambda: "NVIDIA A100-SXM4-80GB")
    found = utilisation_points(tokens_per_second, PRESETS[shape], 4096)
    assert 100 * found[tags.MODEL_FLOPS_UTILISATION] == pytest.approx(percent, abs=1)


@pytest.mark.parametrize("name", [None, "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe"])
def test_a_device_whose_peak_is_not_known_has_none(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "name", lambda: name)
    assert utilisation_points(1000.0, PRESETS["llama2-1.3b"], 4096) == {}


def test_a_window_without_a_counted_token_has_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "flat_all_reduce", lambda tensors, group: tensors)  # one rank
    nothing, zero = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    empty = SequenceLosses(nothing, nothing, zero, {"z": nothing})
    groups = types.SimpleNamespace(tensor_size=1, pipeline=None, data=None)
    loss, terms = points.mean_losses([empty], ["z"], groups)  # type: ignore[arg-type]
    assert math.isnan(loss)
    assert math.isnan(terms["z"])
    full = SequenceLosses(nothing + 3, nothing + 2, zero, {"z": nothing + 1})
    found = points.mean_losses([empty, full], ["z"], groups)  # type: ignore[arg-type]
    assert found == (1.5, {"z": 0.5})
