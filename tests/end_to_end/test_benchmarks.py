"""Benchmarks of steps run, on tiny shapes; what they count is held to what it must be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

FOLDER = Path(__file__).parents[2] / "tools/benchmarks"
TINY = [
    *("--num-layers", "3", "--hidden-size", "64", "--num-attention-heads", "8"),
    *("--ffn-hidden-size", "160", "--vocab-size", "96", "--seq-length", "24"),
]


@pytest.fixture(autouse=True)
def _scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def results(name: str, argv: list[str], folder: Path, ranks: int = 1) -> dict[str, Any]:
    """What a benchmark writes, run in so many ranks."""
    output = folder / f"{name}.json"
    script = __import__(name)

    def body(rank: int) -> int:
        os.environ["WORLD_SIZE"] = str(ranks)  # as torchrun says it; ends with the rank
        status: int = script.main([*argv, "--json", str(output)])
        return status

    assert run_ranks(ranks, body) == [0] * ranks
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert found["environment"]["processes"] == ranks
    assert found["environment"]["packages"]["megatron-core"] == "0.16.1"
    return found


def test_a_masked_step_keeps_what_an_unmasked_one_keeps_and_one_tensor_more(
    tmp_path: Path,
) -> None:
    found = results("step", [*TINY, "--rounds", "2", "--no-transformers"], tmp_path)
    longer = [*TINY, "--seq-length", "48", "--rounds", "1", "--no-transformers"]
    more = []
    for each in (found, results("step", longer, tmp_path)):
        kept = {way: memory["saved"] for way, memory in each["memory"].items()}
        more.append(kept["masked"] - kept["unmasked"])
    # What grows with the sequence is the embedding's output before its gate, [s, b, h] alone; gates
    # of layers that come and go may lie in one place, or not.
    assert more[1] - more[0] == pytest.approx(4 * 24 * 2 * 64, abs=1024)
    assert more[0] > 0
    parts = found["parts_s"]["masked"]
    assert {"forward", "backward", "optimizer", "masks: sampling", "masks: penalty"} <= set(parts)
    assert sum(seconds for name, seconds in parts.items() if name != "whole") <= parts["whole"]
    ways = [each["way"] for each in found["measured"]]
    assert sorted(set(ways)) == ["masked", "unmasked", "unmasked again"]
    assert ways[:3] != ways[3:]  # turning order


def test_what_masks_send_depends_on_neither_sequence_nor_batch(tmp_path: Path) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    found = results("communication", [*TINY, *layout, "--num-layers", "4"], tmp_path, ranks=4)
    first, *others = found["found"].values()
    for rank, mine in enumerate(first):
        calls = sum(each["calls"] for each in mine["added"].values())
        size = sum(each["bytes"] for each in mine["added"].values())
        assert 0 < calls < 10
        # gathered over tensor and pipeline ranks; the rest are sums of rows
        assert 0 < size - 2 * found["hidden_row_bytes"] < 1024
        for other in others:
            assert other[rank]["added"] == mine["added"]
            assert other[rank]["step"] > 1.5 * mine["step"]  # where the step itself sends more


def test_what_is_sent_is_counted() -> None:
    communication = __import__("communication")

    def body(rank: int) -> tuple[int, int]:
        with communication.counting() as counts:
            dist.all_reduce(torch.zeros(5))
            dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3))
        dist.all_reduce(torch.zeros(7))  # behind the block
        return sum(counts.calls.values()), sum(counts.bytes.values())

    assert run_ranks(2, body) == [(2, 4 * (5 + 3))] * 2


def test_growth_and_mask_costs_are_measured(tmp_path: Path) -> None:
    found = results("growth", [*TINY, "--rounds", "2"], tmp_path)
    assert {each["way"].split()[0] for each in found["measured"]} == {
        *("base", "layers", "width", "sequence")
    }
    costs = results("masks", ["--rounds", "1"], tmp_path)
    assert set(costs["cpu_s"]) == {"sampling", "gradients", "penalty", "update"}
    assert costs["step_s"] == pytest.approx(1.58, rel=0.01)  # 7B, 131,072 tokens, 8 * 445 TFLOP/s


@pytest.mark.parametrize("wrong", [False, True])
def test_the_gpu_script_runs_on_a_cpu_and_knows_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu = __import__("gpu")
    if wrong:
        monkeypatch.setattr(gpu, "cut_error", lambda groups: 0.1)
        monkeypatch.setattr(gpu, "on_the_cpu", lambda: {"loss": torch.tensor(1.0)})

    def body(rank: int) -> int:
        argv = ["--dry-run", "--rounds", "1", "--json", str(tmp_path / "gpu.json")]
        status: int = gpu.main(argv if not wrong else [*argv, "--only", "correctness"])
        return status

    assert run_ranks(1, body) == [int(wrong)]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert len(found["checks"]) == 4
    right = [each["found"] < each["bound"] for each in found["checks"]]
    assert right == [not wrong, True, True, not wrong]
    if not wrong:
        printed = capfd.readouterr().out
        for row in ("7B pruning", "7B pruning, unmasked", "1.3B pretraining", "2.7B pretraining"):
            assert f"| {row} |" in printed
        assert printed.count("not measured") > 5 * 5


def test_the_gpu_script_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu = __import__("gpu")
    assert run_ranks(1, lambda rank: gpu.main([])) == [2]
