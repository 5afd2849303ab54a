"""Checks of the paths that a run names, before anything reads or writes them."""

from __future__ import annotations

from pathlib import Path

from megashear.checkpoint.description import holds_iterations
from megashear.commands.settings import flag_of, flatten
from megashear.config import TrainConfig, TrainingRun
from megashear.files.output import check_writable


def check_there(config: object, *keys: str) -> None:
    """Refuse paths that do not exist, without importing anything that could open them.

    Args:
        config: the run.
        keys: settings that name what is read: a path, several paths, or None.

    Raises:
        ValueError: with the flag and the path.
    """
    values = flatten(config)
    for key in keys:
        named = values[key]
        for path in named if isinstance(named, tuple) else (named,):
            if path is not None and not Path(path).exists():
                raise ValueError(f"{flag_of(key)} {path} does not exist")


def check_run_paths(config: TrainingRun) -> None:
    """Refuse paths of a run that do not exist, and outputs that cannot be written.

    A run that is resumed does not read its source, which may be deleted.

    Args:
        config: the run.

    Raises:
        ValueError: with the flag and the path.
    """
    train = config.train
    resumed = train.resume and holds_iterations(train.save)
    source = [] if resumed else ["load", "load_hf"]
    check_there(config, *source, "data_path", "reference_loss", "domain_phases", "distill_from")
    check_outputs(train)


def check_outputs(train: TrainConfig, of: str = "") -> None:
    """Refuse outputs of a run that cannot be written.

    Args:
        train: configuration with the flags.
        of: text after each flag, if the run is not the command's own.

    Raises:
        UnwritableError: with the flag, the path and the way out.
    """
    for key in ("save", "tensorboard_dir"):
        if (path := getattr(train, key)) is not None:
            check_writable(flag_of(key) + of, path, into=True)
    if train.jsonl_log is not None:
        check_writable("--jsonl-log" + of, train.jsonl_log)


def check_new(config: object, *keys: str) -> None:
    """Refuse outputs that exist.

    Raises:
        ValueError: with the flag and the path.
    """
    for key in keys:
        path = getattr(config, key)
        if path is not None and Path(path).exists():
            raise ValueError(f"{flag_of(key)} {path} exists; choose another or remove it first")
