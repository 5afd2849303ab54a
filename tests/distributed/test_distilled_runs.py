"""Runs that learn from a teacher: resumed bit by bit, in every stage, and refused by name."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint.description import TRACKER
from megashear.config import ModelConfig, ParallelConfig, PretrainRun, PruneRun
from megashear.config.distill import DistillConfig
from megashear.shape import ModelShape
from megashear.train import run
from megashear.train.prepare import prepare
from tests import text_run
from tests.conversions import megatron_to_hf
from tests.distributed.test_in_flight import RECOVERED, jobs
from tests.distributed.test_resume import (
    HALF,
    SPLIT,
    WHOLE,
    configuration,
    differences,
    finished,
    start,
)
from tests.iterations import copy_iteration
from tests.ranks import run_ranks
from tests.text_run import TextRun, scalars
from tests.tiny import layout

TERM = "train/term/distillation"
LARGER = replace(text_run.SHAPE, num_layers=8, hidden_size=48, tied_embeddings=True)
"""Shape of a teacher that is not the source."""


@pytest.fixture(scope="module")
def teacher(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of ``LARGER``."""
    folder = tmp_path_factory.mktemp("teacher")
    return text_run.write_checkpoint(folder / "larger", LARGER, text.tokenizer)


def distilled(
    text: TextRun,
    teacher: Path,
    stage: str,
    folder: Path,
    parallel: ParallelConfig,
    *,
    bf16: bool = False,
    distill: dict[str, Any] | None = None,
    **train: Any,
) -> PruneRun | PretrainRun:
    config = configuration(text, stage, parallel, folder, **train)
    flags = {"distill_final_weight": 0.5, "lm_loss_weight": 0.25} if distill is None else distill
    return replace(
        config,
        model=ModelConfig(bf16=bf16),
        distill=DistillConfig(distill_from=str(teacher), **flags),
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "at"),
    [
        pytest.param("pretrain", SPLIT, id="pretrain-tp2-pp2"),
        pytest.param("prune", (layout(tp=2, sp=True), 1), id="prune-tp2-sp"),
        pytest.param("prune", (layout(pp=2, vpp=2), 1), id="prune-pp2-vpp2"),
    ],
)
def test_a_resumed_run_is_bit_equal(
    text: TextRun, teacher: Path, tmp_path: Path, stage: str, at: tuple[ParallelConfig, int]
) -> None:
    parallel, replicas = at
    start(distilled(text, teacher, stage, tmp_path / "whole", parallel), replicas)
    stopped = distilled(text, teacher, stage, tmp_path / "stopped", parallel, exit_interval=HALF)
    start(stopped, replicas)
    shutil.copytree(tmp_path / "stopped" / "saved", tmp_path / "resumed" / "saved")
    start(distilled(text, teacher, stage, tmp_path / "resumed", parallel, resume=True), replicas)
    whole, resumed = finished(tmp_path / "whole"), finished(tmp_path / "resumed")
    assert differences(resumed, whole) == set()
    assert all(math.isfinite(value) and value > 0 for value in whole.points[TERM].values())
    # the student has 4 layers and the teacher 8: none of its weights is in the checkpoint
    assert not any("layers.4." in name for name in whole.tensors)


def points_of(folder: Path) -> dict[str, dict[int, float]]:
    found = scalars(folder / "events")
    return {tag: points for tag, points in found.items() if not tag.startswith("system/")}


def test_a_hugging_face_directory_teaches_the_same(
    text: TextRun, teacher: Path, tmp_path: Path
) -> None:
    megatron_to_hf(teacher, tmp_path / "hf")
    parallel = layout(tp=2)
    start(distilled(text, teacher, "pretrain", tmp_path / "one", parallel), 1)
    start(distilled(text, tmp_path / "hf", "pretrain", tmp_path / "other", parallel), 1)
    assert points_of(tmp_path / "one") == points_of(tmp_path / "other")


def test_the_divergence_from_oneself_begins_at_nothing(text: TextRun, tmp_path: Path) -> None:
    start(distilled(text, text.checkpoint, "pretrain", tmp_path, layout(tp=2)), 1)
    found = points_of(tmp_path)[TERM]
    assert found[1] < 1e-6 < found[WHOLE]  # nats; the cross entropy has moved the weights since


@pytest.mark.parametrize("stage", ["pretrain", "prune"])
def test_bfloat16_learns_from_a_bfloat16_teacher(
    text: TextRun, teacher: Path, tmp_path: Path, stage: str
) -> None:
    found = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        start(distilled(text, teacher, stage, folder, layout(tp=2), bf16=bf16), 1)
        found.append(points_of(folder)[TERM][1])
    # 8 bits of both models' logits, which amounts to some per mille of the divergence
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != found[0]


def test_a_job_of_both_parts_learns_from_the_source(text: TextRun, tmp_path: Path) -> None:
    prune, then = jobs(text, tmp_path, layout(tp=2), behind=layout(pp=2))
    distill = DistillConfig(distill_from=str(text.checkpoint))
    run_both(replace(prune, distill=distill), replace(then, distill=distill))
    alone = points_of(tmp_path)[TERM]
    assert alone.keys() == set(range(1, RECOVERED + 1))
    assert all(0 < value < 1 for value in alone.values())  # it was cut from its teacher


def run_both(prune: PruneRun, then: PretrainRun) -> None:
    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        run.prune(prune, then)

    run_ranks(2, body)


def test_ranks_that_were_started_with_other_flags_are_told_so(
    text: TextRun, teacher: Path, tmp_path: Path
) -> None:
    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        config = distilled(text, teacher, "pretrain", tmp_path, layout(tp=2))
        assert isinstance(config, PretrainRun)
        run.pretrain(config if rank == 0 else replace(config, distill=DistillConfig()))

    with pytest.raises(AssertionError, match=r"rank 1 has flags .* start all with the same flags"):
        run_ranks(2, body)


def test_a_resumed_run_keeps_its_teacher_and_is_told_of_other_flags(
    text: TextRun, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teachers = tmp_path / "teachers"
    shutil.copytree(teacher, teachers)
    start(distilled(text, teachers, "pretrain", tmp_path, layout(), exit_interval=HALF), 1)
    resumed = distilled(text, teachers, "pretrain", tmp_path, layout(), distill={}, resume=True)
    assert isinstance(resumed, PretrainRun)
    prepare(resumed)
    for message in (
        "--distill-final-weight is None, and was 0.5 when",
        "--lm-loss-weight is None, and was 0.25 when",
    ):
        assert message in caplog.text
    copy_iteration(teachers / "iter_0000000", 7)
    (teachers / TRACKER).write_text("7")
    with pytest.raises(ValueError, match=r"--distill-from \S+: the saved run learned from itera"):
        prepare(resumed)
    own = replace(resumed.distill, distill_from=str(teachers / "iter_0000000"))
    prepare(replace(resumed, distill=own))


def of_shape(shape: ModelShape) -> Callable[[TextRun, Path], Path]:
    return lambda text, folder: text_run.write_checkpoint(folder / "teacher", shape, text.tokenizer)


def masked_run(text: TextRun, folder: Path) -> Path:
    start(configuration(text, "prune", layout(), folder / "run", exit_interval=1), 1)
    return folder / "run" / "saved"


def of_another_tokenizer(text: TextRun, folder: Path) -> Path:
    words = [path.read_text() for path in sorted(text.jsonl.iterdir())[:1]]
    other = text_run.train_tokenizer(words, folder)
    return text_run.write_checkpoint(folder / "teacher", text_run.SHAPE, other)


def damaged(text: TextRun, folder: Path) -> Path:
    path = text_run.write_checkpoint(folder / "teacher", text_run.SHAPE, text.tokenizer)
    file = next(path.rglob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "parallel", "message"),
    [
        pytest.param(
            of_shape(replace(text_run.SHAPE, num_attention_heads=7, num_query_groups=7)),
            layout(tp=2),
            r"--distill-from \S+: teacher num_query_groups 7 is not a multiple of",
            id="heads",
        ),
        pytest.param(
            of_shape(replace(text_run.SHAPE, vocab_size=512)),
            layout(),
            r"--distill-from \S+: the teacher has a vocabulary of 512 tokens and the model one of "
            r"256",
            id="vocabulary",
        ),
        pytest.param(
            of_another_tokenizer,
            layout(),
            r"--distill-from \S+: \S+ was tokenised with another tokenizer than the model's",
            id="tokenizer",
        ),
        pytest.param(
            masked_run, layout(), r"--distill-from \S+: \S+ is of a pruning run", id="masks"
        ),
        pytest.param(
            lambda text, folder: folder / "none", layout(), r"--distill-from \S+none", id="nothing"
        ),
    ],
)
def test_what_cannot_teach_is_refused_before_processes_meet(
    text: TextRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[TextRun, Path], Path],
    parallel: ParallelConfig,
    message: str,
) -> None:
    config = distilled(text, make(text, tmp_path), "pretrain", tmp_path / "own", parallel)
    assert isinstance(config, PretrainRun)
    monkeypatch.setenv("WORLD_SIZE", str(parallel.model_parallel_size))
    with pytest.raises(ValueError, match=message):
        run.pretrain(config)
    assert not (tmp_path / "own").exists()


def test_a_damaged_teacher_is_refused_by_all_ranks(text: TextRun, tmp_path: Path) -> None:
    config = distilled(text, damaged(text, tmp_path), "pretrain", tmp_path / "own", layout(tp=2))
    with pytest.raises(AssertionError, match=r"teacher\S* .*(checksum|damaged|whole)"):
        start(config, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"distill_weight": 2.0}, r"--distill-weight needs --distill-from"),
        ({"distill_final_weight": 0.5}, r"--distill-final-weight needs --distill-from"),
        ({"distill_temperature": 2.0}, r"--distill-temperature needs --distill-from"),
        ({"lm_loss_weight": 0.0}, r"--lm-loss-weight needs --distill-from"),
        (
            {"distill_from": "x", "distill_weight": 0.0, "lm_loss_weight": 1.0},
            r"--distill-weight is 0 throughout, so that --distill-from x would only cost time",
        ),
        ({"distill_from": "x", "distill_final_weight": 0.0}, r"leave steps without a loss"),
        (
            {"distill_from": "x", "distill_temperature": 0.0},
            r"--distill-temperature is 0.0; wanted",
        ),
    ],
)
def test_flags_that_say_nothing_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**flags)


def test_a_weight_that_falls_to_nothing_is_fine_beside_another() -> None:
    flags = DistillConfig(distill_from="x", distill_final_weight=0.0, lm_loss_weight=1.0)
    assert flags.last_weight == 0.0
