"""What the environment and the configuration get wrong is refused before processes meet."""

import pytest
import torch.distributed as dist

from megashear.config import ModelConfig, ParallelConfig
from megashear.parallel.launch import distributed


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor_model_parallel_size=2), "world size 3 is not a multiple of"),
        (ParallelConfig(use_distributed_optimizer=True), "--use-distributed-optimizer is refused"),
    ],
)
def test_refusals_come_before_the_meeting(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    # a meeting would fail on these, and otherwise than with ValueError
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ValueError, match=message),
        distributed(parallel, ModelConfig()),
    ):
        pass
    assert not dist.is_initialized()
