"""What the stages of a run add to a checkpoint's description: every value with its type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megashear.checkpoint.run_summary import RunSummary
from megashear.checkpoint.text_sample import TextSample
from megashear.files.structured import check_fields
from megashear.shape import ModelShape

# Keys of ``details`` on disk; each is the name of a field of `RunDetails`.
RUN = "run"
ENVIRONMENT = "environment"
SOURCE_SHAPE = "source_shape"
TARGET_SHAPE = "target_shape"
PRUNED_FOR = "pruned_for"
ROUNDING = "rounding"
IMPORTANCE_SCORES = "importance_scores"
MASK_EXTENTS = "mask_extents"
MASK_OPTIMIZER_STEPS = "mask_optimizer_steps"
SCHEDULER = "scheduler"
LOADER = "loader"
GUARD = "step_guard"
REWEIGHTING = "reweighting"
CONSUMED_SAMPLES = "consumed_samples"
EVAL_SEQUENCES = "eval_sequences"
TEACHER_ITERATION = "teacher_iteration"
HELD_OUT_LOSS = "held_out_loss"
HELD_OUT_ERROR = "held_out_standard_error"
TEXT_SAMPLES = "text_samples"
HF_CONFIG = "hf_config"
ORIGIN = "origin"
HISTORY = "history"

BEFORE = (ORIGIN, HISTORY)
"""Keys of where a model came from and which runs made it; all later stages keep them."""
LINEAGE = (SOURCE_SHAPE, PRUNED_FOR, ROUNDING, IMPORTANCE_SCORES, *BEFORE)
"""Keys of the pruning that a model came from, and `BEFORE`; stages after the cut keep them."""
PASSING = (SCHEDULER, LOADER, GUARD, REWEIGHTING, TEXT_SAMPLES)
"""Keys of what differs with every step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFlags:
    """Flags of a saved run that readers ask for; None where the checkpoint has none."""

    global_batch_size: int | None = None
    seq_length: int | None = None
    train_iters: int | None = None
    lr_decay_iters: int | None = None
    load: str | None = None
    save: str | None = None
    tensorboard_dir: str | None = None
    bf16: bool | None = None
    constraint: str | None = None
    distill_from: str | None = None
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> SavedFlags:
        """Read the flags from the groups of a run's configuration.

        Raises:
            TypeError: a flag has another type than its field; the message names both.
        """
        groups = [_mapping(run, group) for group in _GROUPS if group in run]
        names = {one.name for one in dataclasses.fields(cls)}
        values = {name: group[name] for group in groups for name in names & group.keys()}
        check_fields(cls, values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDetails:
    """The details of a checkpoint; each field has the name of its key on disk.

    Older releases wrote fewer keys, and other stages write others: a missing value is None, or
    empty where it is a mapping that does not say so.
    """

    run: dict[str, Any] = field(default_factory=dict)
    """All flags of the run by group (train, model ...), as the configuration has them."""
    flags: SavedFlags = field(default_factory=SavedFlags)
    """Those of ``run`` that readers ask for; no key on disk."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, device, processes and command of the last start."""
    device: str | None = None
    """Name of the device where an older release wrote it outside of ``environment``."""
    source_shape: ModelShape | None = None
    """Shape of the model before pruning, kept after the cut."""
    target_shape: ModelShape | None = None
    """Shape that a pruning run prunes to."""
    pruned_for: int | None = None
    """Steps of the pruning run that the model was cut from."""
    rounding: dict[str, int] = field(default_factory=dict)
    """Number of gates by kind that the cut changed to meet the target."""
    importance_scores: dict[str, Any] = field(default_factory=dict)
    """File of the scores that chose the units to keep, and how they were measured."""
    mask_extents: dict[str, list[int]] | None = None
    """Extents of every kind's mask; None of a checkpoint without masks."""
    mask_optimizer_steps: int | None = None
    """Steps that the optimizer of the masks took."""
    scheduler: dict[str, Any] | None = None
    """State of the learning rate's schedule."""
    loader: dict[str, Any] | None = None
    """State of the loader of training samples."""
    step_guard: dict[str, Any] | None = None
    """State of the guard that skips steps with a gradient that is not finite."""
    reweighting: dict[str, Any] | None = None
    """State of the policy that moves the weights of domains."""
    consumed_samples: int | None = None
    """Training samples read."""
    eval_sequences: int | None = None
    """Sequences per domain of an evaluation within the run."""
    teacher_iteration: int | None = None
    """Iteration of the checkpoint that the run learns from; 0 of a Hugging Face directory."""
    held_out_loss: dict[str, dict[str, float]] = field(default_factory=dict)
    """Losses of a finished run's last evaluation, by mode and domain, nats per token."""
    held_out_standard_error: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Standard errors of these losses; None for an error that is not known."""
    text_samples: list[TextSample] = field(default_factory=list)
    """Held-out texts as the model of a finished run continues them."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """Fields that return to config.json unchanged; see `hf_fields.KEPT`."""
    origin: dict[str, str] = field(default_factory=dict)
    """Name and licence of the model before megashear; see `origin.origin_of`."""
    history: list[RunSummary] = field(default_factory=list)
    """Runs that made the model before the one that saved it, the first one first."""

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> RunDetails:
        """Read the values that are there, and ignore keys of other stages.

        Raises:
            TypeError: a value has another type than its field; the message names both.
            ValueError: a shape is not one of a model, or masks have no target.
        """
        names = {one.name for one in dataclasses.fields(cls)} - {"flags"}
        values = {name: value for name, value in details.items() if name in names}
        check_fields(cls, values)
        for name in (SOURCE_SHAPE, TARGET_SHAPE):
            if name in values:
                values[name] = _shape(values, name)
        for name in (HELD_OUT_LOSS, HELD_OUT_ERROR):
            for mode in values.get(name, {}):
                _mapping(values[name], mode)
        if HISTORY in values:
            values[HISTORY] = [RunSummary.read(each) for each in _list(values, HISTORY)]
        if TEXT_SAMPLES in values:
            values[TEXT_SAMPLES] = [TextSample.read(each) for each in _list(values, TEXT_SAMPLES)]
        if not all(isinstance(value, str) for value in values.get(ORIGIN, {}).values()):
            raise TypeError(f"{ORIGIN} is {str(values[ORIGIN])[:80]}; wanted texts")
        if MASK_EXTENTS in values and TARGET_SHAPE not in values:
            raise ValueError(f"{TARGET_SHAPE} is missing, which {MASK_EXTENTS} needs")
        return cls(**values, flags=SavedFlags.of(values.get(RUN, {})))

    @property
    def target(self) -> ModelShape:
        """Return the shape that a pruning run prunes to; every run with masks has one."""
        assert self.target_shape is not None
        return self.target_shape


_GROUPS = ("train", "model", "optimizer", "masks", "distill")
"""Groups of the run's flags where `SavedFlags` stand."""


def _shape(values: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a value stands for.

    Raises:
        TypeError: the value is no mapping.
        ValueError: it is not the shape of a model.
    """
    try:
        return ModelShape(**_mapping(values, name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    """Return a value that must be a list.

    Raises:
        TypeError: it is none.
    """
    found = values[name]
    if not isinstance(found, list):
        raise TypeError(f"{name} is {str(found)[:80]}; wanted a list")
    return found


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a value that must be a mapping.

    Raises:
        TypeError: it is none.
    """
    found = values[name]
    if not isinstance(found, dict):
        raise TypeError(f"{name} is {str(found)[:80]}; wanted an object")
    return found
