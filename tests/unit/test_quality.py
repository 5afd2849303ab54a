"""The comparison of ways to a small model: its counts, curves and text, and what it leaves out."""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "tools/benchmarks"
sys.path.insert(0, str(FOLDER))

import quality  # noqa: E402
import quality_text  # noqa: E402
from quality_arms import ARMS, SIZES, Arm, Plan, Size, arithmetic, plan  # noqa: E402
from quality_figures import (  # noqa: E402
    by_arm,
    first_tokens,
    losses_table,
    mean_loss,
    spread,
    tokens_saved,
)

CURVE = [(100, 5.0), (200, 4.0), (400, 3.5)]
TINY = SIZES["tiny"]


def run(arm: str, seed: int, loss: float, curve: list[tuple[int, float]]) -> dict[str, Any]:
    return {
        "arm": arm,
        "label": arm,
        "budget": "tokens",
        "seed": seed,
        "tokens": {"masks": 0, "recovery": curve[-1][0]},
        "flops": 1e12,
        "loss": {"a": loss, "b": loss + 1},
        "curve": curve,
    }


def test_tokens_to_a_loss_are_read_between_two_points_and_never_beyond_them() -> None:
    assert first_tokens(CURVE, 4.5) == 150
    assert first_tokens(CURVE, 3.75) == 300
    assert first_tokens(CURVE, 5.5) == 100  # below it already at the first point
    assert first_tokens(CURVE, 3.4) is None
    assert first_tokens([(100, 5.0), (200, 3.0), (300, 4.0)], 3.5) == 175  # the first time counts


def test_tokens_saved_pair_the_seeds() -> None:
    slow = [run("slow", 1, 4.0, [(400, 4.5), (800, 4.0)]), run("slow", 2, 3.5, [(800, 3.5)])]
    fast = [run("fast", 1, 3.5, CURVE), run("fast", 2, 3.5, CURVE)]
    assert tokens_saved(fast, slow) == [4.0, 2.0]
    assert tokens_saved(slow, fast) is None  # the first seed never comes to 3.5
    assert tokens_saved(fast[:1], slow[1:]) is None


def test_the_table_names_the_domain_furthest_above_the_source() -> None:
    found = [run("x", 1, 3.0, CURVE), run("x", 2, 3.2, CURVE)]
    line = losses_table(found, {"a": 2.0, "b": 3.5}, "tokens").splitlines()[-1]
    assert "3.600 +- 0.100" in line
    assert "a +1.100" in line
    assert spread([2.0]).error is None


def flops_of_token(shape: Any, seq_length: int, passes: int) -> int:
    """Forward is one pass, forward and backward three; a product of a matrix counts two."""
    h, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    attention = 4 * h * heads + 2 * heads * seq_length  # q, k, v, o; scores and their sum
    mlp = 3 * h * shape.ffn_hidden_size
    return 2 * passes * (shape.num_layers * (attention + mlp) + shape.vocab_size * h)


@pytest.mark.parametrize("name", ["scratch", "importance", "masks", "widths-kd-05"])
def test_arithmetic_counts_masks_at_the_sources_shape_and_the_teacher_forward(name: str) -> None:
    arm, steps, length = ARMS[name], Plan(mask_steps=7, recover_steps=11), TINY.seq_length
    tokens = TINY.batch * length
    layers = TINY.target.num_layers if name == "widths-kd-05" else TINY.source.num_layers
    masked = replace(TINY.source, num_layers=layers)
    wanted = tokens * (
        7 * flops_of_token(masked, length, 3) + 11 * flops_of_token(TINY.target, length, 3)
    )
    if arm.distilled:
        wanted += 18 * tokens * flops_of_token(TINY.source, length, 1)
    if name in ("importance", "widths-kd-05"):
        wanted += TINY.score_sequences * length * flops_of_token(TINY.source, length, 1)
    assert arithmetic(arm, TINY, steps) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("arm", ARMS.values(), ids=list(ARMS))
def test_budgets_are_met_to_a_step(arm: Arm, size: Size) -> None:
    equal = plan(arm, size, "tokens")
    assert equal.steps == size.arm_steps
    assert (equal.mask_steps > 0) == (arm.start == "masks")
    # the last step is a point of the curve
    assert equal.recover_steps % size.eval_interval == 0
    allowed = arithmetic(ARMS["scratch"], size, plan(ARMS["scratch"], size, "tokens"))
    step = 2 * size.batch * size.seq_length * size.source.training_flops(size.seq_length)
    spent = arithmetic(arm, size, plan(arm, size, "arithmetic"))
    assert abs(spent - allowed) <= step


def test_sources_are_trained_on_eight_tokens_a_parameter() -> None:
    for name, size in SIZES.items():
        tokens = size.source_steps * size.source_batch * size.seq_length
        assert (tokens >= 8 * size.source.num_params()) == (name != "smoke")
        assert size.batch % max(size.ranks, size.noise_streams) == 0


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Give the stages that a comparison starts, none of which runs."""
    started: list[tuple[str, dict[str, Any]]] = []

    def record(command: str, flags: dict[str, Any], **_: object) -> str:
        started.append((command, flags))
        return json.dumps({"stopped": None})

    monkeypatch.setattr(quality, "run_stage", record)
    monkeypatch.setattr(quality, "_losses", lambda checkpoint: {"a": 3.0})
    return started


def comparison(folder: Path, deadline: float | None = None) -> quality.Comparison:
    return quality.Comparison(output=folder, size=TINY, data=None, deadline=deadline)


def test_what_is_done_is_not_done_again_and_what_is_begun_is_resumed(
    tmp_path: Path, stages: list[tuple[str, dict[str, Any]]]
) -> None:
    comparison(tmp_path).run_arm("widths-kd-05", 2, "tokens")
    assert [command for command, _ in stages] == ["score", "cut", "prune", "cut", "pretrain"]
    assert stages[1][1]["output"] == stages[2][1]["load"] != stages[3][1]["output"]
    folder = tmp_path / "arms/widths-kd-05.tokens/seed2"
    for command, flags in stages:
        if command in ("prune", "pretrain"):
            assert flags["resume"] is True
            assert flags["seed"] == 2
            assert flags["distill_from"] == tmp_path / "source"
    found = json.loads((folder / "result.json").read_text())
    assert found["tokens"] == {"masks": 50 * 1024, "recovery": 950 * 1024}
    # all done
    comparison(tmp_path).run_arm("widths-kd-05", 2, "tokens")
    assert len(stages) == 5
    # killed after the masks, before the end of recovery
    for file in ("result.json", "model.done"):
        (folder / file).unlink()
    comparison(tmp_path).run_arm("widths-kd-05", 2, "tokens")
    assert "prune" not in [command for command, _ in stages[5:]]
    assert stages[-1][0] == "pretrain"


def test_a_stage_that_the_minutes_stopped_is_not_done(
    tmp_path: Path, stages: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(quality.TimeUpError, match="minutes are over"):
        comparison(tmp_path, deadline=0.0).run_arm("scratch", 1, "tokens")
    assert not stages
    stopped = json.dumps({"stopped": "12 minutes are over"})
    monkeypatch.setattr(quality, "run_stage", lambda *_, **__: stopped)
    with pytest.raises(quality.TimeUpError, match="12 minutes"):
        comparison(tmp_path).run_arm("scratch", 1, "tokens")
    assert not list(tmp_path.rglob("*.done"))
    assert not list(tmp_path.rglob("result.json"))


def test_an_output_of_another_size_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "size").write_text("small")
    assert quality.main(["--size", "tiny", "--output", str(tmp_path)]) == 2
    assert "is of --size small, not tiny; choose another directory" in capsys.readouterr().err


def test_text_of_a_page_has_its_blocks_and_none_of_its_navigation() -> None:
    page = (
        "<html><head><title>t</title></head><body><div class='navheader'><div>up</div></div>"
        "<p>a &amp; b\n  c</p><pre>x\n  y</pre><ul><li>one<li>two</ul>"
        "<script>1 < 2</script></body></html>"
    )
    assert quality_text.text_of_html(page) == "a & b c\nx\n  y\none\ntwo\n"


def test_roff_loses_its_comments() -> None:
    page = '.\\" licence\n\'\\" t\n.TH A 1\ntext \\" kept\n'
    assert quality_text.without_comments(page) == '.TH A 1\ntext \\" kept\n'


def test_a_domain_has_equal_documents_once_and_ends_at_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    texts = [*["same\n"] * 3, *(f"text {number}\n" for number in range(50)), " \n"]
    assert quality_text.write_domain(path, iter(texts), 10**6) == {"documents": 51, "bytes": 395}
    assert len(path.read_text().splitlines()) == 51
    assert quality_text.write_domain(path, iter(texts), 100)["bytes"] <= 100


def test_long_documents_are_cut_at_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_text, "LONGEST_DOCUMENT", 10)
    assert list(quality_text.pieces("12345\n789\nabc\n")) == ["12345\n789\n", "abc\n"]
    assert list(quality_text.pieces("12\n" + "x" * 20 + "\n45\n")) == ["12\n45\n"]


def test_without_packages_the_text_is_that_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(quality_text, "write_domains", lambda folder: {"python": 7})
    found = quality_text.make_text(tmp_path / "text")
    assert found["domains"] == {"python": {"bytes": 7}}
    assert list(found["packages"]) == ["python"]
    assert "taking text of this Python" in capsys.readouterr().err


def test_the_readmes_losses_are_those_of_the_raw_output() -> None:
    root = FOLDER.parents[1]
    runs = json.loads((root / "docs/benchmarks/quality_tiny.json").read_text())["runs"]
    arms = by_arm(runs, "tokens")
    wanted = [
        str(spread([mean_loss(each) for each in arms[name]]))
        for name in ("importance-kd", "masks-kd", "importance", "masks", "scratch")
    ]
    _, _, text = (root / "README.md").read_text().partition("<!-- quality-table -->")
    table, _, after = text.partition("<!-- /quality-table -->")
    assert after
    assert re.findall(r"\d\.\d{3} \+- 0\.\d{3}", table) == wanted
    for other, factor in (("masks", "3.6"), ("scratch", "12")):
        saved = tokens_saved(arms["importance-kd"], arms[other])
        assert saved is not None
        assert f"{statistics.mean(saved):.1f}".startswith(factor)
        assert f" with {factor} times fewer" in table.replace("\n", " ")


@pytest.mark.parametrize("budget", ["tokens", "arithmetic"])
def test_the_pages_tables_are_those_of_the_raw_output(budget: str) -> None:
    docs = FOLDER.parents[1] / "docs"
    found = json.loads((docs / "benchmarks/quality_tiny.json").read_text())
    page = (docs / "quality.md").read_text()
    assert quality.tables(found["runs"], found["source"]["loss"], budget) in page
