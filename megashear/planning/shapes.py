"""The shapes that a plan proposes for a budget, from its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megashear.config import PlanConfig, TargetConfig
from megashear.planning.budget import Budget, ForwardTime
from megashear.planning.hardware import find_gpu
from megashear.planning.proposals import Proposal, proposals
from megashear.planning.shares import planned_share
from megashear.shape import ModelShape

USUAL_LENGTH = 4096
"""Tokens of a sequence of the published recipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Shapes that were proposed for a model and a budget, nearest first."""

    source: ModelShape
    budget: Budget
    found: Sequence[Proposal]

    @property
    def first(self) -> Proposal:
        """Return the shape to paste."""
        return self.found[0]


def make_shapes(
    config: PlanConfig,
    source: ModelShape,
    asked: TargetConfig,
    measured: Mapping[str, Any] | None = None,
) -> Shapes:
    """Return shapes to prune ``source`` to, within the budget of a plan's flags.

    Args:
        config: flags of the plan.
        source: the model to prune.
        asked: extents that the user has chosen.
        measured: content of the file that --measured names.

    Raises:
        ValueError: the GPU is unknown, or no shape fits the budget.
    """
    gpu = find_gpu(config.gpu)
    length = config.seq_length or USUAL_LENGTH
    source.check_window(length)
    wanted = config.budget
    budget = Budget(
        params=wanted.budget_params,
        weights_gb=wanted.budget_weights_gb,
        kv_bytes=wanted.budget_kv_bytes,
        forward_ms=wanted.budget_forward_ms,
        forward=ForwardTime(
            sequences=wanted.budget_batch_size,
            seq_length=length,
            gpu=gpu,
            share=planned_share(config, source, gpu, measured, has_masks=False),
        ),
        flags=wanted.flags,
    )
    stages = config.pipeline_model_parallel_size or 1
    found = proposals(
        source,
        budget,
        asked,
        tensor=config.tensor_model_parallel_size or 1,
        stages=stages * (config.num_virtual_stages_per_pipeline_rank or 1),
    )
    return Shapes(source=source, budget=budget, found=found)
