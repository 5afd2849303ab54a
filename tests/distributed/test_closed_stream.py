"""A stream that closes every hidden gate stops all replicas, not only the one that draws it."""

from __future__ import annotations

import pytest

from megashear.config import MaskConfig, ModelConfig
from megashear.masks.gates import LOG_ALPHA_MIN
from megashear.masks.mask_set import MaskSet
from megashear.masks.targets import whole_parts
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train.pruning import StructuredPruning
from tests.ranks import run_ranks
from tests.tiny import BATCH, SOURCE, TARGET, layout, microbatches

SEED = 7


def nearly_closed(masks: MaskSet) -> MaskSet:
    for log_alpha in masks.parameters():
        log_alpha.data.fill_(LOG_ALPHA_MIN)
    return masks


def step_where_only_the_second_stream_closes() -> int:
    masks = nearly_closed(MaskSet(whole_parts(SOURCE, TARGET)))
    for step in range(1000):
        is_open = [
            bool(masks.sample(seed=SEED, step=step, stream=stream)["hidden"].any())
            for stream in (0, 1)
        ]
        if is_open == [True, False]:
            return step
    raise AssertionError("no such step: 14 % of draws close 40 gates")


def test_every_replica_refuses_a_closed_stream() -> None:
    step = step_where_only_the_second_stream_closes()

    def body(rank: int) -> str:
        groups = ParallelGroups.create(layout())
        chunks = build_llama(SOURCE, groups, layout(), ModelConfig(), variant="local")
        objective = StructuredPruning(
            chunks,
            groups,
            source=SOURCE,
            target=TARGET,
            config=MaskConfig(mask_noise_streams=2),
            seed=SEED,
            global_batch_size=BATCH,
            sequence_parallel=False,
        )
        nearly_closed(objective.masks)
        batches = microbatches(step, data_rank=groups.data_rank, data_size=groups.data_size)
        # each replica has one stream of its own; the first replica's is open
        assert {objective.stream_of(batch) for batch in batches} == {rank}
        with pytest.raises(ValueError, match=r"every hidden gate of noise stream 1 is closed"):
            objective.forward_backward(batches, step)
        return "refused"

    assert run_ranks(2, body) == ["refused", "refused"]
