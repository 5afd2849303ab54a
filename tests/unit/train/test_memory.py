"""What a run says of its memory before it starts is what the plan says."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from megashear.config import DataConfig, MaskConfig, ModelConfig, PruneRun, TrainConfig
from megashear.planning.memory import fullest
from megashear.planning.work import Work
from megashear.shape import PRESETS
from megashear.train.memory import tell_memory
from megashear.train.objectives import LanguageModelling, StructuredPruning
from tests.tiny import layout


@pytest.mark.parametrize("pruning", [True, False])
def test_the_log_has_the_plan(pruning: bool, caplog: pytest.LogCaptureFixture) -> None:
    parallel = layout(tp=2, pp=2, sp=True, use_distributed_optimizer=True)
    config = PruneRun(
        parallel=parallel,
        model=ModelConfig(bf16=True),
        train=TrainConfig(global_batch_size=32, seq_length=4096),
        data=DataConfig(data_path="data"),
        masks=MaskConfig(mask_noise_streams=8),
    )
    # only what masks there are is asked of it
    objective = object.__new__(StructuredPruning if pruning else LanguageModelling)
    if pruning:
        objective.config = config.masks  # type: ignore[attr-defined]
        objective.masks = SimpleNamespace(parts={"hidden": None})  # type: ignore[attr-defined]
    groups = SimpleNamespace(data_size=2)
    with caplog.at_level(logging.INFO, logger="megashear"):
        tell_memory(config, PRESETS["llama2-7b"], objective, groups)  # type: ignore[arg-type]
    work = Work(
        shape=PRESETS["llama2-7b"],
        parallel=parallel,
        model=config.model,
        seq_length=4096,
        micro_batch_size=1,
        num_microbatches=16,
        data_size=2,
        masks=frozenset({"hidden"} if pruning else ()),
        noise_streams=4 if pruning else 1,
    )
    stage, memory = fullest(work)
    (message,) = caplog.messages
    assert message.startswith(f"a rank of stage {stage} is planned to hold most, ")
    assert f"{memory.total / 2**30:.2f} GiB at its fullest" in message
    assert f"activations {memory.activations / 2**30:.2f}" in message
