"""The card of an exported model says what its checkpoint says, and the directory loads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megashear.__main__ import main
from megashear.checkpoint.description import Description, find_iteration, read_description
from megashear.checkpoint.history import made_before, runs_of
from megashear.checkpoint.origin import front_matter
from megashear.checkpoint.weights import write_weights
from megashear.conversion import hf, model_card
from megashear.conversion.sources import open_checkpoint
from megashear.conversion.task_results import read_results
from megashear.shape import ModelShape
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.reference_llama import random_weights
from tests.text_run import train_tokenizer
from tests.unit.checkpoint.shapes import CUT_GROUPED, GROUPED
from tests.unit.checkpoint.test_history import saved

SMALL = ModelShape(**{**CUT_GROUPED.to_dict(), "vocab_size": 280})
LARGE = ModelShape(**{**GROUPED.to_dict(), "vocab_size": 280})
RESULTS = {
    "lm_eval_version": "0.4.13",
    "n-shot": {"sciq": 0, "arc_challenge": 25},
    "results": {
        "sciq": {"alias": "sciq", "acc,none": 0.873, "acc_stderr,none": 0.0105},
        "arc_challenge": {"acc_norm,none": 0.335, "acc_norm_stderr,none": "N/A"},
        "nq_open": {"exact_match,remove_whitespace": 0.096},
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = [f"words of many letters, {number} of them" for number in range(400)]
    return train_tokenizer(text, folder, vocab_size=280)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A checkpoint of continued pretraining after a pruning and a cut."""
    pruned = saved("prune", 10)
    details = {
        **made_before(pruned),
        "source_shape": LARGE.to_dict(),
        "pruned_for": 10,
        "rounding": {"hidden": 3},
    }
    cut = Description(shape=SMALL, iteration=0, stage="cut", details=details)
    own = saved("pretrain", 30, before=cut)
    losses = {
        "held_out_loss": {"loss": {"web": 2.345678, "books": 3.456789}},
        "held_out_standard_error": {"loss": {"web": 0.01234, "books": None}},
    }
    description = replace(own, shape=SMALL, details=cut.lineage | own.details | losses)
    output = tmp_path_factory.mktemp("run") / "saved"
    write_weights(output, random_weights(SMALL), description, tokenizer=tokenizer)
    return output


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hf") / "small|model"
    (results := output.parent / "results.json").write_text(json.dumps(RESULTS))
    words = ["--input", str(trained), "--output", str(output), "--task-results", str(results)]
    assert main(["convert", *words]) == 0
    return output


def rows(card: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of the table under a heading by the first cell of the row."""
    section = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_the_head_is_yaml_that_the_hub_reads(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == front_matter(exported / "README.md")
    assert head == {
        "base_model": "org/source",
        "license": "llama2",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megashear", "llama", "pruning", "sheared", "distillation"],
    }
    assert "\n# small\\|model\n" in text


def test_numbers_are_those_of_the_checkpoint(exported: Path, trained: Path) -> None:
    card = (exported / "README.md").read_text()
    description = read_description(find_iteration(trained))
    known, runs = description.known, runs_of(description)
    shape = rows(card, "Shape")
    for name, extent in (("layers", "num_layers"), ("neurons of the MLP", "ffn_hidden_size")):
        assert shape[name] == [f"{getattr(each, extent)}" for each in (SMALL, LARGE)]
    assert shape["parameters"] == [f"{each.num_params():,}" for each in (SMALL, LARGE)]
    assert f"A llama model of {SMALL.num_params():,} parameters, pruned from org/source" in card
    made = list(rows(card, "How it was made").values())
    assert made == [["10", "5,120", "teacher"], ["30", "15,360", "teacher"]]
    assert [f"{run.tokens:,}" for run in runs] == [row[1] for row in made]
    assert "held to the target by the projection" in card
    assert rows(card, "Training text") == {
        "web": ["60 (75.0 %)", "180 (75.0 %)"],
        "books": ["20 (25.0 %)", "60 (25.0 %)"],
    }
    losses, errors = known.held_out_loss["loss"], known.held_out_standard_error["loss"]
    found = rows(card, "Held-out loss")
    assert {name: float(row[0]) for name, row in found.items() if "*" not in name} == {
        name: round(loss, 4) for name, loss in losses.items()
    }
    assert found["web"][1] == f"{errors['web']:.4f}"
    assert found["books"][1] == ""
    assert found["**mean of domains**"][0] == f"**{sum(losses.values()) / 2:.4f}**"
    assert "after step 30 of continued pretraining" in card


def test_a_cut_by_scores_and_a_cut_by_masks_are_told_apart(trained: Path) -> None:
    source = open_checkpoint(trained)
    by_masks = model_card.Card(title="x", source=source, has_tokenizer=False).text()
    assert "by the method of [Sheared LLaMA](https://arxiv.org/abs/2310.06694)" in by_masks
    details = {name: value for name, value in source.details.items() if name != "pruned_for"}
    one_shot = replace(source, details=details, description=None)
    text = model_card.Card(title="x", source=one_shot, has_tokenizer=False).text()
    assert "to a uniform shape, by importance scores, in one shot" in text
    assert "Sheared LLaMA" not in text
    assert "sheared" not in text.partition("---\n\n")[0]
    assert "## How it was made" not in text


def test_a_model_under_masks_has_the_losses_of_the_size_of_its_cut(tmp_path: Path) -> None:
    cut = Description(
        shape=SMALL, iteration=0, stage="cut", details=made_before(saved("prune", 10))
    )
    write_weights(tmp_path / "cut", random_weights(SMALL), cut)
    source = open_checkpoint(tmp_path / "cut")
    card = model_card.Card(title="x", source=source, has_tokenizer=False).text()
    assert rows(card, "Held-out loss")["web"] == ["2.5000", ""]
    assert "after step 10 of pruning (masks and weights together), under masks at the size" in card


def test_tasks_are_those_of_the_results_file(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "Scored with lm-evaluation-harness 0.4.13." in card
    assert rows(card, "Tasks") == {
        "sciq": ["0", "acc", "0.8730", "0.0105"],
        "arc_challenge": ["25", "acc_norm", "0.3350", ""],
        "nq_open": ["", "exact_match (remove_whitespace)", "0.0960", ""],
    }


def test_the_directory_loads_unchanged_and_knows_where_text_ends(
    exported: Path, tokenizer: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert model.generation_config.eos_token_id == pieces.eos_id() == 2
    assert model.generation_config.bos_token_id == pieces.bos_id() == 1
    loaded = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = loaded("words of many letters", return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert found.shape[1] <= tokens["input_ids"].shape[1] + 4
    # what vLLM and llama.cpp's converter look for
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        assert (exported / name).is_file(), name


def converted(tmp_path: Path, *words: str, card: str | None = None, **generation: Any) -> str:
    """Return the card of a Hugging Face directory that went in and out again."""
    hf.write_directory(tmp_path / "in", random_weights(SMALL), SMALL)
    if card is not None:
        (tmp_path / "in/README.md").write_text(card)
    if generation:
        (tmp_path / "in/generation_config.json").write_text(json.dumps(generation))
    hf_to_megatron(tmp_path / "in", tmp_path / "checkpoint")
    main(["convert", f"--input={tmp_path}/checkpoint", f"--output={tmp_path}/out", *words])
    return (tmp_path / "out/README.md").read_text()


def test_a_licence_travels_from_the_sources_card(tmp_path: Path) -> None:
    card = converted(tmp_path, card="---\nlicense: other\nlicense_name: llama3.1\n---\n")
    head = front_matter(tmp_path / "out/README.md")
    assert "base_model" not in head, "the hub would take a folder's name for a repository's"
    assert (head["license"], head["license_name"]) == ("other", "llama3.1")
    assert "`other`, the licence of in, whose terms" in card
    assert "pruning" not in head["tags"]


def test_a_licence_that_nobody_named_is_said_to_be_unknown(tmp_path: Path) -> None:
    card = converted(tmp_path)
    assert "license" not in front_matter(tmp_path / "out/README.md")
    assert "nothing beside in named its licence. Add `license`" in card


def test_the_user_may_name_both(tmp_path: Path) -> None:
    words = ("--license", "apache-2.0", "--base-model", "org/model")
    card = converted(tmp_path, *words, card="---\nlicense: other\nlicense_name: llama3.1\n---\n")
    head = front_matter(tmp_path / "out/README.md")
    assert (head["base_model"], head["license"]) == ("org/model", "apache-2.0")
    assert "license_name" not in head
    assert "`apache-2.0`, the licence of org/model, whose terms" in card


def test_end_tokens_of_a_generation_config_stay(tmp_path: Path) -> None:
    said = {"eos_token_id": [5, 6], "temperature": 0.6, "do_sample": True}
    converted(tmp_path, **said)
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert found == said


@pytest.mark.parametrize(
    ("said", "ids", "wanted"),
    [
        (5, [5, 7], [5, 7]),
        ([6, 5], [5, 6, 7], [6, 5, 7]),
        ([5, 6], [5, 7], [5, 6, 7]),
        ([5, 6], 5, [5, 6]),
        (5, [7, 8], 5),
        (None, [5, 7], [5, 7]),
    ],
)
def test_the_end_of_a_turn_joins_those_of_a_generation_config(
    tmp_path: Path, said: Any, ids: Any, wanted: Any
) -> None:
    (source := tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": said, "temperature": 0.6})
    )
    known = {"eos_token_id": ids}
    out = tmp_path / "out"
    hf.write_directory(out, random_weights(SMALL), SMALL, token_ids=known, tokenizer=[source])
    found = json.loads((out / "generation_config.json").read_text())
    assert found == {"eos_token_id": wanted, "temperature": 0.6}


def test_missing_end_tokens_are_added(tmp_path: Path) -> None:
    hf.write_directory(tmp_path / "a", random_weights(SMALL), SMALL, token_ids={"eos_token_id": 7})
    found = json.loads((tmp_path / "a/generation_config.json").read_text())
    assert found == {"_from_model_config": True, "eos_token_id": 7}
    hf.write_directory(tmp_path / "b", random_weights(SMALL), SMALL)
    assert not (tmp_path / "b/generation_config.json").exists()


def test_a_card_can_be_left_out_and_is_never_replaced(trained: Path, tmp_path: Path) -> None:
    megatron_to_hf(trained, tmp_path / "plain", card=False)
    assert not (tmp_path / "plain/README.md").exists()
    card = model_card.Card(title="x", source=open_checkpoint(trained), has_tokenizer=False)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError):
        model_card.write(tmp_path, card)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_that_was_edited_is_no_damage(trained: Path, tmp_path: Path) -> None:
    megatron_to_hf(trained, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    assert main(["convert", "--check", str(tmp_path / "out")]) == 0


def test_a_shape_that_stock_runtimes_refuse_is_said(trained: Path) -> None:
    source = open_checkpoint(trained)
    odd = replace(source, shape=replace(SMALL, hidden_size=25))
    text = model_card.Card(title="x", source=odd, has_tokenizer=False).text()
    assert "Stock runtimes refuse this shape: hidden_size 25 is not a multiple" in text
    assert "vLLM" not in text
    assert "No tokenizer was given" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"--task-results .*r.json is no results file of lm-evaluation-harness .*'results'"),
        ('{"results": [1]}', r"is no results file"),
        ('{"results": {"a": 3}}', r"is no results file"),
        ('{"results": {"a": {"alias": "a"}}}', r"has no score of any task"),
        ("[", r"r.json is not JSON"),
    ],
)
def test_another_file_of_results_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "r.json", "--task-results")


def test_results_and_names_without_a_card_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    words = ["--input", str(trained), "--output", str(tmp_path / "o"), "--task-results"]
    named = ["--base-model", "org/model", "--license", "apache-2.0"]
    assert main(["convert", *words[:4], *named, "--no-model-card"]) == 2
    wanted = "--base-model org/model and --license apache-2.0 would stand in the card of the"
    assert wanted in capsys.readouterr().err
    for more in (["--no-model-card"], ["--output-format", "checkpoint"]):
        assert main(["convert", *words, str(tmp_path / "r.json"), *more]) == 2
        assert "is for the card of a Hugging Face directory" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
