"""The benchmark of monitoring measures each thing it names, and refuses to overwrite."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny import PAIRS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = ROOT / "tools/benchmarks/monitoring.py"
    spec = importlib.util.spec_from_file_location("monitoring_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shares_are_those_of_the_steps_between(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = []
    for name, shape in zip(("source", "target"), PAIRS["8-groups-of-4"]):
        shapes.append(tmp_path / f"{name}.json")
        shapes[-1].write_text(json.dumps(shape.to_dict()))
    words = [
        *("--shape", shapes[0], "--target", shapes[1], "--step-seconds", 2, "--rounds", 3),
        *("--log-interval", 5, "--eval-interval", 20, "--json", tmp_path / "out.json"),
    ]
    assert benchmark.main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert {what: len(seconds) for what, seconds in found["rounds"].items()} == {
        "a step": 3,
        "a log line": 3,
        "an evaluation": 3,
    }
    medians = [sorted(seconds)[1] for seconds in found["rounds"].values()]
    wanted = [seconds / every / 2 for seconds, every in zip(medians, (1, 5, 20))]
    assert found["shares"] == pytest.approx(wanted, rel=1e-12)
    assert f"all of it, of steps of 2 s: {sum(wanted):.4%}" in capsys.readouterr().out
    assert benchmark.main([str(word) for word in words]) == 2
    assert "out.json exists" in capsys.readouterr().err
