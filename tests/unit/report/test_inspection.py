"""The command: what it prints of models of every stage, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megashear.__main__ import main
from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import write_weights
from tests.conversions import megatron_to_hf
from tests.reference_llama import random_weights
from tests.tiny import SOURCE, TARGET
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the cut writes it."""
    output = tmp_path_factory.mktemp("cut") / "cut"
    description = Description(
        shape=TARGET,
        iteration=0,
        stage="cut",
        details={"source_shape": SOURCE.to_dict(), "pruned_for": 40, "rounding": {"hidden": 3}},
    )
    write_weights(output, random_weights(TARGET), description)
    return output


def test_a_cut_tells_its_shape_before_and_after(
    cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(cut)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("iter_0000000: checkpoint, cut, before recovery")
    assert any(line.split() == ["hidden", "dimensions", "40", "24"] for line in lines)
    counts = [line.split()[-1] for line in lines if line.startswith("parameters of")]
    total = sum(int(count.replace(",", "")) for count in counts)
    assert total == TARGET.num_params()
    whole = ["parameters", f"{SOURCE.num_params():,}", f"{total:,}"]
    assert any(line.split() == whole for line in lines)
    assert "pruned for 40 steps" in lines
    assert "gates that rounding to the target changed: 3 hidden dimensions" in lines


def test_a_hugging_face_directory_is_read_too(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron_to_hf(cut, tmp_path / "hf", progress=False)
    assert main(["inspect", str(tmp_path / "hf"), "--json", str(tmp_path / "a" / "b.json")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'hf'}: Hugging Face directory\n")
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert written["parameters"] == TARGET.num_params()
    assert written["formats"] == ["float32"]
    assert main(["inspect", str(cut), str(tmp_path / "hf")]) == 0
    assert "are equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nothing at nowhere; name a checkpoint or a Hugging Face directory"),
        (["."], "no checkpoint at .: it has no latest_checkpointed_iteration.txt"),
        (["a.txt"], "a.txt is a file; megashear reads directories, and .pt or .pth files of LLM"),
        (["CUT", "--image", "m.png"], "--image m.png draws masks, and .* has none; give a check"),
        (["CUT", "--image", "m.gif"], "--image m.gif ends in '.gif'; wanted .png, .svg or .pdf"),
        (["CUT", "--json", "a.txt"], "--json a.txt exists; choose another or remove it first"),
        (["CUT", "b", "c"], "3 words before the first flag .* takes at most 2: --load, --compare"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    flags: list[str],
    message: str,
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("do not lose me")
    assert main(["inspect", *(str(cut) if flag == "CUT" else flag for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_words_before_the_first_flag_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "one", "two", "--mode", "expected", "--dry-run"]) == 2  # not there
    assert "load: one\ncompare: two\nmode: expected\n" in capsys.readouterr().out
