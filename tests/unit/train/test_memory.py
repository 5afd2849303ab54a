"""What a run says of its memory before it starts is what the plan says."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megashear.config import DataConfig, MaskConfig, ModelConfig, PruneRun, TrainConfig
from megashear.planning.memory import fullest_stage, rank_memory
from megashear.planning.work import Work
from megashear.shape import PRESETS
from megashear.train.memory import tell_memory
from megashear.train.objectives import LanguageModelling
from megashear.train.pruning import StructuredPruning
from megashear.train.terms import CrossEntropy
from tests.tiny import layout


def told(
    caplog: pytest.LogCaptureFixture,
    *,
    pruning: bool,
    train: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[str, Work]:
    """What a run logs, and the work it is about."""
    parallel = layout(tp=2, pp=2, sp=True, use_distributed_optimizer=True)
    config = PruneRun(
        parallel=parallel,
        model=ModelConfig(bf16=True, **model),
        train=TrainConfig(global_batch_size=32, seq_length=4096, **(train or {})),
        data=DataConfig(data_path="data"),
        masks=MaskConfig(mask_noise_streams=8),
    )
    # only what masks there are is asked of it
    objective = object.__new__(StructuredPruning if pruning else LanguageModelling)
    objective.terms = [CrossEntropy()]
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
        noise_streams=8 if pruning else 1,
    )
    (message,) = caplog.messages
    return message, work


@pytest.mark.parametrize("pruning", [True, False])
def test_the_log_has_the_plan(pruning: bool, caplog: pytest.LogCaptureFixture) -> None:
    message, work = told(caplog, pruning=pruning)
    stage, memory = fullest_stage(work)
    assert message.startswith(f"planned memory of the fullest rank, in stage {stage}: ")
    assert f"{memory.total / 2**30:.2f} GiB: " in message
    assert f"activations {memory.activations / 2**30:.2f}" in message
    assert "not counted" not in message


def test_an_evaluation_of_many_sequences_is_the_fullest(caplog: pytest.LogCaptureFixture) -> None:
    message, work = told(caplog, pruning=False, train={"eval_micro_batch_size": 64})
    # logits of the last stage, in bfloat16 and in float32, over two tensor ranks; gate and up with
    # their copies, and their product in both
    tokens = 64 * 4096
    logits = (2 + 4) * tokens * 32000 // 2
    activation = (2 * (2 + 4) + 4 + 2) * tokens * 11008 // 2
    streams = (3 + 2) * 2 * tokens * 4096 // 2  # of the layer; received and sent
    gathered, turns = 2 * tokens * 4096, 4 * 4096 * 128
    buffers = max(logits, activation) + streams + gathered + turns
    assert buffers > sum(
        fullest_stage(work)[1].parts()[name] for name in ("activations", "buffers")
    )
    total = (rank_memory(work, 1).lasting + buffers) / 2**30
    wanted = f"planned memory of the fullest rank, in stage 1: {total:.2f} GiB in an "
    assert message.startswith(wanted + "evaluation: ")
    assert f"buffers {buffers / 2**30:.2f}" in message


def test_what_the_plan_does_not_count_is_named(caplog: pytest.LogCaptureFixture) -> None:
    message, _ = told(caplog, pruning=True, reset_attention_mask=True)
    assert message.endswith("; not counted: --reset-attention-mask")
    caplog.clear()
    message, _ = told(caplog, pruning=False, transformer_impl="transformer_engine")
    assert message.endswith("; not counted: --transformer-impl transformer_engine")
