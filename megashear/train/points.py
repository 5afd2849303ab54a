"""Numbers of the steps of a run: for the log, TensorBoard and whoever else takes points."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megashear.config import TrainConfig
from megashear.monitor import tags
from megashear.monitor.console import format_step, format_terms
from megashear.monitor.sinks import Sink
from megashear.monitor.step_clock import StepClock
from megashear.monitor.throughput import Throughput
from megashear.parallel import device
from megashear.parallel.agree import flat_all_reduce
from megashear.parallel.groups import ParallelGroups
from megashear.planning.hardware import gpu_of_device
from megashear.shape import ModelShape
from megashear.train.schedule import SequenceLosses
from megashear.train.step import WEIGHTS, Step, TrainStep

logger = logging.getLogger(__name__)

_SAME_TERM = 1e-6
"""Relative; tensor ranks add up the same float32 numbers, in float64."""


class StepLog:
    """Collects the losses of a window of steps, then writes its points and a line.

    Args:
        train_step: makes the steps.
        shape: of the model that is trained.
        train: the flags.
        meter: knows how long steps took.
        clock: knows what their time went to.
        sink: where points go.
    """

    def __init__(
        self,
        train_step: TrainStep,
        shape: ModelShape,
        train: TrainConfig,
        meter: Throughput,
        clock: StepClock,
        sink: Sink,
    ) -> None:
        self._train_step, self._shape, self._train = train_step, shape, train
        self._meter, self._clock, self._sink = meter, clock, sink
        self._window: list[SequenceLosses] = []
        self._last: tuple[Step, float] | None = None

    def add(self, taken: Step, rate: float) -> None:
        """Take a step into the window.

        Args:
            taken: what the step gave.
            rate: learning rate of the weights in it.
        """
        self._window += taken.losses
        self._last = taken, rate
        self._meter.step(self._train.global_batch_size * self._train.seq_length)

    def write(self, step: int) -> bool:
        """Write the window since the last call, if any step is in it. Collective over the world.

        Args:
            step: steps done.

        Returns:
            Whether any step was.
        """
        if self._last is None:
            return False
        device.synchronize()
        (taken, rate), groups = self._last, self._train_step.groups
        objective = self._train_step.objective
        loss, terms = mean_losses(self._window, objective.further_terms, groups)
        self._window, self._last = [], None
        pace, norm = self._meter.window(), taken.norms[WEIGHTS]
        self._sink.scalars(
            step,
            {
                tags.LM_LOSS: loss,
                **{tags.loss_term(name): value for name, value in terms.items()},
                tags.GRAD_NORM: norm,
                tags.LEARNING_RATE: rate,
                tags.TOKENS_PER_SECOND: pace.tokens_per_second,
                tags.TOKENS_PER_SECOND_PER_DEVICE: pace.tokens_per_second_per_device,
                tags.SECONDS_PER_STEP: pace.seconds_per_step,
                tags.SKIPPED_STEPS: self._train_step.guard.skipped,
                **cost_points(self._clock.window(), groups),
                **utilisation_points(
                    pace.tokens_per_second_per_device, self._shape, self._train.seq_length
                ),
                **objective.points(),
            },
        )
        line = format_step(
            step,
            self._train.train_iters,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=pace.tokens_per_second,
            eta_seconds=self._meter.eta(self._train.train_iters - step),
        )
        lines = [line]
        if terms:
            weights = objective.weights_at(step - 1)
            lines.append(format_terms({name: (terms[name], weights[name]) for name in terms}))
        further = objective.line()
        logger.info("\n".join(lines if further is None else [*lines, further]))
        return True


def mean_losses(
    window: Sequence[SequenceLosses], names: Sequence[str], groups: ParallelGroups
) -> tuple[float, dict[str, float]]:
    """Return the mean cross entropy over the counted tokens of steps, nats, and the mean of each
    further term of the loss. Collective over the replica's model group and the data group.

    Terms are measured by all tensor ranks of a last stage alike. One that forgot to sum over their
    slices would go into every gradient unseen, so their copies are compared.

    Args:
        window: losses of the steps' microbatches, on the last stage.
        names: of the further terms, equal on every rank.
        groups: where this rank stands.

    Raises:
        RuntimeError: on every rank: tensor ranks measured another term than each other.
    """
    total = torch.zeros(2 + len(names), dtype=torch.float64, device=device.device())
    for losses in window:
        total[0] += losses.sums.double().sum()
        total[1] += losses.counts.double().sum()
        for place, name in enumerate(names, start=2):
            total[place] += losses.terms[name].double().sum()
    apart = torch.zeros_like(total)
    if names and groups.tensor_size > 1:
        ends = torch.cat([total, -total])
        most, least = flat_all_reduce([ends], groups.tensor, dist.ReduceOp.MAX)[0].chunk(2)
        # `least` is that of -total; both are equal on the ranks, so that none raises alone
        scale = torch.maximum(most.abs(), least.abs())
        is_same = (most + least).abs() <= _SAME_TERM * scale
        apart = (~(is_same | most.isnan())).double()
    for group in (groups.pipeline, groups.data):
        total, apart = flat_all_reduce([total, apart], group)
    for name, differs in zip(names, apart[2:].tolist()):
        if differs:
            raise RuntimeError(
                f"tensor ranks measured different values of the term {name} of the loss: it is not "
                f"summed over their slices of the vocabulary; please report this"
            )
    loss, *terms = (total[[0, *range(2, len(total))]] / total[1]).tolist()  # NaN without tokens
    return loss, dict(zip(names, terms))


def utilisation_points(
    tokens_per_second_per_device: float, shape: ModelShape, seq_length: int
) -> dict[str, float]:
    """Return how much of the device's peak the model's arithmetic takes, by tag.

    Nothing is returned on a device whose peak is not known, a CPU among them.

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
    """Return time by part, mean over ranks, and memory of the rank that has most, by tag.

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
