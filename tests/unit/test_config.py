"""Settings that do not go together are refused with the flags as they were typed."""

from __future__ import annotations

from typing import Any

import pytest

from megashear.config import ParallelConfig, TrainConfig


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            "--overlap-param-gather gathers .* give --use-distributed-optimizer too",
        ),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            "give --overlap-grad-reduce too, or drop the flag",
        ),
        (
            {"ddp_bucket_size": 5},
            "--ddp-bucket-size 5 divides .*--overlap-grad-reduce is not given",
        ),
        (
            {"ddp_bucket_size": 0, "overlap_grad_reduce": True},
            "--ddp-bucket-size is 0; wanted 1 to 2147483647",
        ),
        ({"overlap_p2p_communication": True}, "needs --num-virtual-stages-per-pipeline-rank of at"),
    ],
)
def test_overlap_that_cannot_be(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**flags)


def test_evaluations_take_at_least_a_sequence() -> None:
    with pytest.raises(ValueError, match="--eval-micro-batch-size is 0; wanted 1 to 1048576"):
        TrainConfig(eval_micro_batch_size=0)
