"""The comparison of ways to a small model runs whole at its smallest size, and resumes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megashear.quickstart.text import python_code

FOLDER = Path(__file__).parents[2] / "tools/benchmarks"


@pytest.mark.scenario
def test_the_smallest_comparison_runs_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    quality = __import__("quality")
    text = tmp_path / "jsonl"
    text.mkdir()
    for name in ("a", "b"):
        documents = [json.dumps({"text": each}) + "\n" for each in islice(python_code(), 60)]
        (text / f"{name}.jsonl").write_text("".join(documents[name == "b" :: 2]))
    output = tmp_path / "out"
    argv = ["--size", "smoke", "--data", str(text), "--output", str(output), "--budget", "tokens"]
    argv += ["--arms", "importance", "masks-kd"]
    assert quality.main(argv) == 0
    found: dict[str, Any] = json.loads((output / "quality.json").read_text())
    runs = {each["arm"]: each for each in found["runs"]}
    assert list(runs) == ["importance", "masks-kd"]
    for each in runs.values():
        assert each["loss"].keys() == {"a", "b"}
        # a point after every interval, the last at the end
        tokens = [place for place, _ in each["curve"]]
        assert tokens[-1] == each["tokens"]["recovery"]
        assert tokens == [2 * 128 * number for number in range(1, len(tokens) + 1)]
    assert runs["masks-kd"]["tokens"]["masks"] == 8 * 128
    assert (output / "quality.svg").exists()
    assert "importance" in (output / "quality.md").read_text()
    # once more: every stage is done
    capfd.readouterr()
    assert quality.main(argv) == 0
    assert "$ python" not in capfd.readouterr().out
