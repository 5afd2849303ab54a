"""Where a run begins: a checkpoint or fresh weights, and the shape it works towards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megashear.checkpoint.description import (
    TOKENIZER,
    Description,
    find_iteration,
    holds_iterations,
    read_description,
)
from megashear.checkpoint.saver import name_latest
from megashear.checkpoint.store import agree_on_iteration, check_save_directory
from megashear.config import (
    MaskConfig,
    ModelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
    check_streams,
)
from megashear.conversion import sharded_hf
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.kinds import kinds_of
from megashear.masks.target_flags import nearest_multiples
from megashear.masks.targets import target_flag, target_units, whole_parts
from megashear.models import loadable
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.pruning import StructuredPruning


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    shape: ModelShape
    checkpoint: Path | None
    """One iteration's directory; None starts from ``hf`` or fresh weights."""
    description: Description | None
    continues: bool
    """Whether optimizer, masks, data and step come from the checkpoint too."""
    hf: Path | None = None
    """Hugging Face directory to take the weights from."""
    source: str | None = None
    """What named the checkpoint: --load, or --save of a run that is resumed."""
    resumed: bool = False
    """Whether that was --save."""

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return self.description.iteration if self.continues and self.description else 0

    @property
    def tokenizer(self) -> Path | None:
        """Directory of the model's own tokenizer files, if it carries any."""
        if self.checkpoint is not None:
            return self.checkpoint / TOKENIZER
        return self.hf


def find_start(
    train: TrainConfig, *, stage: str, without: str, fresh: ModelShape | None = None
) -> Start:
    """Find where the run begins, by --load or --load-hf, --save with --resume, and --finetune.

    Args:
        train: the flags.
        stage: kind of run; a checkpoint of the same kind is gone on with.
        without: what to say where nothing names a beginning.
        fresh: shape of fresh weights, where they were asked for.

    Raises:
        ValueError: no beginning, two of them, or one that this run cannot go on from.
    """
    check_save_directory(train.save, train.load, resume=train.resume)
    source = train.load
    resumed = train.resume and holds_iterations(train.save)
    if resumed:
        source = train.save
    named = train.load is not None or train.load_hf is not None
    if fresh is not None and named and not resumed:
        flag = "--load" if train.load_hf is None else "--load-hf"
        raise ValueError(
            f"{flag} {train.load or train.load_hf} and --init-shape exclude each other; a model "
            f"that is there has its own shape"
        )
    if source is not None:
        start = _start_at(find_iteration(source), source, resumed, train, stage)
    elif train.load_hf is not None:
        description = sharded_hf.describe(train.load_hf)
        start = Start(
            shape=description.shape,
            checkpoint=None,
            description=description,
            continues=False,
            hf=Path(train.load_hf),
        )
    elif fresh is not None:
        start = Start(shape=fresh, checkpoint=None, description=None, continues=False)
    else:
        raise ValueError(without)
    if not train.resume and not start.continues:
        check_events(train)
    return start


def settle(
    start: Start,
    train: TrainConfig,
    groups: ParallelGroups,
    *,
    stage: str,
    check: Callable[[Start], object],
) -> Start:
    """Settle where the run begins, once all ranks have held the checkpoint to its checksums.

    An older iteration is taken where the newest is damaged, and the run that is resumed names it
    as its latest. Collective over the world.

    Args:
        start: by `find_start`, which looked at small files only.
        train: the flags.
        groups: where this rank stands.
        stage: as for `find_start`.
        check: what to hold another beginning to; what it returns is not used.

    Raises:
        ValueError: on every rank: nothing whole is there, or it is one that this run cannot go on
            from.
    """
    if start.source is None:
        return start
    directory = agree_on_iteration(start.source, groups, contents=train.verify_checkpoint)
    with raise_together():
        if directory != start.checkpoint:
            older = _start_at(directory, start.source, start.resumed, train, stage)
            if older.shape != start.shape:
                raise ValueError(
                    f"{directory}, the newest whole checkpoint in {start.source}, is of another "
                    f"model than {start.checkpoint}, which is not taken: it is damaged, or another "
                    f"run has saved since; name one with --load"
                )
            check(older)
            start = older
        if start.resumed and groups.rank == 0:
            assert start.description is not None
            name_latest(Path(start.source or ""), start.description.iteration)
    return start


def _start_at(directory: Path, source: str, resumed: bool, train: TrainConfig, stage: str) -> Start:
    description = read_description(directory)
    if resumed and description.stage != stage:
        raise ValueError(
            f"--resume: --save {train.save} holds a run of stage {description.stage!r}, not "
            f"{stage!r}; choose another --save"
        )
    if stage != StructuredPruning.stage:
        check_no_masks(directory, description)
    continues = description.stage == stage and (resumed or not train.finetune)
    if continues and description.iteration > train.train_iters:
        raise ValueError(
            f"{directory} is at step {description.iteration} and --train-iters is "
            f"{train.train_iters}; raise it, or add --finetune to start again from its weights"
        )
    return Start(
        shape=description.shape,
        checkpoint=directory,
        description=description,
        continues=continues,
        source=source,
        resumed=resumed,
    )


def check_events(train: TrainConfig) -> None:
    """Refuse to draw a new run over another's curves.

    Raises:
        ValueError: --tensorboard-dir or --jsonl-log has some.
    """
    if train.jsonl_log is not None and Path(train.jsonl_log).exists():
        raise ValueError(
            f"--jsonl-log {train.jsonl_log} exists, and this run does not go on from another; "
            f"choose another file, or remove it if it is not needed"
        )
    if train.tensorboard_dir is None:
        return
    if any(Path(train.tensorboard_dir).glob("events.out.tfevents.*")):
        raise ValueError(
            f"--tensorboard-dir {train.tensorboard_dir} has another run's curves in it; choose "
            f"another directory, or remove it if they are not needed"
        )


def check_target_layout(
    target: ModelShape, source: ModelShape, run: PruneRun, then: PretrainRun | None = None
) -> None:
    """Refuse a target whose heads or neurons do not divide over the tensor ranks it is meant for.

    Args:
        target: shape to end with.
        source: shape to start from.
        run: its tensor ranks, or those that --target-tensor-model-parallel-size names.
        then: the run that goes on with the cut model, where the same job has one: its ranks.

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
    """Refuse layers of which the masked model would not be the one that is cut.

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
    SparsityConstraint(
        whole_parts(start.shape, target),
        target_units(start.shape, target),
        warmup_steps=masks.sparsity_warmup_iters,
        lambda2_max=masks.lambda2_max,
        force=masks.force_lambda2_max,
    )
    # a run that began before this was asked goes on
    force = masks.force_unloadable_target or start.continues
    loadable.check_target(target, start.shape, force=force)
    check_streams(
        masks.mask_noise_streams,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )
    if start.continues:
        _check_same_target(start, target)


def check_no_masks(directory: Path, description: Description) -> None:
    """Refuse a pruning run's checkpoint where its masks would not be applied.

    Raises:
        ValueError: it is one.
    """
    if description.stage == StructuredPruning.stage:
        raise ValueError(
            f"--load {directory} is of a pruning run, whose weights are nothing without its masks; "
            f"fold them in with `megashear cut` and load the result"
        )


def _check_same_target(start: Start, target: ModelShape) -> None:
    assert start.description is not None
    saved = ModelShape(**start.description.details["target_shape"]).to_dict()
    for extent, wanted in target.to_dict().items():
        if saved[extent] != wanted:
            raise ValueError(
                f"{start.checkpoint} was pruned towards {extent} {saved[extent]}, and the target "
                f"now has {wanted}; go on with the same target, or add --finetune to start new "
                f"masks from its weights"
            )
