"""What a run shows of itself beside its losses: masks, time by part, memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megashear.masks.targets import MaskPart
from megashear.monitor import tags
from megashear.monitor.mask_pictures import mask_pictures
from megashear.monitor.sinks import Sink, tolerated
from megashear.parallel import device
from megashear.parallel.agree import flat_all_reduce
from megashear.parallel.groups import ParallelGroups
from megashear.planning.hardware import gpu_of_device
from megashear.shape import ModelShape
from megashear.train.objectives import MaskSurvey


def survey_points(survey: MaskSurvey, target: ModelShape) -> dict[str, float]:
    """What a survey says in numbers, by tag.

    Args:
        survey: of this evaluation.
        target: shape to end with.
    """
    points = {
        tags.EXPECTED_PARAMETERS: survey.chances.expected_params(),
        tags.ACTUAL_PARAMETERS: float(survey.kept.num_params()),
        tags.TARGET_PARAMETERS: float(target.num_params()),
    }
    for kind, counted in survey.census.items():
        points[tags.expected_size(kind)] = counted.expected_open
        points[tags.actual_size(kind)] = counted.actual_open
        points[tags.target_size(kind)] = survey.target_sizes[kind]
        points[tags.undecided(kind)] = counted.num_undecided / counted.num_gates
        points[tags.churn(kind)] = survey.changed[kind] / counted.num_gates
        points[tags.rounding(kind)] = counted.num_changed / counted.num_gates
    return points


def show_masks(
    sink: Sink,
    step: int,
    survey: MaskSurvey,
    parts: Mapping[str, MaskPart],
    targets: Mapping[str, int],
) -> None:
    """Give a sink that takes images a picture and a histogram of every kind of mask.

    Args:
        sink: of the rank that writes.
        step: steps done.
        survey: of this evaluation.
        parts: of this process, by kind; how its rows are counted is looked at alone.
        targets: units that shall stay in each row, by kind.
    """
    if not sink.takes_images:
        return
    with tolerated(f"step {step}: masks are not drawn"):
        pictures = mask_pictures(
            {kind: survey.kept.of_kind(kind).numpy() for kind in parts},
            {kind: survey.chances.of_kind(kind).numpy() for kind in parts},
            rows_per_layer={kind: part.rows_per_layer for kind, part in parts.items()},
            targets=targets,
        )
        sink.images(step, {tags.mask_image(kind): each.pixels for kind, each in pictures.items()})
    sink.histograms(
        step, {tags.log_alpha(kind): values.numpy() for kind, values in survey.log_alpha.items()}
    )


def utilisation_points(
    tokens_per_second_per_device: float, shape: ModelShape, seq_length: int
) -> dict[str, float]:
    """How much of the device's peak the model's arithmetic takes, by tag; nothing on a device
    whose peak is not known, a CPU among them.

    Args:
        tokens_per_second_per_device: of training alone.
        shape: of the model that is trained; while pruning the source's, whose arithmetic masks do
            not spare.
        seq_length: tokens per sequence.
    """
    device_name = device.name()
    gpu = None if device_name is None else gpu_of_device(device_name)
    if gpu is None:
        return {}
    done = tokens_per_second_per_device * shape.training_flops(seq_length)  # FLOP/s
    return {tags.MODEL_FLOPS_UTILISATION: done / gpu.peak_flops}


def cost_points(seconds: Mapping[str, float], groups: ParallelGroups) -> dict[str, float]:
    """Time by part, mean over ranks, and memory, of the rank that has most, by tag.

    Collective over the world.

    Args:
        seconds: of a step by part, on this rank; those of ``tags.STEP_PARTS`` that are known.
        groups: where this rank stands.
    """
    memory = device.memory_in_use()
    # one order on every rank, and the parts that any device knows
    times = torch.tensor([seconds.get(part, 0.0) for part in tags.STEP_PARTS], dtype=torch.float64)
    most = torch.tensor(list(memory.values()), dtype=torch.float64)
    (times,) = flat_all_reduce([times], groups.world)
    (most,) = flat_all_reduce([most], groups.world, dist.ReduceOp.MAX)
    points = {
        tags.part_seconds(part): value / groups.world_size
        for part, value in zip(tags.STEP_PARTS, times.tolist())
        if value  # not timed: on a GPU most steps, and communication, of which its host sees none
    }
    return points | dict(zip((tags.MEMORY[name] for name in memory), most.tolist()))
