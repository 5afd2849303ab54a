"""The shape that a pruning run works towards: what is refused before its processes meet."""

from __future__ import annotations

from megashear.config import (
    MaskConfig,
    ModelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
    check_streams,
)
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.kinds import kinds_of
from megashear.masks.target_flags import nearest_multiples
from megashear.masks.targets import target_flag, target_units, whole_parts
from megashear.models import loadable
from megashear.shape import ModelShape
from megashear.train.start import Start


def check_target_layout(
    target: ModelShape, source: ModelShape, run: PruneRun, then: PretrainRun | None = None
) -> None:
    """Refuse a target whose heads or neurons do not divide over the tensor ranks it is meant for.

    Args:
        target: shape to end with.
        source: shape to start from.
        run: its tensor ranks, or those that --target-tensor-model-parallel-size names.
        then: the run that trains the cut model in the same job, where there is one: its ranks.

    Raises:
        ValueError: names the extent, the nearest that divide, and the sizes that divide this one.
    """
    flag, ranks = "--tensor-model-parallel-size", run.parallel.tensor_model_parallel_size
    if then is not None:
        flag += " of --then-pretrain"
        ranks = then.parallel.tensor_model_parallel_size
    if run.masks.target_tensor_model_parallel_size is not None:
        flag = "--target-tensor-model-parallel-size"
        ranks = run.masks.target_tensor_model_parallel_size
    divided = [
        kind.extent
        for kind in kinds_of(source)
        # of query heads in key/value heads these are divided
        if kind.split_over_tensor and kind.outer(source) is None
    ]
    for extent in divided:
        value: int = getattr(target, extent)
        if value % ranks:
            fitting = [
                str(n)
                for n in range(1, ranks)
                if all(getattr(target, other) % n == 0 for other in divided)
            ]
            raise ValueError(
                f"target {extent} {value} is not a multiple of {flag} {ranks}, so the cut model "
                f"could not run on as many ranks; the nearest {target_flag(extent)} is "
                f"{nearest_multiples(value, ranks, getattr(source, extent))}; to keep {value}, "
                f"name the ranks it is for with --target-tensor-model-parallel-size: it divides "
                f"by {', '.join(fitting)}"
            )


def check_layers(model: ModelConfig) -> None:
    """Refuse layers whose masked model would not be the one that is cut.

    Raises:
        ValueError: with the way out.
    """
    if model.transformer_impl != "local":
        raise ValueError(
            f"--transformer-impl {model.transformer_impl} is for continued pretraining: while "
            f"masks learn a norm divides by the number of open hidden dimensions, and "
            f"Transformer Engine's fused norms divide by all of them, so that the model which "
            f"is trained would not be the one that is cut (a target that "
            f"keeps the hidden size has no such masks, but these layers were not checked under "
            f"others); prune with --transformer-impl local, `megashear cut`, and give the flag to "
            f"`megashear pretrain`"
        )


def check_masks(masks: MaskConfig, train: TrainConfig, start: Start, target: ModelShape) -> None:
    """Refuse masks that cannot lead from the start to the target.

    Raises:
        ValueError: an unreachable target, one that no stock runtime loads, a bound too low, noise
            streams that do not divide, or masks of a resumed run that had another target.
    """
    if masks.sparsity_warmup_iters > train.train_iters:
        raise ValueError(
            f"--sparsity-warmup-iters {masks.sparsity_warmup_iters} is above --train-iters "
            f"{train.train_iters}, so the target would never be asked for; the recipes take a "
            f"fifth of the steps, here {train.train_iters // 5}"
        )
    _check_constraint(masks, start.shape, target)
    # a run that began before there was this check may be resumed
    force = masks.force_unloadable_target or start.resumes
    loadable.check_target(target, start.shape, force=force)
    check_streams(
        masks.mask_noise_streams,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )
    if start.resumes:
        _check_same_target(start, target)


def _check_constraint(masks: MaskConfig, source: ModelShape, target: ModelShape) -> None:
    """Refuse a target or a bound that the constraint of the masks refuses."""
    SparsityConstraint(
        whole_parts(source, target),
        target_units(source, target),
        warmup_steps=masks.sparsity_warmup_iters,
        lambda2_max=masks.lambda2_max,
        force=masks.force_lambda2_max,
    )


def _check_same_target(start: Start, target: ModelShape) -> None:
    assert start.description is not None
    saved = start.description.known.target.to_dict()
    for extent, wanted in target.to_dict().items():
        if saved[extent] != wanted:
            raise ValueError(
                f"{start.checkpoint} was pruned towards {extent} {saved[extent]}, and the target "
                f"now has {wanted}; resume with the same target, or add --finetune to start new "
                f"masks from its weights"
            )
