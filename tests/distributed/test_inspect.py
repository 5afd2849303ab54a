"""What inspect says of a run saved at TP 2 x PP 2 is what the cut does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.__main__ import main
from megashear.checkpoint.shear import cut_checkpoint
from megashear.checkpoint.weights import CheckpointWeights
from megashear.report.inspection import inspect
from tests.conversions import megatron_to_hf
from tests.distributed.test_cut import PRUNED_AT, SHAPES, prune_half_way
from tests.ranks import run_ranks

NAMES = ["8-groups-of-4", "multi-head", "tied"]


@pytest.fixture(scope="module", params=NAMES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in the middle of pruning and its cut."""
    source, target = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(4, lambda rank: prune_half_way(folder / "pruned", source, target, PRUNED_AT))
    run_ranks(1, lambda rank: cut_checkpoint(folder / "pruned", folder / "cut", exact_target=True))
    return folder


def inspected(folder: Path, *names: str, **options: Any) -> dict[str, Any]:
    """What is known, from a process of its own."""
    output = folder / f"{'-'.join(names)}.json"
    output.unlink(missing_ok=True)
    paths = [folder / name for name in names]
    run_ranks(1, lambda rank: inspect(*paths, json_file=output, **options))
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_kept_units_are_the_rows_and_columns_of_the_cut(pruned: Path) -> None:
    exact = inspected(pruned, "pruned")["masks"]["exact"]
    before, after = CheckpointWeights(pruned / "pruned"), CheckpointWeights(pruned / "cut")
    assert exact["parameters"] == after.shape.num_params()
    hidden, width = torch.tensor(exact["hidden"]), torch.arange(after.shape.head_dim)
    assert len(exact["layers"]) == after.shape.num_layers
    for new, old in enumerate(exact["layers"]):

        def rows(units: list[int]) -> torch.Tensor:
            return (torch.tensor(units)[:, None] * len(width) + width).flatten()

        queries = rows(exact["query heads by layer"][str(old)])
        keys = rows(exact["key/value heads by layer"][str(old)])
        neurons = torch.tensor(exact["neurons by layer"][str(old)])
        # weights that no gate is folded into: equal, bit by bit
        for name, kept in (
            ("self_attn.q_proj", queries),
            ("self_attn.k_proj", keys),
            ("self_attn.v_proj", keys),
            ("mlp.gate_proj", neurons),
            ("mlp.up_proj", neurons),
        ):
            whole = before[f"model.layers.{old}.{name}.weight"]
            small = after[f"model.layers.{new}.{name}.weight"]
            assert torch.equal(small, whole[kept][:, hidden]), name
            assert not torch.equal(small, whole[kept.flip(0)][:, hidden]), name  # the twin


def test_a_run_and_its_cut_are_of_two_shapes(pruned: Path) -> None:
    found = inspected(pruned, "pruned", "cut")
    assert found["weights"] is None
    assert len(found["notes"]) == 2  # neither masks nor weights
    fields = {field["field"]: field for field in found["fields"]}
    assert fields["stage"]["first"] == "prune"
    assert fields["shape.hidden_size"]["second"] == 24


def test_a_cut_is_its_export_and_not_another(pruned: Path) -> None:
    if not (pruned / "hf").exists():
        megatron_to_hf(pruned / "cut", pruned / "hf", progress=False)
    found = inspected(pruned, "cut", "hf")
    assert {one["distance"] for one in found["weights"]} == {0.0}
    broken = shutil.copytree(pruned / "hf", pruned / "other", dirs_exist_ok=True)
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40  # sign and exponent of the last value
    file.write_bytes(data)
    found = inspected(pruned, "cut", "other")
    assert len([one for one in found["weights"] if one["distance"]]) == 1


def test_masks_of_two_times_differ_where_they_moved(pruned: Path) -> None:
    same = inspected(pruned, "pruned", "pruned", weights=False)
    assert same["gates"] == []
    assert same["weights"] is None


def test_damage_is_found(pruned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(pruned / "pruned", pruned / "damaged", dirs_exist_ok=True)
    (iteration,) = copy.glob("iter_*")
    file = max(iteration.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["inspect", str(copy), "--verify-checkpoint"]) == 2
    assert f"{file.name}" in capfd.readouterr().err
    file.write_bytes(data[:-100])  # that is seen without reading
    assert main(["inspect", str(copy)]) == 2
    assert f"{file.name}" in capfd.readouterr().err
