"""Print which layouts fit, how long a run takes and what it costs, without a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from megashear.commands.outcome import UsageError, refuse_torchrun, report, user_errors
from megashear.commands.parse import CONFIG, parse
from megashear.config import PlanConfig, PretrainRun, PruneRun, TargetConfig
from megashear.shape import ModelShape, read_shape

PROG = "megashear plan"
_TARGET = tuple(field.name for field in dataclasses.fields(TargetConfig))

Run = TypeVar("Run", PruneRun, PretrainRun)


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name, and return the exit status."""
    config = _parse(argv)
    refuse_torchrun(PROG)
    prune, pretrain, source, target = _read(config)
    # imported here, because torch takes seconds, which --help should not
    from megashear.planning.jobs import make_plans
    from megashear.planning.tables import as_dict, lines

    jobs = make_plans(config, source, target, prune=prune, pretrain=pretrain)
    if config.json:
        report(json.dumps({plan.job.name: as_dict(plan) for plan in jobs}, indent=2))
        return 0
    for number, plan in enumerate(jobs):
        report("\n".join([*([""] if number else []), *lines(plan, top=config.top)]))
    return 0


def _parse(argv: Sequence[str]) -> PlanConfig:
    try:
        return parse(PlanConfig, argv, prog=PROG, description=__doc__ or "", check=_read)
    except UsageError as error:
        if CONFIG.flag in argv and "unknown key" in str(error):
            raise UsageError(
                f"{error}; --config is for keys of the plan itself: name the YAML file of a run "
                f"with --prune-config or --pretrain-config"
            ) from None
        raise


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


def _model(name: str) -> ModelShape:
    """Return the shape of the model that --model names."""
    if not Path(name).is_dir():
        return read_shape(name, flag="--model")
    from megashear.conversion import hf_config

    if (Path(name) / hf_config.CONFIG).is_file():
        return hf_config.read_shape(name)
    from megashear.checkpoint.description import find_iteration, read_description

    return read_description(find_iteration(name)).shape


def _target(config: PlanConfig, prune: PruneRun | None, source: ModelShape) -> ModelShape | None:
    """Return the target that flags, or else the recipe, describe; None where nothing is pruned."""
    from megashear.masks.target_flags import target_shape
    from megashear.models import loadable

    asked = TargetConfig(**{name: getattr(config, name) for name in _TARGET})
    if prune is not None:
        of_recipe = {
            name: getattr(prune.masks, name)
            for name in _TARGET
            if getattr(asked, name) is None or getattr(asked, name) is False
        }
        asked = dataclasses.replace(asked, **of_recipe)
    if asked == TargetConfig(force_unloadable_target=asked.force_unloadable_target):
        return None
    target = target_shape(asked, source)
    loadable.check_target(target, source, force=asked.force_unloadable_target)
    return target
