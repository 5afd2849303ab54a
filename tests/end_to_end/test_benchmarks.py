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
FOLDED = 96 * 64 + 3 * (2 * 64 + 64 * 64 + 64 * 160) + 64
"""Numbers in the weights of `TINY` that masks fold into: embedding, norms, the products that end
attention and MLP."""

ANOTHER_WEIGHT = """
import gpu
import torch

same_weights = gpu._same_weights


def another(chunks):
    same_weights(chunks)
    with torch.no_grad():
        dict(chunks[0].named_parameters())["module.output_layer.weight"][5, 2] += 0.05


gpu._same_weights = another
raise SystemExit(gpu.main())
"""


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


def test_a_masked_step_keeps_what_an_unmasked_one_keeps_and_folded_weights(
    tmp_path: Path,
) -> None:
    found = results("step", [*TINY, "--rounds", "2", "--no-transformers"], tmp_path)
    longer = [*TINY, "--seq-length", "48", "--rounds", "1", "--no-transformers"]
    more = []
    for each in (found, results("step", longer, tmp_path)):
        unmasked, masked = each["memory"]["unmasked"], each["memory"]["masked"]
        more.append(masked["saved"] - unmasked["saved"])
        assert masked["folded"] == 4 * FOLDED
        assert masked["apart"] == unmasked["folded"] == unmasked["apart"] == 0
    # the gates, what they are made of and factors of every axis: less than one activation
    assert more[0] == more[1]
    assert 0 < more[0] < 4 * 24 * 2 * 64
    parts = found["parts_s"]["masked"]
    assert {"forward", "backward", "optimizer", "masks: sampling", "masks: penalty"} <= set(parts)
    assert parts["masks: folding"] > 0
    assert parts["masks: unfolding"] > 0
    assert sum(seconds for name, seconds in parts.items() if name != "whole") <= parts["whole"]
    floors = found["floors_s"]["masked"]
    assert floors["masks: unfolding"] / floors["masks: folding"] == pytest.approx(12 / 8)
    ways = [each["way"] for each in found["measured"]]
    assert sorted(set(ways)) == ["masked", "unmasked", "unmasked again"]
    assert ways[:3] != ways[3:]  # turning order


def test_streams_one_after_the_other_share_the_memory_of_folded_weights(tmp_path: Path) -> None:
    argv = [*TINY, "--num-microbatches", "4", "--mask-noise-streams", "2", "--rounds", "1"]
    memory = results("step", [*argv, "--no-transformers"], tmp_path)["memory"]["masked"]
    assert memory["folded"] == 4 * FOLDED
    assert memory["apart"] == 4 * FOLDED


def test_what_is_held_at_once_is_counted_and_what_is_let_go_is_not() -> None:
    storages = __import__("ways").Storages([known := torch.zeros(7)])
    tensors = [torch.zeros(5), torch.zeros(3), torch.zeros(4)]
    first = [storages.hold(tensors[0]), storages.hold(tensors[0][1:]), storages.hold(known)]
    second = storages.hold(tensors[1])
    assert storages.most == 4 * (5 + 3)
    del second
    third = storages.hold(tensors[2])
    assert storages.most == 4 * (5 + 4)
    del first[0], third  # a view of it is held still
    storages.leave_out(tensors[1])
    assert storages.hold(tensors[1]).tensor is tensors[1]
    assert storages.hold(tensors[2]) is not None
    assert storages.most == 4 * (5 + 4)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    message = "--hidden-size 63 is not a multiple of --num-attention-heads 8"
    with pytest.raises(SystemExit, match=message):
        __import__("step").main(["--hidden-size", "63"])


def test_parts_of_a_pipelined_step_are_counted_once(tmp_path: Path) -> None:
    layout = ["--num-layers", "4", "--pipeline-model-parallel-size", "2", "--num-microbatches", "2"]
    argv = [*TINY, *layout, "--rounds", "2", "--no-transformers"]
    for parts in results("step", argv, tmp_path, ranks=2)["parts_s"].values():
        assert parts["backward"] > 0
        assert sum(seconds for name, seconds in parts.items() if name != "whole") <= parts["whole"]


def test_a_part_within_another_is_taken_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = __import__("ways")
    now = [0.0]
    monkeypatch.setattr(ways.time, "perf_counter", lambda: now[0])
    parts = ways.Parts()

    class Pass:
        def outer(self) -> None:
            now[0] += 3.0
            self.inner()
            self.inner()

        def inner(self) -> None:
            now[0] += 2.0

    parts.watch(Pass, "outer", "backward")
    with parts.time("whole"):
        Pass().outer()
        now[0] += 1.0
    assert parts.seconds == {"backward": 7.0, "whole": 8.0}
    parts.clear()
    parts.watch(Pass, "inner", "unfolding")
    with parts.time("whole"):
        Pass().outer()
    assert parts.seconds == {"backward": 3.0, "unfolding": 4.0, "whole": 7.0}
    parts.restore()
    Pass().outer()
    assert parts.seconds["whole"] == 7.0


def test_what_masks_send_depends_on_neither_sequence_nor_batch(tmp_path: Path) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    found = results("communication", [*TINY, *layout, "--num-layers", "4"], tmp_path, ranks=4)
    first, *others = found["found"].values()
    for rank, mine in enumerate(first):
        calls = sum(each["calls"] for each in mine["added"].values())
        size = sum(each["bytes"] for each in mine["added"].values())
        # half of them are the projection's three sums, each over tensor and over pipeline ranks
        assert 0 < calls <= 12
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
    assert set(costs["cpu_s"]) == {
        *("before gradients come", "sampling", "gradients", "penalty", "update")
    }
    assert costs["step_s"] == pytest.approx(1.58, rel=0.01)  # 7B, 131,072 tokens, 8 * 445 TFLOP/s


@pytest.mark.sampled(1)
@pytest.mark.parametrize("wrong", [False, True])
def test_the_gpu_script_runs_on_a_cpu_and_knows_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu = __import__("gpu")
    if wrong:
        logits_and_gates, whole_pass = gpu._masked_logits, gpu.whole_pass

        def another_gate(step: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            logits, gates = logits_and_gates(step)
            gates["intermediate"][0] = gates["intermediate"][0].roll(1)
            return logits, gates

        def another_head(groups: Any, model: Any) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = whole_pass(groups, model)
            if model.bf16:
                name = "gradient of log_alpha head"
                found[name] = found[name].roll(1, dims=-1)
            return found

        monkeypatch.setattr(gpu, "_masked_logits", another_gate)
        monkeypatch.setattr(gpu, "whole_pass", another_head)
        # the process of the reference has one weight of its own
        (tmp_path / "reference.py").write_text(ANOTHER_WEIGHT, encoding="utf-8")
        monkeypatch.setattr(gpu, "__file__", str(tmp_path / "reference.py"))
        path = os.pathsep.join([str(FOLDER), str(FOLDER.parents[1])])
        monkeypatch.setenv("PYTHONPATH", path)

    def body(rank: int) -> int:
        argv = ["--dry-run", "--rounds", "1", "--json", str(tmp_path / "gpu.json")]
        status: int = gpu.main(argv if not wrong else [*argv, "--only", "correctness"])
        return status

    assert run_ranks(1, body) == [int(wrong)]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    right = [each["found"] < each["bound"] for each in found["checks"]]
    # against the reference; loss, logits and gradients in bfloat16; the cut, twice
    assert right == [not wrong, True, True, not wrong, not wrong, not wrong]
    printed = capfd.readouterr().out
    assert printed.count("| WRONG |") == 4 * wrong
    if not wrong:
        for row in ("7B pruning", "7B pruning, unmasked", "1.3B pretraining", "2.7B pretraining"):
            assert f"| {row} |" in printed
        assert printed.count("not measured") > 5 * 5


def test_a_nan_or_a_tensor_of_zeros_is_no_agreement() -> None:
    gpu = __import__("gpu")
    wanted = {"first": torch.ones(3), "second": torch.ones(3), "third": torch.ones(3)}
    assert gpu.worst(wanted, wanted) == 0.0
    for name in wanted:
        broken = wanted | {name: torch.tensor([1.0, float("nan"), 1.0])}
        for found in (
            gpu.worst(broken, wanted),
            gpu.worst(wanted, wanted | {name: torch.zeros(3)}),
        ):
            assert gpu.Check(name="", found=found, bound=1.0).verdict == "WRONG"


@pytest.mark.parametrize(
    ("card", "tera"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None), ("GH200", None)]
)
def test_the_gpu_script_knows_a_peak_or_gives_no_mfu(
    monkeypatch: pytest.MonkeyPatch, card: str, tera: int | None
) -> None:
    gpu = __import__("gpu")
    assert gpu.peak_flops() is None or torch.cuda.is_available()
    monkeypatch.setattr(gpu.device, "has_cuda", lambda: True)
    monkeypatch.setattr(gpu, "device_name", lambda: card)
    assert gpu.peak_flops() == (None if tera is None else tera * 1e12)


def test_the_gpu_script_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    gpu = __import__("gpu")
    assert run_ranks(1, lambda rank: gpu.main([])) == [2]
