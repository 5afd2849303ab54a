"""--use-distributed-optimizer: the plain optimizer's steps and checkpoints, in less memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.checkpoint import optimizer_state
from megashear.checkpoint.description import Description
from megashear.checkpoint.store import load_run
from megashear.checkpoint.weights import MASTERS
from megashear.config import ModelConfig, OptimizerConfig, ParallelConfig
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.objectives import LanguageModelling
from megashear.train.optim import build_optimizer
from tests.distributed.test_resume import (
    FREE_RUNNING,
    HALF,
    REDUCTION_ORDER,
    Finished,
    configuration,
    differences,
    finished,
    finished_tensors,
    start,
)
from tests.ranks import run_ranks
from tests.saving import save_run
from tests.text_run import TextRun
from tests.tiny import SOURCE, layout, megatron_weights, microbatches, set_weights

NORM_ORDER = 1e-6
"""Relative; the norm that gradients are clipped by is summed over other shards."""

FREE_ADAM = 1e-4
"""Relative, after four steps of Adam at rate 1e-3 at two layouts: its first steps turn rounding of
gradients near 0 into whole steps; measured 2e-6 to 3e-5 over seeds of weights and text."""

MASK_MOMENTS = 1e-5
"""Relative, after steps of the masks at rate 1.0; measured 1.2e-6."""

Place = tuple[ParallelConfig, int]
"""How a replica is divided, and how many replicas there are."""


def sharded(replicas: int, **parallel: Any) -> Place:
    return layout(**parallel, use_distributed_optimizer=True), replicas


def plain(place: Place) -> Place:
    return replace(place[0], use_distributed_optimizer=False), place[1]


class Runs:
    """Runs that several tests compare with, each made once."""

    def __init__(self, text: TextRun, factory: pytest.TempPathFactory) -> None:
        self.text, self.factory = text, factory
        self._whole: dict[Any, Finished] = {}
        self._stopped: dict[Any, Path] = {}

    def __call__(self, stage: str, place: Place, *, bf16: bool = False) -> Finished:
        """An uninterrupted run."""
        key = (stage, place, bf16)
        if key not in self._whole:
            folder = self.factory.mktemp("whole")
            self._run(stage, place, folder, bf16)
            self._whole[key] = finished(folder)
        return self._whole[key]

    def resumed(
        self,
        stage: str,
        before: Place,
        after: Place,
        folder: Path,
        *,
        bf16: bool = False,
        broken: Callable[[], None] | None = None,
    ) -> Finished:
        """A run that is stopped half-way at one place and goes on at another."""
        key = (stage, before, bf16)
        if key not in self._stopped:
            self._stopped[key] = self.factory.mktemp("stopped")
            self._run(stage, before, self._stopped[key], bf16, exit_interval=HALF)
        shutil.copytree(self._stopped[key] / "saved", folder / "saved")
        self._run(stage, after, folder, bf16, broken, resume=True)
        return finished(folder)

    def _run(
        self,
        stage: str,
        place: Place,
        folder: Path,
        bf16: bool,
        broken: Callable[[], None] | None = None,
        **train: Any,
    ) -> None:
        parallel, replicas = place
        config = configuration(self.text, stage, parallel, folder, **train)
        start(replace(config, model=ModelConfig(bf16=bf16)), replicas, broken)


@pytest.fixture(scope="module")
def runs(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(text, tmp_path_factory)


def errors(here: Finished, there: Finished) -> dict[str, float]:
    """Relative error of every tensor of a checkpoint."""
    assert here.tensors.keys() == there.tensors.keys()
    pairs = {n: (here.tensors[n].double(), t.double()) for n, t in there.tensors.items()}
    return {
        name: float((a - b).norm() / b.norm().clamp(min=1e-12)) for name, (a, b) in pairs.items()
    }


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "place", "bf16"),
    [
        pytest.param("prune", sharded(2), False, id="prune-dp2"),
        pytest.param("pretrain", sharded(2, tp=2), False, id="pretrain-tp2-dp2"),
        pytest.param("pretrain", sharded(2, pp=2), True, id="pretrain-pp2-dp2-bf16"),
    ],
)
def test_it_steps_as_the_plain_optimizer(runs: Runs, stage: str, place: Place, bf16: bool) -> None:
    here, there = runs(stage, place, bf16=bf16), runs(stage, plain(place), bf16=bf16)
    for name, error in errors(here, there).items():
        assert error < (MASK_MOMENTS if name.startswith("masks.") else NORM_ORDER), name
    assert {name: tensor.dtype for name, tensor in here.tensors.items()} == {
        name: tensor.dtype for name, tensor in there.tensors.items()
    }
    assert bf16 == any(name.startswith(MASTERS) for name in here.tensors)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "place", "bf16"),
    [
        pytest.param("prune", sharded(2), False, id="prune-dp2"),
        pytest.param("pretrain", sharded(2, pp=2), True, id="pretrain-pp2-dp2-bf16"),
    ],
)
def test_it_resumes_bit_equal(
    runs: Runs, tmp_path: Path, stage: str, place: Place, bf16: bool
) -> None:
    whole = runs(stage, place, bf16=bf16)
    resumed = runs.resumed(stage, place, place, tmp_path, bf16=bf16)
    assert differences(resumed, whole) == set()
    assert whole.adam_steps == [2 * HALF]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        pytest.param("prune", sharded(2), sharded(2, tp=2), id="prune-dp2-to-tp2-dp2"),
        pytest.param("pretrain", sharded(4), plain(sharded(2)), id="pretrain-dp4-to-plain-dp2"),
        pytest.param("pretrain", plain(sharded(4)), sharded(1), id="pretrain-plain-dp4-to-dp1"),
    ],
)
def test_it_goes_on_at_another_layout_or_with_the_other_optimizer(
    runs: Runs, tmp_path: Path, stage: str, before: Place, after: Place
) -> None:
    whole, resumed = runs(stage, before), runs.resumed(stage, before, after, tmp_path)
    assert resumed.adam_steps == whole.adam_steps
    for tag in ("train/lm-loss", "eval/mean-loss"):
        assert resumed.points[tag] == pytest.approx(whole.points[tag], rel=REDUCTION_ORDER), tag
    for name, error in errors(resumed, whole).items():
        if name.endswith(".log_alpha"):
            assert (resumed.tensors[name] - whole.tensors[name]).abs().max() < FREE_RUNNING, name
        elif not name.startswith("masks."):
            assert error < REDUCTION_ORDER, name


def one_count_for_all() -> None:
    """What megatron-core 0.16.1's own loading leaves behind."""
    load = optimizer_state.load

    def shared(optimizer: Any, *rest: Any) -> None:
        load(optimizer, *rest)
        states = list(optimizer.chained_optimizers[0].optimizer.state.values())
        for state in states:
            state["step"] = states[0]["step"]

    optimizer_state.load = shared


def test_one_count_of_steps_for_all_parameters_is_noticed(runs: Runs, tmp_path: Path) -> None:
    whole = runs("prune", sharded(2))
    here = sharded(2)
    broken = runs.resumed("prune", here, here, tmp_path, broken=one_count_for_all)
    assert broken.adam_steps != whole.adam_steps
    assert errors(broken, whole)["output_layer.weight"] > 10 * REDUCTION_ORDER


TIED = replace(SOURCE, tied_embeddings=True)
ODD = replace(SOURCE, vocab_size=61)
"""A vocabulary that is padded at TP 2, so that one rank's stretch ends in padding."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("shape", "place", "after"),
    [
        pytest.param(TIED, sharded(2, pp=2), plain(sharded(2)), id="tied-pp2"),
        pytest.param(ODD, sharded(2, tp=2), sharded(2), id="padded-tp2"),
    ],
)
def test_shared_and_padded_embeddings(
    tmp_path: Path, shape: ModelShape, place: Place, after: Place
) -> None:
    def steps(at: Place, numbers: range, load: str | None = None, save: str | None = None) -> None:
        parallel, replicas = at

        def body(rank: int) -> None:
            groups = ParallelGroups.create(parallel)
            chunks = build_llama(shape, groups, parallel, ModelConfig(), variant="local")
            optimizer = build_optimizer(
                chunks,
                OptimizerConfig(lr=1e-3),
                bf16=False,
                sharded=parallel.use_distributed_optimizer,
            )
            if load is None:
                whole = megatron_weights(shape)
                set_weights(chunks, whole, groups.tensor_rank, groups.tensor_size)
            else:
                load_run(tmp_path / load, chunks, optimizer, groups)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            objective = LanguageModelling(chunks)
            for number in numbers:
                for chunk in chunks:
                    chunk.zero_grad_buffer()
                optimizer.zero_grad()
                batches = microbatches(
                    number,
                    data_rank=groups.data_rank,
                    data_size=groups.data_size,
                    vocab=shape.vocab_size,
                )
                objective.forward_backward(batches, number)
                optimizer.step()
            description = Description(shape=shape, iteration=0, stage="pretrain")
            save_run(tmp_path / str(save), description, chunks, optimizer, groups)

        run_ranks(parallel.model_parallel_size * replicas, body)

    steps(plain(after), range(4), save="whole")
    steps(place, range(2), save="half")
    steps(after, range(2, 4), load="half", save="resumed")
    steps(place, range(2, 4), load="half", save="again")
    whole = finished_tensors(tmp_path / "whole", 0)
    for name in ("resumed", "again"):
        found = finished_tensors(tmp_path / name, 0)
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():
            assert float((found[key] - tensor).norm() / tensor.norm()) < FREE_ADAM, key


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_replica_holds_its_share_of_the_state(replicas: int) -> None:
    parallel = layout(use_distributed_optimizer=True)

    def body(rank: int) -> int:
        groups = ParallelGroups.create(parallel)
        model = ModelConfig(bf16=True)
        chunks = build_llama(SOURCE, groups, parallel, model, variant="local")
        optimizer = build_optimizer(chunks, OptimizerConfig(), bf16=True, sharded=True)
        for parameter in chunks[0].parameters():
            parameter.main_grad.fill_(0.1)
        optimizer.step()
        own = optimizer_state.optimizer_shards(optimizer).values()
        held = [tensor for each in own for tensor in (each.main, *each.state.values())]
        assert {tensor.dtype for tensor in held} == {torch.float32}
        return sum(tensor.nbytes for tensor in held if tensor.dim())

    found = run_ranks(replicas, body)
    whole = SOURCE.num_params() * 3 * 4  # masters and two moments, float32
    assert sum(found) == whole
    # replicas share the buffer evenly, padded to what collectives like
    assert max(found) < whole / replicas * 1.1
