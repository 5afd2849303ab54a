"""Gradients reduced and weights gathered while others are computed: the same steps, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megashear.config import ParallelConfig
from megashear.train import checkpoints, loop
from tests.distributed.test_distributed_optimizer import MASK_MOMENTS, NORM_ORDER, errors
from tests.distributed.test_resume import Finished, configuration, differences, finished, start
from tests.text_run import TextRun
from tests.tiny import layout

BUCKET = 20_000
"""Parameters; a quarter of the model's or less, so that there is something to overlap with."""
REDUCED = {"overlap_grad_reduce": True, "ddp_bucket_size": BUCKET}
GATHERED = REDUCED | {"use_distributed_optimizer": True, "overlap_param_gather": True}


class Runs:
    """Uninterrupted runs of two replicas, whose gradients have one sum in any order."""

    def __init__(self, text: TextRun, folder: Path) -> None:
        self.text, self.folder = text, folder

    def __call__(
        self,
        stage: str,
        parallel: ParallelConfig,
        name: str,
        broken: Callable[[], None] | None = None,
    ) -> Finished:
        folder = self.folder / name
        start(configuration(self.text, stage, parallel, folder), 2, broken)
        return finished(folder)


@pytest.fixture
def runs(text: TextRun, tmp_path: Path) -> Runs:
    return Runs(text, tmp_path)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "flags", "parallel"),
    [
        ("prune", REDUCED, {}),
        ("prune", GATHERED, {"tp": 2}),
        ("pretrain", GATHERED, {"pp": 2, "vpp": 2}),
    ],
    ids=["reduced", "gathered-tp2", "gathered-pp2-vpp2"],
)
def test_steps_are_those_without_overlap(
    runs: Runs, stage: str, flags: dict[str, Any], parallel: dict[str, int]
) -> None:
    sharded = flags.get("use_distributed_optimizer", False)
    wanted = runs(stage, layout(**parallel, use_distributed_optimizer=sharded), "wanted")
    found = runs(stage, layout(**parallel, **flags), "found", reduced_early)
    if not sharded:
        assert differences(found, wanted) == set()
    # buckets change the shards, over which the norm that gradients are clipped by is summed
    for name, error in errors(found, wanted).items():
        assert error < (MASK_MOMENTS if name.startswith("masks.") else NORM_ORDER), name


def reduced_early() -> None:
    """Fail a run that reduces everything at once, after the backward pass."""
    register, seen = _ParamAndGradBucketGroup.register_grad_ready, set()

    def registered(self: Any, param: Any, *rest: Any) -> None:
        register(self, param, *rest)
        if self.grad_reduce_handle is not None:  # under way
            seen.add(id(self))

    finish = _ParamAndGradBucketGroup.finish_grad_sync

    def finished_reducing(self: Any, *rest: Any, **more: Any) -> None:
        # which parameters give gradients, and how often, is only known after the first step
        reduced = self.is_first_batch or id(self) in seen
        assert reduced, "nothing of it was reduced during the backward pass"
        finish(self, *rest, **more)

    _ParamAndGradBucketGroup.register_grad_ready = registered
    _ParamAndGradBucketGroup.finish_grad_sync = finished_reducing


def no_gathering() -> None:
    loop.gather_weights = checkpoints.gather_weights = lambda chunks: None


def test_weights_that_were_not_gathered_are_noticed(runs: Runs) -> None:
    with pytest.raises(AssertionError, match="have drifted apart: data-parallel ranks"):
        runs("pretrain", layout(**GATHERED), "broken", no_gathering)
