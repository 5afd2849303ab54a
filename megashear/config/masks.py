"""What a model becomes, and how masks learn it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """What the model shall become."""

    target: Annotated[str | None, COMMON] = None
    """Preset (llama2-2.7b, llama2-1.3b, llama2-370m) or JSON file of extents; or give the
    --target-* extents."""
    target_num_layers: Annotated[Extent | None, COMMON] = None
    """Layers to keep; the source's unless given."""
    target_hidden_size: Annotated[Extent | None, COMMON] = None
    """Hidden dimensions to keep; the source's unless given."""
    target_num_attention_heads: Annotated[Extent | None, COMMON] = None
    """Query heads to keep. In a grouped-query model the same number goes from every key/value head,
    and given alone it keeps all key/value heads; the source's unless given."""
    target_num_query_groups: Extent | None = None
    """Key/value heads to keep, of a grouped-query model; given alone, each keeps all its query
    heads. The source's unless given; without grouped queries it follows the heads."""
    target_ffn_hidden_size: Annotated[Extent | None, COMMON] = None
    """Neurons of the MLP to keep; the source's unless given."""
    force_unloadable_target: bool = False
    """Take a target that stock runtimes refuse to load, such as a LLaMA whose heads do not divide
    its hidden size."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig(TargetConfig):
    """What the model shall become, and how the masks learn it."""

    target_tensor_model_parallel_size: Ranks | None = None
    """Tensor-parallel ranks that the cut model shall divide over; those of the pruning run unless
    given."""
    sparsity_warmup_iters: Annotated[StepsOrNever, COMMON] = 640
    """Steps over which the target sparsity rises from 0."""
    mask_lr: Rate = 1.0
    """Peak learning rate of log_alpha and of the multipliers."""
    mask_noise_streams: Annotated[Sequences, COMMON] = 1
    """Independent mask draws per global batch."""
    eval_relaxed_masks: bool = False
    """Evaluate under masks sampled as in training too, so that the loss of closing gates for good
    shows. Costs a third pass over the evaluation's text, half of what evaluations cost without."""
    lambda2_max: Annotated[float, Between(TINY, 1e9)] = LAMBDA2_MAX
    """Bound of the quadratic multiplier."""
    force_lambda2_max: bool = False
    """Allow --lambda2-max below 100, where the constraint loses control."""

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
