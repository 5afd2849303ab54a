"""Steps that are not finite are skipped by all ranks, signals save and stop, drift is noticed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.checkpoint.description import read_description
from megashear.config import PretrainRun, PruneRun
from megashear.models.llama import unwrap
from megashear.train import loop, objectives, pruning, run
from megashear.train import step as train_step
from megashear.train.result import RunResult
from tests import text_run
from tests.distributed.test_resume import configuration, differences, finished, finished_tensors
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.tiny import layout

BAD_STEP = 2
"""From 0."""
SPLIT = layout(tp=2, pp=2)


def start(
    config: PruneRun | PretrainRun, replicas: int, broken: Callable[[int], None]
) -> list[RunResult]:
    world_size = config.parallel.model_parallel_size * replicas

    def body(rank: int) -> RunResult:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        broken(rank)
        return (run.prune if isinstance(config, PruneRun) else run.pretrain)(
            config  # type: ignore[arg-type]
        )

    return run_ranks(world_size, body)


def spoil_loss(steps: range) -> Callable[[int], None]:
    """Make the losses of one rank, of those that have any, not a number at these steps."""

    def broken(rank: int) -> None:
        original, calls = objectives.run_schedule, [0]

        def run_schedule(*args: Any, forward_only: bool, **rest: Any) -> Any:
            losses = original(*args, forward_only=forward_only, **rest)
            if not forward_only:
                if losses and calls[0] in steps and rank == int(os.environ["WORLD_SIZE"]) - 1:
                    losses[0].sums.fill_(float("nan"))
                calls[0] += 1
            return losses

        objectives.run_schedule = pruning.run_schedule = run_schedule

    return broken


def spoil_gradient(rank_of_fault: int) -> Callable[[int], None]:
    """Make one gradient of one rank infinite at one step: the loss stays fine."""

    def broken(rank: int) -> None:
        original, calls = train_step.ready_gradients, [0]

        def ready_gradients(optimizer: Any) -> float:
            if calls[0] == BAD_STEP and rank == rank_of_fault:
                group = optimizer.chained_optimizers[0].optimizer.param_groups[0]
                group["params"][0].main_grad.view(-1)[0] = float("inf")
            calls[0] += 1
            return original(optimizer)

        train_step.ready_gradients = ready_gradients

    return broken


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "spoil"),
    [
        ("prune", spoil_loss(range(BAD_STEP, BAD_STEP + 1))),
        ("pretrain", spoil_gradient(rank_of_fault=1)),
    ],
    ids=["prune-loss", "pretrain-gradient"],
)
def test_one_rank_s_bad_step_is_skipped_by_all(
    text: TextRun, tmp_path: Path, stage: str, spoil: Callable[[int], None]
) -> None:
    config = configuration(text, stage, SPLIT, tmp_path, save_interval=1)
    start(config, 1, spoil)
    before, at, after = (
        finished_tensors(tmp_path / "saved", BAD_STEP + done) for done in (0, 1, 2)
    )
    assert before.keys() == at.keys()
    # weights, moments, masks and multipliers stay where they were, and move on behind it
    assert [name for name in before if not torch.equal(before[name], at[name])] == []
    assert any(not torch.equal(at[name], after[name]) for name in at)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    details = read_description(tmp_path / "saved" / "iter_0000006").details
    assert details["step_guard"]["skipped"] == 1
    assert details["scheduler"]["num_steps"] == 6  # samples are used up, time goes on
    skipped = finished(tmp_path).points["train/skipped-steps"]
    assert skipped[4] == 1.0


def test_a_skipped_step_resumes_bit_equal(text: TextRun, tmp_path: Path) -> None:
    spoil = spoil_loss(range(BAD_STEP, BAD_STEP + 1))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    start(configuration(text, "prune", layout(), whole, loss_spike_factor=3.0), 2, spoil)
    first = configuration(text, "prune", layout(), halves, exit_interval=3, loss_spike_factor=3.0)
    start(first, 2, spoil)
    rest = configuration(text, "prune", layout(), halves, resume=True, loss_spike_factor=3.0)
    start(rest, 2, lambda rank: None)
    assert differences(finished(halves), finished(whole)) == set()


def test_too_many_bad_steps_stop_the_run_and_name_the_samples(
    text: TextRun, tmp_path: Path
) -> None:
    log = tmp_path / "run.jsonl"
    more = {"save_interval": 3, "max_skipped_steps": 2, "jsonl_log": str(log)}
    config = configuration(text, "pretrain", SPLIT, tmp_path, **more)
    assert isinstance(config, PretrainRun)
    world_size = config.parallel.model_parallel_size
    spoil = spoil_loss(range(BAD_STEP, BAD_STEP + 3))

    def body(rank: int) -> str:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        spoil(rank)
        with pytest.raises(RuntimeError) as caught:
            run.pretrain(config)
        return str(caught.value)

    # all ranks end by themselves: the one that writes is not killed for the first that failed
    (message,) = {*run_ranks(world_size, body)}
    assert message.startswith("step 5: the loss is nan; samples of this step: ")
    assert "--max-skipped-steps 2 in a row are used up" in message
    assert f"No checkpoint in --save {tmp_path / 'saved'} is known to be good" in message
    assert re.search(r"samples of this step: \w+ \d+ to \d+", message)
    found = finished_tensors(tmp_path / "saved", BAD_STEP + 1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    # points since the last save tell why the run ended
    tag = "train/skipped-steps"
    skipped = {1: 0.0, 2: 0.0, 3: 1.0, 4: 2.0}
    assert text_run.scalars(tmp_path / "events")[tag] == skipped
    lines = map(json.loads, log.read_text().splitlines())
    assert {line["step"]: line[tag] for line in lines if tag in line} == skipped


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("stage", "replicas"), [("prune", 1), ("pretrain", 2)])
def test_a_signal_to_one_rank_saves_and_stops_all(
    text: TextRun, tmp_path: Path, stage: str, replicas: int
) -> None:
    parallel = SPLIT if replicas == 1 else layout()

    def signalled(rank: int) -> None:
        original, calls = train_step.ready_gradients, [0]

        def ready_gradients(optimizer: Any) -> float:
            calls[0] += 1
            if calls[0] == BAD_STEP and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(optimizer)

        train_step.ready_gradients = ready_gradients

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    reached = start(configuration(text, stage, parallel, halves), replicas, signalled)
    # asked for in a step, agreed on in the next one
    assert {(r.step, r.stopped, r.exit_status) for r in reached} == {
        (BAD_STEP + 1, "SIGTERM was received", 143)
    }
    resumed = configuration(text, stage, parallel, halves, resume=True)
    start(resumed, replicas, lambda rank: None)
    start(configuration(text, stage, parallel, whole), replicas, lambda rank: None)
    assert differences(finished(halves), finished(whole)) == set()


@pytest.mark.parametrize(
    ("parallel", "replicas", "kind", "parameter"),
    [
        (layout(), 2, "data", "decoder.layers.1.mlp.linear_fc2.weight"),
        (layout(tp=2), 1, "tensor", "decoder.final_layernorm.weight"),
    ],
)
def test_copies_that_drift_are_noticed(
    text: TextRun, tmp_path: Path, parallel: Any, replicas: int, kind: str, parameter: str
) -> None:
    def drift(rank: int) -> None:
        original, calls = train_step.step_with_norm, [0]

        def step_with_norm(optimizer: Any, norm: float) -> None:
            original(optimizer, norm)
            calls[0] += 1
            if calls[0] == 1 and rank == 1:
                named = dict(unwrap(chunks[0]).named_parameters())
                with torch.no_grad():
                    one = named[parameter].view(-1)[:1]
                    one.copy_(torch.nextafter(one, torch.tensor([9.0])))  # the last bit

        chunks: list[Any] = []
        made = loop.Trainer.__init__

        def init(self: Any, **fields: Any) -> None:
            made(self, **fields)
            chunks.extend(self.chunks)

        loop.Trainer.__init__ = init  # type: ignore[method-assign,assignment]
        train_step.step_with_norm = step_with_norm

    config = configuration(text, "pretrain", parallel, tmp_path)
    config = replace(config, optimizer=replace(config.optimizer, lr=1e-9, lr_warmup_iters=0))
    with pytest.raises(
        AssertionError,
        match=rf"step 2: copies of chunk 0 {parameter} .*{kind}-parallel ranks \[1\]",
    ):
        start(config, replicas, drift)
