"""Where a run begins: a checkpoint, a Hugging Face directory or fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megashear.checkpoint.description import (
    TOKENIZER,
    Description,
    find_iteration,
    holds_iterations,
    read_description,
)
from megashear.checkpoint.store import check_save_directory
from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import ModelConfig, TrainConfig
from megashear.conversion import sharded_hf
from megashear.shape import ModelShape
from megashear.tokenizer import tokenizer_files
from megashear.train.pruning import StructuredPruning


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    shape: ModelShape
    """Extents of the model."""
    checkpoint: Path | None
    """One iteration's directory; None starts from ``hf`` or fresh weights."""
    description: Description | None
    """What the checkpoint or the Hugging Face directory says of itself."""
    resumes: bool
    """Whether optimizer, masks, data and step come from the checkpoint too."""
    hf: Path | None = None
    """Hugging Face directory to take the weights from."""
    source: str | None = None
    """What named the checkpoint: --load, or --save of a run that is resumed."""
    is_own: bool = False
    """Whether the checkpoint is in the run's own --save."""

    @property
    def first_step(self) -> int:
        """Steps done before this start."""
        return self.description.iteration if self.resumes and self.description else 0

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
        stage: kind of run; a checkpoint of the same kind is resumed.
        without: what to say where nothing names a beginning.
        fresh: shape of fresh weights, where they were asked for.

    Raises:
        ValueError: no beginning, two of them, or one that this run cannot resume or start from.
    """
    check_save_directory(train.save, train.load, resume=train.resume)
    source = train.load
    is_own = train.resume and holds_iterations(train.save)
    if is_own:
        source = train.save
    named = train.load is not None or train.load_hf is not None
    if fresh is not None and named and not is_own:
        flag = "--load" if train.load_hf is None else "--load-hf"
        raise ValueError(
            f"{flag} {train.load or train.load_hf} and --init-shape exclude each other; a model "
            f"that is there has its own shape"
        )
    if source is not None:
        start = _start_at(find_iteration(source), source, is_own, train, stage)
    elif train.load_hf is not None:
        description = sharded_hf.describe(train.load_hf)
        start = Start(
            shape=description.shape,
            checkpoint=None,
            description=description,
            resumes=False,
            hf=Path(train.load_hf),
        )
    elif fresh is not None:
        start = Start(shape=fresh, checkpoint=None, description=None, resumes=False)
    else:
        raise ValueError(without)
    if not train.resume and not start.resumes:
        check_events(train)
    return start


def start_from_older(start: Start, directory: Path, train: TrainConfig, *, stage: str) -> Start:
    """Begin at another iteration of the same checkpoint.

    Args:
        start: by `find_start`, which looked at small files only.
        directory: of the iteration that is whole.
        train: the flags.
        stage: as for `find_start`.

    Raises:
        ValueError: it is of another model, or one that this run cannot resume or start from.
    """
    assert start.source is not None
    older = _start_at(directory, start.source, start.is_own, train, stage)
    if older.shape != start.shape:
        raise ValueError(
            f"{directory}, the newest whole checkpoint in {start.source}, is of another model than "
            f"{start.checkpoint}, which is not taken: it is damaged, or another run has saved "
            f"since; name one with --load"
        )
    return older


def _start_at(directory: Path, source: str, is_own: bool, train: TrainConfig, stage: str) -> Start:
    description = read_description(directory)
    if is_own and description.stage != stage:
        raise ValueError(
            f"--resume: --save {train.save} holds a run of stage {description.stage!r}, not "
            f"{stage!r}; choose another --save"
        )
    if stage != StructuredPruning.stage:
        check_no_masks(directory, description)
    resumes = description.stage == stage and (is_own or not train.finetune)
    if resumes and description.iteration > train.train_iters:
        raise ValueError(
            f"{directory} is at step {description.iteration} and --train-iters is "
            f"{train.train_iters}; raise it, or add --finetune to start again from its weights"
        )
    return Start(
        shape=description.shape,
        checkpoint=directory,
        description=description,
        resumes=resumes,
        source=source,
        is_own=is_own,
    )


def tokenizer_directory(start: Start, of_data: Path) -> Path:
    """Return the directory of the model's own tokenizer, or of the data's if it has none."""
    own = _carried(start)
    # a generation_config.json alone is no tokenizer
    if own and tokenizer_files.fingerprint(own) is not None:
        assert start.tokenizer is not None
        return start.tokenizer
    return of_data


def tokenizer_of(start: Start, of_data: Path) -> list[Path]:
    """Return the tokenizer files that checkpoints carry: the model's, and where no tokenizer is
    among them, the data's too."""
    own = _carried(start)
    if own and tokenizer_files.fingerprint(own) is not None:
        return own
    names = {file.name for file in own}
    return [*own, *(file for file in tokenizer_files.find(of_data) if file.name not in names)]


def _carried(start: Start) -> list[Path]:
    carried = start.tokenizer
    return tokenizer_files.find(carried) if carried is not None and carried.is_dir() else []


def check_events(train: TrainConfig) -> None:
    """Refuse to draw a new run over another's curves.

    Raises:
        ValueError: --tensorboard-dir or --jsonl-log has some.
    """
    if train.jsonl_log is not None and Path(train.jsonl_log).exists():
        raise ValueError(
            f"--jsonl-log {train.jsonl_log} exists, and this run resumes no other; "
            f"choose another file, or remove it if it is not needed"
        )
    if train.tensorboard_dir is None:
        return
    if any(Path(train.tensorboard_dir).glob("events.out.tfevents.*")):
        raise ValueError(
            f"--tensorboard-dir {train.tensorboard_dir} has another run's curves in it; choose "
            f"another directory, or remove it if they are not needed"
        )


def check_weights(directory: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of its shape; only its index is read.

    A rank that found out while it loads would be late.

    Raises:
        ValueError: a tensor is missing, of another shape or too many.
    """
    CheckpointWeights(directory)


def check_precision(start: Start, model: ModelConfig) -> None:
    """Refuse to resume a run in another number format than its own.

    Raises:
        ValueError: with the way out.
    """
    if not start.resumes or start.description is None:
        return
    saved = start.description.known.flags.bf16
    if saved is not None and saved != model.bf16:
        raise ValueError(
            f"{start.checkpoint} was trained {'with' if saved else 'without'} --bf16, and its "
            f"optimizer state has that form; resume it the same way, or add --finetune to start "
            f"again from its weights"
        )


def check_no_masks(directory: Path, description: Description) -> None:
    """Refuse a pruning run's checkpoint where its masks would not be applied.

    Raises:
        ValueError: it is one.
    """
    if description.stage == StructuredPruning.stage:
        raise ValueError(
            f"{directory} is of a pruning run, whose weights are nothing without its masks; "
            f"fold them in with `megashear cut` and load the result"
        )
