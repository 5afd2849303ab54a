"""inspect of a file of scores: its numbers, its figure, and what a model says of its scores."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from megashear.__main__ import main
from megashear.checkpoint.description import Description
from megashear.checkpoint.details import RunDetails
from megashear.checkpoint.scores import ImportanceScores, read_scores
from megashear.checkpoint.weights import write_weights
from megashear.masks.kinds import KINDS
from megashear.report.scores import draw_scores, summary
from megashear.report.tables import origin_text
from tests.reference_llama import random_weights
from tests.tiny import SOURCE, TARGET
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)

MEASURED = {"model": "source/iter_0000007", "sequences": 13, "sequence length": 32}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.rand(k.extents(SOURCE), generator=generator) for name, k in KINDS.items()}
    path = tmp_path / "scores.json"
    ImportanceScores(shape=SOURCE, values=values, measured=MEASURED).write(path)
    return path


def test_the_table_has_the_numbers_of_the_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(file), "--json", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{file}: importance scores of source/iter_0000007 on 13 sequences of 32 tokens\n"
    )
    lists = json.loads(file.read_text())["scores"]
    neurons = [score for row in lists["intermediate"] for score in row]
    upper = sum(sum(sorted(row)[48:]) for row in lists["intermediate"]) / sum(neurons)
    wanted = [f"{len(neurons)}", *(f"{n:.4g}" for n in (min(neurons), max(neurons)))]
    (line,) = [line.split() for line in printed.splitlines() if line.startswith("neurons")]
    assert [line[1], line[2], line[4], line[5]] == [*wanted, f"{upper:.3f}"]
    # torch's median of an even number is the lower of the two in the middle
    assert line[3] == f"{statistics.median_low(neurons):.4g}"
    order = sorted(range(SOURCE.num_layers), key=lambda layer: lists["layer"][layer])
    found = re.findall(r"(\d+) \(", printed.partition("least important first: ")[2])
    assert [int(layer) for layer in found] == order
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["scores"]["head"] == lists["head"]
    assert written["measured"]["sequences"] == 13
    assert written["summary"]["intermediate"]["upper half"] == pytest.approx(upper)


def test_the_upper_half_says_whether_scores_tell_units_apart() -> None:
    def share(rows: list[list[float]]) -> float:
        values = {name: torch.ones(kind.extents(SOURCE)) for name, kind in KINDS.items()}
        values["head"] = torch.tensor(rows)
        return summary(ImportanceScores(shape=SOURCE, values=values))["head"]["upper half"]

    # halves of the rows of masks: two query heads in each key/value head
    assert share([[1.0] * 8] * 4) == 0.5
    assert share([[0.0, 2.0] * 4] * 4) == 1.0
    assert share([[2.0] * 4 + [0.0] * 4] * 4) == 0.5


def test_the_figure_shows_the_scores(file: Path, tmp_path: Path) -> None:
    scores = read_scores(file, "--load")
    figure = draw_scores(scores, title="scores")
    layers, heads, neurons, hidden, *_ = figure.axes
    heights = [bar.get_height() for bar in layers.patches]
    assert heights == scores.values["layer"][0].tolist()
    (image,) = heads.get_images()
    assert torch.equal(torch.tensor(image.get_array().tolist()), scores.values["head"].float())
    assert (len(neurons.lines), len(hidden.lines)) == (SOURCE.num_layers, 1)
    row = sorted(scores.values["intermediate"][2].tolist(), reverse=True)
    mean = sum(row) / len(row)
    drawn = neurons.lines[2].get_ydata().tolist()
    assert drawn == pytest.approx([score / mean for score in row])
    assert main(["inspect", str(file), "--image", str(tmp_path / "scores.png")]) == 0
    assert (tmp_path / "scores.png").stat().st_size > 5000


def test_scores_are_not_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), str(file)]) == 2
    assert "is for two models, and " in capsys.readouterr().err
    file.write_text('{"format": "another"}')
    assert main(["inspect", str(file)]) == 2
    assert "is of format 'another', wanted 'megashear-scores-1'" in capsys.readouterr().err


def test_a_model_says_what_scores_chose_its_units() -> None:
    origin = MEASURED | {"model": "s/iter_0000007", "file": "s.json"}
    found = origin_text(RunDetails.of({"importance_scores": origin}))
    assert found is not None
    assert found.startswith("units were chosen by importance scores of s/iter_0000007 on 13 ")
    assert found.endswith(" (s.json)")
    assert origin_text(RunDetails.of({})) is None


def test_inspect_of_a_cut_names_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    details = {"source_shape": SOURCE.to_dict(), "importance_scores": MEASURED}
    description = Description(shape=TARGET, iteration=0, stage="cut", details=details)
    write_weights(tmp_path / "cut", random_weights(TARGET), description)
    assert main(["inspect", str(tmp_path / "cut")]) == 0
    wanted = "units were chosen by importance scores of source/iter_0000007 on 13 sequences of 32"
    assert wanted in capsys.readouterr().out
