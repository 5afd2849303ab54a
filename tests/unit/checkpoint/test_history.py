"""Which runs made a model, and where it came from, through every later stage."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint.description import Description, read_description
from megashear.checkpoint.history import made_before, own_run, runs_of
from megashear.checkpoint.origin import front_matter, origin_of
from megashear.config import DataConfig, DistillConfig, MaskConfig, PruneRun, TrainConfig
from megashear.files.integrity import DamagedError
from tests.unit.checkpoint.shapes import GROUPED

ORIGIN = {"name": "org/source", "license": "llama2"}


def saved(stage: str, steps: int, *, before: Description | None = None) -> Description:
    """Return what a run saves that read 8 sequences of 64 tokens a step, 3 of 4 of one domain."""
    run = PruneRun(
        data=DataConfig(data_path="text"),
        masks=MaskConfig(constraint="projection"),
        train=TrainConfig(seq_length=64),
        distill=DistillConfig(distill_from="models/teacher"),
    )
    details = {
        "run": asdict(run),
        "scheduler": {"num_steps": steps},
        "consumed_samples": 8 * steps,
        "loader": {"domains": ["web", "books"], "mixture": {"drawn": [6 * steps, 2 * steps]}},
        "held_out_loss": {"exact": {"web": 2.5, "books": 3.5}},
    }
    kept = {"origin": ORIGIN} if before is None else made_before(before)
    return Description(shape=GROUPED, iteration=steps, stage=stage, details=details | kept)


def test_each_stage_adds_the_run_it_starts_from() -> None:
    pruned = saved("prune", 10)
    cut = Description(shape=GROUPED, iteration=0, stage="cut", details=made_before(pruned))
    trained = saved("pretrain", 30, before=cut)
    again = saved("pretrain", 5, before=trained)
    assert [(run.stage, run.steps) for run in runs_of(again)] == [
        ("prune", 10),
        ("pretrain", 30),
        ("pretrain", 5),
    ]
    assert own_run(cut) is None
    assert runs_of(cut) == runs_of(pruned)
    assert again.known.origin == ORIGIN
    # as JSON brings them back
    there = replace(again, details=json.loads(json.dumps(again.details)))
    assert runs_of(there) == runs_of(again)


def test_a_run_is_counted_from_what_its_checkpoint_says() -> None:
    (run,) = runs_of(saved("prune", 10))
    assert (run.tokens, run.samples, run.drawn) == (10 * 8 * 64, 80, {"web": 60, "books": 20})
    assert (run.constraint, run.distill_from) == ("projection", "models/teacher")
    assert run.held_out_loss == {"exact": {"web": 2.5, "books": 3.5}}
    (later,) = runs_of(saved("pretrain", 10))
    assert later.constraint is None  # it has no masks, whatever its flags say
    (tuned,) = runs_of(saved("finetune", 10))
    assert (tuned.samples, tuned.tokens) == (80, None)


def test_an_older_checkpoint_has_no_history() -> None:
    bare = Description(shape=GROUPED, iteration=3, stage="converted")
    assert runs_of(bare) == []
    assert made_before(bare) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"history": {"stage": "prune"}}, "history is .*; wanted a list"),
        ({"history": [3]}, "3 stands where an object is wanted"),
        ({"history": [{"stage": "prune", "steps": "3"}]}, "steps is '3'; wanted int"),
        ({"history": [{"stage": "prune"}]}, "steps"),
        ({"origin": {"name": 3}}, "origin is .*; wanted texts"),
    ],
)
def test_a_history_of_another_form_is_damage(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    file = {"format": 2, "iteration": 3, "stage": "cut", "shape": GROUPED.to_dict()}
    (tmp_path / "megashear.json").write_text(json.dumps(file | {"details": values}))
    with pytest.raises(DamagedError, match=f"in its details, .*{message}"):
        read_description(tmp_path)


CARD = "---\nlicense: llama2\nlicense_link: LICENSE.txt\ntags: [a]\n---\n\n# A model\n"


@pytest.mark.parametrize(
    ("folder", "named", "name"),
    [
        ("model", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("Llama-2-7b-hf", "/models/llama", "Llama-2-7b-hf"),
        ("Llama-2-7b-hf", None, "Llama-2-7b-hf"),
        ("models--org--a-model.v1/snapshots/0a1b", "", "org/a-model.v1"),
    ],
)
def test_a_model_is_named_as_the_hub_names_it(
    tmp_path: Path, folder: str, named: str | None, name: str
) -> None:
    directory = tmp_path / folder
    directory.mkdir(parents=True)
    assert origin_of(directory, {"_name_or_path": named}) == {"name": name}
    (directory / "README.md").write_text(CARD)
    wanted = {"name": name, "license": "llama2", "license_link": "LICENSE.txt"}
    assert origin_of(directory, {"_name_or_path": named}) == wanted


@pytest.mark.parametrize(
    "text",
    ["# no head", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n", "\xff"],
)
def test_a_card_without_a_head_that_can_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert front_matter(tmp_path / "README.md") == {}
    assert front_matter(tmp_path / "none.md") == {}
    (tmp_path / "README.md").write_text("---\nlicense: [a, b]\n---\n")
    assert "license" not in origin_of(tmp_path, {})
