"""Say which layouts fit, how long a run takes and what it costs, before any GPU is asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.config import PlanConfig
from megashear.shape import PRESETS, ModelShape, read_shape

PROG = "megashear plan"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    config = parse(PlanConfig, argv, prog=PROG, description=__doc__ or "")
    refuse_torchrun(PROG)
    # Here, not above: torch takes seconds that --help should not.
    from megashear.checkpoint import loadable
    from megashear.planning.jobs import make_plans
    from megashear.planning.tables import as_dict, lines

    source = _model(config.model)
    target = None if config.target is None else _target(config.target, source)
    if target is not None:
        loadable.check_target(target, source, force=config.force_unloadable_target)
    jobs = make_plans(config, source, target)
    if config.json:
        report(json.dumps({planned.job.name: as_dict(planned) for planned in jobs}, indent=2))
        return 0
    for number, planned in enumerate(jobs):
        report("\n".join([*([""] if number else []), *lines(planned, top=config.top)]))
    return 0


def _model(name: str) -> ModelShape:
    """The shape of what --model names."""
    if not Path(name).is_dir():
        return read_shape(name, flag="--model")
    from megashear.checkpoint import hf_config

    if (Path(name) / hf_config.CONFIG).is_file():
        return hf_config.read_shape(name)
    from megashear.checkpoint.description import find_iteration, read_description

    return read_description(find_iteration(name)).shape


def _target(name: str, source: ModelShape) -> ModelShape:
    """The shape of what --target names; a preset stands for its extents, as in `prune`."""
    if name not in PRESETS:
        return read_shape(name, flag="--target")
    from megashear.masks.targets import EXTENTS

    extents = (*EXTENTS.values(), "head_dim")
    return dataclasses.replace(source, **{e: getattr(PRESETS[name], e) for e in extents})
