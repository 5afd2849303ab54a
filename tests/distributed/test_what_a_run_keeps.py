"""What a run leaves behind: its last step, whatever follows, and the model's own tokenizer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.checkpoint.description import (
    TOKENIZER,
    find_iteration,
    read_description,
    write_description,
)
from megashear.config import ModelConfig
from megashear.files import integrity
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train import checkpoints, loop, prepare
from megashear.train.schedule import run_schedule
from tests.distributed.test_resume import WHOLE, configuration, start
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.tiny import SOURCE, layout, microbatches


def test_the_last_step_is_saved_before_the_long_evaluation(text: TextRun, tmp_path: Path) -> None:
    def cut_off() -> None:
        evaluate = loop._Run.evaluate

        def until_the_limit(run: loop._Run, *, is_end: bool) -> None:
            if is_end:
                raise TimeoutError("time limit")
            evaluate(run, is_end=is_end)

        loop._Run.evaluate = until_the_limit  # type: ignore[method-assign]

    written = {"text_samples": 1}
    with pytest.raises(AssertionError, match="TimeoutError: time limit"):
        start(configuration(text, "prune", layout(), tmp_path, **written), 1, cut_off)
    description = read_description(find_iteration(tmp_path / "saved"))
    assert description.iteration == WHOLE
    assert not description.details.keys() & {"held_out_loss", "text_samples"}
    # and the next start, of the same command line, adds it, once
    again = configuration(text, "prune", layout(), tmp_path, resume=True, **written)
    start(again, 1)
    once = read_description(find_iteration(tmp_path / "saved")).details
    assert once["held_out_loss"].keys() == {"expected", "exact"}
    assert len(once["text_samples"]) == 1
    start(again, 1)
    description = read_description(find_iteration(tmp_path / "saved", contents=True))
    assert description.details == once


@pytest.mark.parametrize("broken", [False, True])
def test_a_job_that_saves_when_it_is_stopped_deletes_what_keep_has_too_many(
    text: TextRun, tmp_path: Path, broken: bool
) -> None:
    def forgetful() -> None:
        save = checkpoints.Saver.save

        def after_deletions(saver: checkpoints.Saver, *args: Any, **more: Any) -> Any:
            saver.finish()  # a run that is stopped does not wait for them
            return save(saver, *args, **more)

        checkpoints.Saver.save = after_deletions  # type: ignore[method-assign]
        if broken:  # the process knows only what it has saved itself
            checkpoints.RunCheckpoints._is_ours = lambda self, checkpoint: False  # type: ignore[method-assign]

    config = configuration(text, "pretrain", layout(), tmp_path, keep=1, exit_interval=1)
    for resume in (False, True, True):
        train = replace(config.train, resume=resume)
        start(replace(config, train=train), 1, forgetful)
    # 2 is what the last one resumed from, and protected
    left = [f"iter_{step:07d}" for step in ((1, 2, 3) if broken else (2, 3))]
    assert sorted(path.name for path in (tmp_path / "saved").glob("iter_*")) == left


def own_model(text: TextRun, folder: Path) -> tuple[TextRun, Path]:
    """The starting checkpoint as a copy that a test may change, and its iteration."""
    shutil.copytree(text.checkpoint, folder)
    return text._replace(checkpoint=folder), find_iteration(folder)


def test_a_run_carries_the_models_own_tokenizer_and_token_ids(
    text: TextRun, tmp_path: Path
) -> None:
    model, before = own_model(text, tmp_path / "model")
    # as a chat model's config.json has it, and no tokenizer file could tell
    ids = read_description(before).token_ids | {"eos_token_id": [2, 7]}
    write_description(before, replace(read_description(before), token_ids=ids))
    integrity.write(before)
    start(configuration(model, "pretrain", layout(), tmp_path), 1)
    after = find_iteration(tmp_path / "saved")
    source, trained = read_description(before), read_description(after)
    assert trained.token_ids == ids
    assert trained.tokenizer_sha256 == source.tokenizer_sha256
    files = [
        {path.name: path.read_bytes() for path in (directory / TOKENIZER).iterdir()}
        for directory in (before, after)
    ]
    assert files[0]
    assert files[1] == files[0]
    assert trained.details["held_out_loss"]["loss"].keys() == {"words", "paths", "numbers"}


def test_a_model_without_a_tokenizer_goes_on_with_that_of_its_data(
    text: TextRun, tmp_path: Path
) -> None:
    model, before = own_model(text, tmp_path / "model")
    for file in (before / TOKENIZER).iterdir():
        file.unlink()
    (before / TOKENIZER / "generation_config.json").write_text('{"temperature": 0.6}')
    integrity.write(before)
    start(configuration(model, "pretrain", layout(), tmp_path, text_samples=1), 1)
    after = find_iteration(tmp_path / "saved")
    carried = {path.name for path in (after / TOKENIZER).iterdir()}
    assert {"tokenizer.model", "generation_config.json"} <= carried
    assert len(read_description(after).known.text_samples) == 1


def test_a_tokenizer_that_cannot_be_read_costs_the_samples_alone(
    text: TextRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = configuration(text, "pretrain", layout(), tmp_path, text_samples=1).train
    assert prepare._load_tokenizer(train, text.tokenizer) is not None
    assert prepare._load_tokenizer(replace(train, text_samples=0), tmp_path) is None
    assert "text-samples" not in caplog.text
    assert prepare._load_tokenizer(train, tmp_path) is None
    assert "there will be no --text-samples at the end of the run: no tokenizer in" in caplog.text
    with pytest.raises(ValueError, match="no tokenizer in"):
        prepare._load_tokenizer(replace(train, eval_tasks=("piqa",)), tmp_path)


@pytest.mark.parametrize("forward_only", [True, False])
def test_only_training_keeps_activations(forward_only: bool) -> None:
    def body(rank: int) -> set[bool]:
        groups = ParallelGroups.create(layout())
        chunks = build_llama(SOURCE, groups, layout(), ModelConfig(), variant="local")
        recorded: set[bool] = set()

        def watch(*arguments: Any) -> None:
            recorded.add(torch.is_grad_enabled())

        chunks[0].register_forward_pre_hook(watch)
        run_schedule(chunks, microbatches(0), forward_only=forward_only)
        return recorded

    assert run_ranks(1, body) == [{not forward_only}]
