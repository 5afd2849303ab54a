"""Shares of the peak: defaults by kind of GPU, and those of a benchmark's file."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from megashear.planning.hardware import GPUS
from megashear.planning.shares import SHARES, measured_share, usual_share
from megashear.shape import PRESETS

FILE = Path(__file__).parents[3] / "docs/benchmarks/gpu_speed.json"
SPEED: dict[str, Any] = json.loads(FILE.read_text())
H200 = GPUS["H200-141G"]
FLAG = "--measured speed.json"


def measured(preset: str = "llama2-2.7b", *, gpu: str = "H200-141G", **changed: Any) -> float:
    masked = preset == "llama2-7b"
    values = SPEED | changed
    return measured_share(values, PRESETS[preset], GPUS[gpu], has_masks=masked, flag=FLAG).value


def share_by_hand(job: str, *, layers_run_again: bool) -> float:
    """Six operations a weight and token, and 12 L H d s of attention, over the peak."""
    work, shape = SPEED["work"][job], PRESETS["llama2-" + job.partition(" ")[0].lower()]
    per_layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.ffn_hidden_size
    layers = shape.num_layers * (6 * per_layer + 12 * shape.hidden_size * 4096)
    if layers_run_again:
        layers = layers * 4 / 3
    times = [m["wall_s"] for m in SPEED["speed"][job]["measured"] if m["way"] == job]
    tokens = 4096 * work["micro_batch_size"] * work["num_microbatches"]
    per_token = layers + 6 * 32000 * shape.hidden_size
    return per_token * tokens / statistics.median(times) / 989e12


@pytest.mark.parametrize("preset", ["llama2-7b", "llama2-2.7b", "llama2-1.3b"])
def test_a_benchmarks_share_is_that_of_its_times(preset: str) -> None:
    size = preset.removeprefix("llama2-").upper()
    job = f"{size} pruning" if size == "7B" else f"{size} pretraining"
    found = measured(preset)
    assert found == pytest.approx(share_by_hand(job, layers_run_again=size == "7B"), rel=1e-6)
    assert found != pytest.approx(share_by_hand(job, layers_run_again=size != "7B"), rel=1e-2)


def test_a_file_may_say_that_nothing_was_run_again() -> None:
    plain = measured("llama2-7b", recompute={"7B pruning": False})
    assert plain == pytest.approx(share_by_hand("7B pruning", layers_run_again=False), rel=1e-6)


def test_the_nearest_model_counts() -> None:
    assert measured("llama3.2-1b") == measured("llama2-1.3b") != measured("llama3.2-3b")


def test_the_usual_shares_of_an_h200_are_those_measured() -> None:
    pruning, training = SHARES[H200.name]
    # of the profile's step without recompute; docs/benchmarks.md, and test_gpu_figures
    page = (FILE.parents[1] / "benchmarks.md").read_text()
    assert "54.9 % in pruning" in " ".join(page.split())
    assert pruning.value == round(0.549, 2)
    assert training.value == round(share_by_hand("2.7B pretraining", layers_run_again=False), 2)


def test_every_share_names_a_gpu() -> None:
    for gpu in GPUS.values():
        for has_masks in (False, True):
            found = usual_share(gpu, has_masks=has_masks)
            assert " on " in found.source
            assert found.source.startswith("assumed, as ") == (gpu.name not in SHARES)
    assert usual_share(GPUS["B200-180G"], has_masks=True).value == 0.28


def without_times() -> dict[str, Any]:
    speed = copy.deepcopy(SPEED["speed"])
    return {name: {"obstacle": "too large"} for name in speed}


@pytest.mark.parametrize(
    ("changed", "gpu", "message"),
    [
        ({"speed": {"7B pruning": 3}}, "H200-141G", r"is no output of tools/benchmarks/gpu.py"),
        ({"work": {}}, "H200-141G", r"is no output of tools/benchmarks/gpu.py .*--pruning-mfu"),
        ({"speed": {}}, "H200-141G", r"has no time of pretraining on a GPU .* NVIDIA H200\); give"),
        ({"speed": without_times()}, "H200-141G", r"has no time of pretraining"),
        ({"peak_flops_per_s": None}, "H200-141G", r"whose peak is known"),
        ({}, "H100-80G", r"speed.json is of NVIDIA H200, and the plan for --gpu H100-80G; plan fo"),
        (
            {"environment": {"device": "NVIDIA A100-PCIE MIG 3g"}},
            "A100-80G",
            r"whose peak is 989 TFLOP/s, and --gpu A100-80G has 312; give shares of your own",
        ),
    ],
)
def test_figures_of_something_else_are_refused(
    changed: dict[str, Any], gpu: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measured(gpu=gpu, **changed)
