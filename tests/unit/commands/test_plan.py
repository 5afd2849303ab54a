"""`megashear plan` from its command line: what it reads, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megashear.__main__ import main
from megashear.checkpoint.hf_config import config_of_shape
from megashear.shape import PRESETS
from tests.text_run import SHAPE, write_checkpoint

EIGHT = ["--gpus", "8", "--gpu", "A100-80G"]


def run(*words: str, status: int = 0) -> None:
    assert main(["plan", *words]) == status


def layouts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    run(*words, "--json")
    plans: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plans


def test_json_has_every_layout_with_parts_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    plans = layouts(capsys, "--model", "llama2-7b", "--target", "llama2-2.7b", *EIGHT)
    assert list(plans) == ["pruning", "continued pretraining"]
    pruning = plans["pruning"]
    assert pruning["steps"] == 3200
    assert pruning["masks"] == ["head", "hidden", "intermediate"]
    assert len(pruning["layouts"]) > 10
    for found in pruning["layouts"]:
        parts, seconds = dict(found["bytes"]), dict(found["seconds"])
        assert parts.pop("total") == sum(parts.values())
        assert seconds.pop("step") == pytest.approx(sum(seconds.values()))
        assert found["gpu_hours"] == pytest.approx(8 * found["hours"])
        step = found["seconds"]["step"] + found["evaluation_seconds_per_step"]
        assert found["hours"] == pytest.approx(3200 * step / 3600)
        rate = 32 * 4096 / found["seconds"]["step"] / 8
        assert found["tokens_per_second_per_gpu"] == pytest.approx(rate)


def test_the_table_lists_as_many_as_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", "llama2-2.7b", *EIGHT, "--top", "3")
    out = capsys.readouterr().out
    assert out.startswith("continued pretraining: 48,000 steps of 256 x 4,096 tokens (50.33 B)")
    rows = [line for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 3
    assert "more that fit; --top " in out


@pytest.mark.parametrize("way", ["preset", "json", "hf", "checkpoint"])
def test_a_model_is_named_in_four_ways(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, name = PRESETS["llama2-1.3b"], "llama2-1.3b"
    if way == "json":
        name = str(tmp_path / "shape.json")
        Path(name).write_text(json.dumps(shape.to_dict()))
    elif way == "hf":
        name = str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_of_shape(shape, dtype="float32")))
    elif way == "checkpoint":
        shape, name = SHAPE, str(write_checkpoint(tmp_path / "checkpoint", SHAPE))
    (found,) = layouts(capsys, "--model", name, "--gpus", "4", "--gpu", "H100-80G").values()
    assert found["shape"] == shape.to_dict()
    assert found["parameters"] == shape.num_params()


def test_what_is_chosen_is_all_that_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    more = ("--num-virtual-stages-per-pipeline-rank", "4", "--micro-batch-size", "2")
    (found,) = layouts(capsys, "--model", "llama2-2.7b", *EIGHT, *words, *more).values()
    (only,) = found["layouts"]
    assert only["flags"] == (
        f"{words[0]} 2 --sequence-parallel {words[2]} 2 {more[0]} 4 --use-distributed-optimizer "
        f"--overlap-grad-reduce --overlap-param-gather {more[2]} 2 --bf16"
    )


def test_a_slower_network_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama2-7b", "--gpus", "64", "--tensor-model-parallel-size", "8")
    (fast,) = layouts(capsys, *words).values()
    (slow,) = layouts(capsys, *words, "--network-gbit", "10").values()
    slower = {layout["flags"]: layout["seconds"] for layout in slow["layouts"]}
    crossing = [layout for layout in fast["layouts"] if layout["data_parallel_size"] > 1]
    in_both = [found for found in crossing if found["flags"] in slower]
    assert in_both
    for found in in_both:
        # 10 Gbit/s in place of 400; and less of it lies beside the passes
        assert slower[found["flags"]]["data"] > 39.9 * found["seconds"]["data"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model", "llama2-7b", "--gpus", "8", "--gpu", "H100"],
            "--gpu H100 is not known; nearest: H100-80G; all there are: A100-40G, A100-80G",
        ),
        (
            ["--model", "llama-7b", "--gpus", "8"],
            "--model llama-7b is neither a preset (llama2-7b, ",
        ),
        (
            ["--model", "llama2-7b", "--target", "llama2-2", "--gpus", "8"],
            "--target llama2-2 is neither a preset (llama2-7b, ",
        ),
        (["--model", "llama2-7b", "--gpus", "7"], "7 GPUs cannot be divided so that layers, heads"),
        (
            ["--model", "llama2-7b", "--gpus", "1", "--gpu", "A100-40G"],
            "no layout fits. The nearest, --tensor-model-parallel-size 1 --micro-batch-size 1",
        ),
        (
            ["--model", "llama2-2.7b", "--target", "llama2-7b", "--gpus", "8"],
            "target",
        ),
        (["--model", "llama2-7b", "--gpus", "0"], "--gpus is 0; wanted 1 to 1048576"),
        (["--model", ".", "--gpus", "8"], "no checkpoint"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*(str(tmp_path) if word == "." else word for word in words), status=2)
    error = capsys.readouterr().err
    assert error.startswith("megashear plan: error: ")
    assert message in error
    assert error.count("\n") == 1
