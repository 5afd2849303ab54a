"""Print which layouts fit, how long a run takes and what it costs, without a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megashear.commands.outcome import UsageError, refuse_torchrun, report, user_errors
from megashear.commands.parse import CONFIG, parse
from megashear.config import PlanConfig, PretrainRun, PruneRun, TargetConfig
from megashear.files.structured import read_json_object
from megashear.shape import ModelShape, read_shape

if TYPE_CHECKING:
    from megashear.planning.jobs import Teacher

PROG = "megashear plan"
_TARGET = tuple(field.name for field in dataclasses.fields(TargetConfig))

Run = TypeVar("Run", PruneRun, PretrainRun)


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name, and return the exit status."""
    config = _parse(argv)
    refuse_torchrun(PROG)
    prune, pretrain, source, target = _read(config)
    measured = _measured(config)
    # imported here, because torch takes seconds, which --help should not
    from megashear.planning.jobs import CONTINUED, PRUNING, make_plans
    from megashear.planning.proposal_tables import shape_lines, shapes_as_dict
    from megashear.planning.shapes import make_shapes
    from megashear.planning.tables import as_dict, lines

    found: dict[str, Any] = {}
    if config.budget.flags:
        shapes = make_shapes(config, source, _asked(config), measured)
        target = shapes.first.shape
        found["shapes"] = shapes_as_dict(shapes)
        if not config.json:
            report("\n".join(shape_lines(shapes, top=config.top)))
    if config.gpus is None:  # shapes alone are asked for
        report(json.dumps(found, indent=2) if config.json else None)
        return 0
    teachers = {
        PRUNING: _teacher(config, prune, source),
        CONTINUED: _teacher(config, pretrain, source),
    }
    jobs = make_plans(
        config,
        source,
        target,
        prune=prune,
        pretrain=pretrain,
        teachers={name: found for name, found in teachers.items() if found is not None},
        measured=measured,
    )
    if config.json:
        report(json.dumps(found | {plan.job.name: as_dict(plan) for plan in jobs}, indent=2))
        return 0
    for number, plan in enumerate(jobs):
        blank = [""] * bool(number or found)
        report("\n".join([*blank, *lines(plan, top=config.top)]))
    return 0


def _parse(argv: Sequence[str]) -> PlanConfig:
    try:
        return parse(PlanConfig, argv, prog=PROG, description=__doc__ or "", check=_check)
    except UsageError as error:
        if CONFIG.flag in argv and "unknown key" in str(error):
            raise UsageError(
                f"{error}; --config is for keys of the plan itself: name the YAML file of a run "
                f"with --prune-config or --pretrain-config"
            ) from None
        raise


def _check(config: PlanConfig) -> None:
    """Refuse wrong files and flags, and a budget that no shape meets.

    Raises:
        ValueError: anything a user can correct.
    """
    *_, source, _ = _read(config)
    if config.budget.flags:
        from megashear.planning.shapes import make_shapes

        make_shapes(config, source, _asked(config), _measured(config))


def _read(
    config: PlanConfig,
) -> tuple[PruneRun | None, PretrainRun | None, ModelShape, ModelShape | None]:
    """Return the two recipes, the model's shape and the target's.

    Raises:
        ValueError: a file or flag is wrong.
    """
    prune = _recipe(PruneRun, config.prune_config, "--prune-config")
    pretrain = _recipe(PretrainRun, config.pretrain_config, "--pretrain-config")
    source = _model(config.model)
    if config.budget.flags:
        return prune, pretrain, source, None  # the first of the shapes that are proposed
    target = _target(config, prune, source)
    if target is None and prune is not None:
        raise ValueError(
            f"--prune-config {config.prune_config} names no target; give --target or --target-* "
            f"extents, or leave it out to plan for training --model as it is"
        )
    return prune, pretrain, source, target


def _recipe(run: type[Run], file: str | None, flag: str) -> Run | None:
    """Return the run that a YAML file describes, as `prune` and `pretrain` read it."""
    if file is None:
        return None
    # a recipe may leave the place of its text to the command line, and a plan needs none
    words = [CONFIG.flag, file, "--data-path", "-"]
    try:
        found = parse(run, words, prog=f"{PROG} {flag}", description="")
    except UsageError as error:
        raise UsageError(str(error).replace(f"{CONFIG.flag} {file}", f"{flag} {file}")) from None
    if not found.model.bf16:
        raise UsageError(
            f"{flag} {file}: bf16 is false, and plans are for bfloat16 alone; set bf16: true"
        )
    return found


def _measured(config: PlanConfig) -> dict[str, Any] | None:
    """Return the content of the file that --measured names."""
    if config.measured is None:
        return None
    if not Path(config.measured).is_file():
        raise ValueError(f"--measured {config.measured} is no file")
    return read_json_object(Path(config.measured), f"--measured {config.measured}")


def _teacher(
    config: PlanConfig, run: PruneRun | PretrainRun | None, source: ModelShape
) -> Teacher | None:
    """Return the model that a run learns from; None where it learns from text alone."""
    from megashear.planning.jobs import Teacher

    named = None if run is None else run.distill.distill_from
    if config.teacher is not None:
        shape = _model(config.teacher, "--teacher")
        return Teacher(shape=shape, source=f"the shape of {config.teacher}")
    if named is not None and Path(named).is_dir():
        try:
            return Teacher(shape=_model(named, "distill_from"), source=f"the shape of {named}")
        except ValueError as error:
            raise ValueError(
                f"distill_from {named}: {error}; or give the teacher's shape with --teacher"
            ) from None
    if named is not None:
        return Teacher(
            shape=source,
            source=f"assumed to be as --model, for {named} is not here; --teacher gives another",
        )
    if config.distill:
        return Teacher(shape=source, source="the shape of --model")
    return None


def _model(name: str, flag: str = "--model") -> ModelShape:
    """Return the shape of the model that a flag names."""
    if not Path(name).is_dir():
        return read_shape(name, flag=flag)
    from megashear.conversion import hf_config

    if (Path(name) / hf_config.CONFIG).is_file():
        return hf_config.read_shape(name)
    from megashear.checkpoint.description import find_iteration, read_description

    return read_description(find_iteration(name)).shape


def _asked(config: PlanConfig) -> TargetConfig:
    """Return the flags of the target."""
    return TargetConfig(**{name: getattr(config, name) for name in _TARGET})


def _target(config: PlanConfig, prune: PruneRun | None, source: ModelShape) -> ModelShape | None:
    """Return the target that flags, or else the recipe, describe; None where nothing is pruned."""
    from megashear.masks.target_flags import target_shape
    from megashear.models import loadable

    asked = _asked(config)
    if prune is not None:
        of_recipe = {
            name: getattr(prune.masks, name)
            for name in _TARGET
            if getattr(asked, name) is None or getattr(asked, name) is False
        }
        asked = dataclasses.replace(asked, **of_recipe)
    if asked == TargetConfig(force_unloadable_target=asked.force_unloadable_target):
        loadable.warn(source, "--model: ")
        return None
    target = target_shape(asked, source)
    loadable.check_target(target, source, force=asked.force_unloadable_target)
    return target
