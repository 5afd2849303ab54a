"""What a model becomes, and how masks learn it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megashear.bounds import (
    COMMON,
    TINY,
    Between,
    Extent,
    Ranks,
    Rate,
    Sequences,
    StepsOrNever,
    check_bounds,
)
from megashear.config.defaults import LAMBDA2_MAX

Constraint = Literal["projection", "lagrangian"]
"""What holds the expected sparsity of masks to the target sparsity."""
Masks = Literal["exact", "expected"]
"""Masks under which a pruning run's model is read: as many units as the target keeps, or as many as
the masks expect to keep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """Size of the pruned model."""

    target: Annotated[str | None, COMMON] = None
    """Size of the pruned model: a preset (llama2-2.7b, llama2-1.3b, llama2-370m) or a JSON file of
    extents. Or give the --target-* extents."""
    target_num_layers: Annotated[Extent | None, COMMON] = None
    """Layers to keep; the source's unless given."""
    target_hidden_size: Annotated[Extent | None, COMMON] = None
    """Hidden dimensions to keep; the source's unless given."""
    target_num_attention_heads: Annotated[Extent | None, COMMON] = None
    """Query heads to keep; the source's unless given. In a grouped-query model every key/value head
    loses the same number, and all key/value heads are kept unless --target-num-query-groups is
    given."""
    target_num_query_groups: Extent | None = None
    """Key/value heads of a grouped-query model to keep; the source's unless given. Each keeps all
    its query heads unless --target-num-attention-heads is given. Without grouped queries this is
    the number of query heads."""
    target_ffn_hidden_size: Annotated[Extent | None, COMMON] = None
    """MLP neurons per layer to keep; the source's unless given."""
    force_unloadable_target: bool = False
    """Accept a target that stock runtimes refuse to load, such as a LLaMA whose heads do not divide
    its hidden size."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig(TargetConfig):
    """Size of the pruned model, and how masks learn it."""

    constraint: Constraint | None = None
    """What holds the masks to the target: after each step, the projection shifts all masks of a row
    alike until their expected sparsity is the target of the next step; the lagrangian is the
    penalty of Sheared LLaMA, which overshoots in short runs. projection unless given; a resumed run
    keeps its own."""
    target_tensor_model_parallel_size: Ranks | None = None
    """Tensor-parallel ranks that the cut model must divide over; those of the pruning run unless
    given."""
    sparsity_warmup_iters: Annotated[StepsOrNever, COMMON] = 640
    """Steps over which the target sparsity rises from 0."""
    mask_lr: Rate = 1.0
    """Peak learning rate of the masks (log_alpha), and of the lagrangian's multipliers."""
    mask_noise_streams: Annotated[Sequences, COMMON] = 1
    """Number of independent draws of the masks per global batch."""
    eval_relaxed_masks: bool = False
    """Evaluate also under masks drawn as in training, which shows what closing gates for good
    costs. Evaluations then read their text three times, not twice."""
    lambda2_max: Annotated[float, Between(TINY, 1e9)] = LAMBDA2_MAX
    """Upper bound of the lagrangian's quadratic multipliers."""
    force_lambda2_max: bool = False
    """Accept --lambda2-max below 100, where masks may miss their target."""

    def __post_init__(self) -> None:
        check_bounds(self)


def check_streams(num_streams: int, *, global_batch_size: int, micro_batch_size: int) -> None:
    """Refuse noise streams that would split a microbatch.

    Raises:
        ValueError: with numbers and the nearest that divide.
    """
    fits = [
        n
        for n in range(1, global_batch_size // micro_batch_size + 1)
        if global_batch_size % (n * micro_batch_size) == 0
    ]
    if num_streams not in fits:
        raise ValueError(
            f"--mask-noise-streams {num_streams} does not divide --global-batch-size "
            f"{global_batch_size} into whole microbatches of {micro_batch_size}; possible: "
            f"{', '.join(map(str, fits))}"
        )
