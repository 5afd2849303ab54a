"""The figures of one GPU in docs/benchmarks.md are those of the raw output beside it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megashear.shape import ModelShape

DOCS = Path(__file__).parents[2] / "docs"
RAW = DOCS / "benchmarks"
PAGE = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## One GPU\n")[2].partition("\n## ")[0]
SPEED: dict[str, Any] = json.loads((RAW / "gpu_speed.json").read_text())
PROFILE = (RAW / "gpu_profile_7b.txt").read_text()
NAMES = {
    "7B pruning": "7B pruning, full recompute",
    "7B pruning, unmasked": "7B pruning, full recompute, unmasked",
    "7B pruning, unmasked again": "7B pruning, full recompute, unmasked again",
}
"""What the page calls the ways of gpu.py."""


def seconds(measured: Sequence[dict[str, Any]], way: str) -> list[float]:
    """Of a way, round by round."""
    return [m["wall_s"] for m in sorted(measured, key=lambda m: m["round"]) if m["way"] == way]


def causal_flops(shape: ModelShape, sequence: int) -> int:
    """Operations of a token's training pass, half of the attention, as a causal mask has it."""
    width = shape.num_attention_heads * shape.head_dim
    return shape.training_flops(sequence) - 6 * shape.num_layers * width * sequence


def checks() -> Iterator[str]:
    for check in json.loads((RAW / "gpu_correctness.json").read_text())["checks"]:
        yield f"| {check['name']} | {check['bound']:g} | {check['found']:.2g} |"


def steps() -> Iterator[str]:
    for job, found in SPEED["speed"].items():
        if "measured" not in found:
            continue
        work = SPEED["work"][job]
        shape, sequence = ModelShape(**work["shape"]), work["seq_length"]
        tokens = sequence * work["micro_batch_size"] * work["num_microbatches"]
        unmasked = f"{job}, unmasked"
        for way in found["ways"]:
            times = seconds(found["measured"], way)
            rate = tokens / statistics.median(times)
            mfu = rate * causal_flops(shape, sequence) / SPEED["peak_flops_per_s"]
            over = ""
            if len(found["ways"]) > 1 and way != unmasked:
                pairs = zip(times, seconds(found["measured"], unmasked))
                over = f"{statistics.median(a / b for a, b in pairs):.3f}"
            yield (
                f"| {NAMES.get(way, way)} | {tokens:,} | {statistics.median(times):.3f} | "
                f"{rate:,.0f} | {100 * mfu:.1f} % | {over} | "
                f"{found['peak_bytes'][way] / 2**30:.1f} |"
            )
    lines = re.findall(
        r"^7B pruning recompute=False (\w+) ([\d.]+) s MFU ([\d.]+) ratio ([\d.]+) .*peak ([\d.]+)",
        PROFILE,
        flags=re.MULTILINE,
    )
    for way, step, mfu, over, peak in lines:
        name = {"masked": "", "unmasked": ", unmasked", "again": ", unmasked again"}[way]
        ratio = "" if way == "unmasked" else over
        yield (
            f"| 7B pruning{name} | 16,384 | {float(step):.3f} | {16384 / float(step):,.0f} | "
            f"{mfu} % | {ratio} | {peak} |"
        )


def attention() -> Iterator[str]:
    measured = SPEED["attention"]["measured"]
    usual = seconds(measured, "torch's choice")
    for way in dict.fromkeys(m["way"] for m in measured):
        times = seconds(measured, way)
        over = statistics.median(a / b for a, b in zip(times, usual))
        yield f"| {way} | {1e3 * statistics.median(times):.2f} | {over:.2f} |"


@pytest.mark.parametrize("rows", [checks, steps, attention], ids=lambda rows: rows.__name__)
def test_rows_are_those_of_the_raw_output(rows: Any) -> None:
    found = list(rows())
    assert len(found) >= 4
    assert [row for row in found if row not in SECTION.splitlines()] == []


def test_another_figure_is_noticed() -> None:
    row = next(steps())
    assert row in SECTION.splitlines()
    assert row.replace("1.048", "1.030") != row
    assert row.replace("1.048", "1.030") not in SECTION.splitlines()


def test_the_shares_said_to_planners_are_those_measured() -> None:
    seven = ModelShape(**SPEED["work"]["7B pruning"]["shape"])
    (step,) = re.findall(r"recompute=False masked ([\d.]+) s MFU", PROFILE)
    whole = {"pruning": 16384 / float(step) * seven.training_flops(4096)}
    for size in ("1.3B", "2.7B"):
        job = SPEED["speed"][f"{size} pretraining"]
        shape = ModelShape(**SPEED["work"][f"{size} pretraining"]["shape"])
        times = seconds(job["measured"], f"{size} pretraining")
        tokens = {"1.3B": 65536, "2.7B": 32768}[size]
        whole[size] = tokens / statistics.median(times) * shape.training_flops(4096)
    peak = SPEED["peak_flops_per_s"]
    said = (
        f"{100 * whole['pruning'] / peak:.1f} % in pruning",
        (f"{100 * whole['1.3B'] / peak:.1f} and {100 * whole['2.7B'] / peak:.1f} % in pretraining"),
    )
    planning = (DOCS / "planning.md").read_text(encoding="utf-8")
    for text in (SECTION, planning):
        assert all(words in " ".join(text.split()) for words in said), said


def test_what_was_measured_is_not_said_to_be_unmeasured() -> None:
    for page in (DOCS / "planning.md", DOCS.parent / "README.md"):
        assert "GPU runs are not measured" not in page.read_text(encoding="utf-8")
        assert "No GPU run" not in page.read_text(encoding="utf-8")
    named = re.findall(r"\(benchmarks/(gpu_[\w.]+)\)", SECTION)
    assert set(named) == {path.name for path in RAW.glob("gpu_*")}
