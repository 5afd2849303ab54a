"""Structured pruning: cross entropy under sampled masks, drawn to the target by a Lagrangian."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megashear.checkpoint.details import MASK_EXTENTS, MASK_OPTIMIZER_STEPS
from megashear.checkpoint.store import MaskState
from megashear.config import Constraint, MaskConfig, OptimizerConfig
from megashear.data.batch import MicroBatch
from megashear.masks.census import GateSides, take_census, target_sizes
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.gates import scores
from megashear.masks.kinds import HIDDEN, KINDS
from megashear.masks.mask_set import MaskSet, exact_gates, expected_gates
from megashear.masks.optimizer import MaskOptimizer
from megashear.masks.projection import project
from megashear.masks.targets import target_units, whole_parts
from megashear.models.binding import MaskBinding
from megashear.models.kept import KeptUnits
from megashear.models.llama import own_layers
from megashear.models.parts import own_parts
from megashear.monitor import tags
from megashear.monitor.charts import Charts, mask_charts
from megashear.monitor.console import format_masks
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.evaluations import Evaluation
from megashear.train.objectives import Objective
from megashear.train.schedule import ForwardPass, SequenceLosses, run_schedule
from megashear.train.survey import MaskSurvey, SurveyOfMasks
from megashear.train.terms import LossTerm

EXPECTED, EXACT, RELAXED = "expected", "exact", "relaxed"
"""Modes of an evaluation while masks are learned: as many gates closed as the masks expect, as
many as the target wants, and gates sampled as in training."""


LAGRANGIAN: Constraint = "lagrangian"
"""The constraint that is a penalty; without it masks are projected."""
MASKS = "masks"
"""Name of the norm of the gradients of log_alpha and multipliers."""
NO_STEP = -1
"""Step of the noise of relaxed masks in evaluations; no training step draws it."""


@dataclass(frozen=True, kw_only=True)
class MaskMetrics:
    """Numbers of masks and constraint in a step."""

    penalty: float | None
    """What the constraint added to the loss; None without a Lagrangian."""
    grad_norm: float
    """Gradient norm of log_alpha and multipliers together, before clipping."""
    learning_rate: float
    """Learning rate of log_alpha and multipliers."""
    expected: dict[str, float] = field(default_factory=dict)
    """Expected sparsity by kind, mean over rows."""
    target: dict[str, float] = field(default_factory=dict)
    """Target sparsity of this step by kind."""
    lambda1: dict[str, float] = field(default_factory=dict)
    """Linear multiplier by kind; empty without a Lagrangian, like ``lambda2``."""
    lambda2: dict[str, float] = field(default_factory=dict)
    """Quadratic multiplier by kind."""


class StructuredPruning(Objective):
    """Cross entropy under sampled masks, plus the Lagrangian that draws them to the target.

    Args:
        chunks: this rank's masked chunks, wrapped for data parallelism.
        groups: where this rank stands.
        source: shape of the model.
        target: shape to end with.
        config: warm-up, rates, noise streams.
        seed: of the noise.
        global_batch_size: sequences per step, over all replicas.
        sequence_parallel: see MaskBinding.
        adam: betas, epsilon and largest gradient norm of the masks' Adam, as for the weights; the
            defaults of the flags unless given.
        terms: of the loss, besides the Lagrangian; the cross entropy unless given.

    Raises:
        ValueError: no masks lead from source to target.
    """

    stage = "prune"

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        groups: ParallelGroups,
        *,
        source: ModelShape,
        target: ModelShape,
        config: MaskConfig,
        seed: int,
        global_batch_size: int,
        sequence_parallel: bool,
        adam: OptimizerConfig | None = None,
        terms: Sequence[LossTerm] | None = None,
    ) -> None:
        super().__init__(chunks, terms=terms)
        self.source, self.target = source, target
        self.config = config
        self.seed = seed
        self.global_batch_size = global_batch_size
        adam = adam or OptimizerConfig()
        self.clip_grad = adam.clip_grad
        self.targets = target_units(source, target)
        parts = own_parts(whole_parts(source, target), own_layers(chunks), groups)
        self.masks = MaskSet(parts)
        self.constraint = SparsityConstraint(
            parts,
            self.targets,
            warmup_steps=config.sparsity_warmup_iters,
            lambda2_max=config.lambda2_max,
            force=config.force_lambda2_max,
        )
        self.optimizer = MaskOptimizer(
            self.masks,
            self.constraint,
            betas=(adam.adam_beta1, adam.adam_beta2),
            eps=adam.adam_eps,
            ascend=config.constraint == LAGRANGIAN,
        )
        self.sides = GateSides(parts)
        self.binding = MaskBinding(
            chunks, self.masks, source, groups, sequence_parallel=sequence_parallel
        )
        self._penalty: Tensor | None = None
        self._closed: dict[str, Tensor] = {}
        self._norm, self._scale = 0.0, 1.0
        self.metrics: MaskMetrics | None = None
        """Of the last step."""

    def forward_backward(self, batches: Sequence[MicroBatch], step: int) -> list[SequenceLosses]:
        """Add the gradients of weights, log_alpha and multipliers. Collective over the world.

        Raises:
            ValueError: on every rank, if the masks leave no hidden dimension open.
        """
        streams = [self.stream_of(batch) for batch in batches]
        kinds = self._kinds(streams)
        gates = self._sample(step, kinds)
        self.optimizer.zero_grad()
        terms = self.terms_of(batches, step)  # of the source itself: no masks are bound yet
        self.binding.bind({stream: gates[stream] for stream in sorted(set(streams))}, streams)
        losses = run_schedule(
            self.chunks,
            batches,
            forward_only=False,
            streams=streams,
            select=self.binding.select,
            terms=terms,
        )
        # A GPU still works off what the schedule launched, and the gates' gradients make the host
        # wait for it: the host does before them what does not need them.
        self.masks.draw_ahead(seed=self.seed, step=step + 1, kinds=kinds)
        own = self.masks.closed_sums()
        self.binding.backward()
        self.binding.release()
        self._closed = self.binding.whole_sums(own)
        if self.config.constraint == LAGRANGIAN:
            # after the mean over replicas, who all add the same penalty
            self._penalty = self.constraint.penalty(own, self._closed, step)
            self._penalty.backward()
        return losses

    def _kinds(self, own: Collection[int]) -> dict[int, Collection[str]]:
        """Return the kinds of mask that a step samples, by noise stream of the global batch."""
        # hidden of other replicas' streams too: a rank that raised for its own would be alone
        return {
            stream: KINDS if stream in own else (HIDDEN,)
            for stream in range(self.config.mask_noise_streams)
        }

    def _sample(
        self, step: int, kinds: Mapping[int, Collection[str]]
    ) -> dict[int, dict[str, Tensor]]:
        gates = {}
        for stream, wanted in kinds.items():
            gates[stream] = self.masks.sample(
                seed=self.seed, step=step, stream=stream, kinds=wanted
            )
            whose = f"step {step + 1}: every hidden gate of noise stream {stream}"
            _check_hidden(gates[stream], whose)
        return gates

    def stream_of(self, batch: MicroBatch) -> int:
        """Noise stream of a microbatch: sample i of B belongs to stream i K // B."""
        streams = batch.positions * self.config.mask_noise_streams // self.global_batch_size
        assert bool((streams == streams[0]).all()), "a microbatch lies inside one stream"
        return int(streams[0])

    def norms(self) -> dict[str, float]:
        """Return the norm of the gradients of log_alpha and multipliers together, before clipping.

        Collective over the replica's model group and the pipeline group; once a step.
        """
        self._norm, self._scale = self.binding.clip(self.optimizer, self.clip_grad)
        return {MASKS: self._norm}

    def update(self, step: int, schedule_fraction: float, *, skip: bool) -> None:
        """Step log_alpha and the multipliers, clipped by what `norms` found, and project.

        Collective over the replica's model group and the pipeline group.

        Args:
            step: from 0.
            schedule_fraction: the weights' rate over its peak, this step.
            skip: leave them where they are.
        """
        lr = self.config.mask_lr * schedule_fraction
        self.metrics = MaskMetrics(
            penalty=None if self._penalty is None else self._penalty.item(),
            grad_norm=self._norm,
            learning_rate=lr,
            expected=self.constraint.expected_sparsity(self._closed),
            target=self.constraint.target_at(step),
            lambda1=self._values(self.constraint.lambda1),
            lambda2=self._values(self.constraint.lambda2),
        )
        if not skip:
            self.optimizer.step(lr, grad_scale=self._scale)
            if self.config.constraint != LAGRANGIAN:
                project(self.masks, self.constraint.target_at(step + 1), self.binding.whole_sums)

    def _values(self, multipliers: Mapping[str, Tensor]) -> dict[str, float]:
        if self._penalty is None:
            return {}
        return {kind: value.item() for kind, value in multipliers.items()}

    def points(self) -> dict[str, float]:
        """Return where masks and constraint stood in the last step, by tag."""
        now = self.metrics
        if now is None:
            return {}
        points = {
            tags.MASK_GRAD_NORM: now.grad_norm,
            tags.MASK_LEARNING_RATE: now.learning_rate,
        }
        if now.penalty is not None:
            points[tags.PENALTY] = now.penalty
        for kind, expected in now.expected.items():
            points[tags.expected_sparsity(kind)] = expected
            points[tags.target_sparsity(kind)] = now.target[kind]
        points |= {tags.linear_multiplier(kind): value for kind, value in now.lambda1.items()}
        points |= {tags.quadratic_multiplier(kind): value for kind, value in now.lambda2.items()}
        return points

    def line(self) -> str | None:
        """Return a line on penalty and sparsity."""
        now = self.metrics
        if now is None:
            return None
        sparsity = {kind: (value, now.target[kind]) for kind, value in now.expected.items()}
        return format_masks(now.penalty, sparsity)

    def charts(self) -> Charts:
        """Return the charts of masks."""
        return mask_charts(list(self.masks.parts), multipliers=self.config.constraint == LAGRANGIAN)

    def modes(self) -> list[str]:
        """Return the modes of :func:`modes_of_evaluation`."""
        return modes_of_evaluation(self.config)

    @contextlib.contextmanager
    def evaluating(self, mode: str) -> Iterator[ForwardPass]:
        """Bind the gates of ``mode``, and give what evaluates the model under them.

        Collective over the replica's model group.
        """
        self.binding.bind({0: self._gates_of(mode)})
        try:
            yield ForwardPass(chunks=self.chunks, select=self.binding.select)
        finally:
            self.binding.release()

    def _gates_of(self, mode: str) -> dict[str, Tensor]:
        if mode == RELAXED:
            # one draw for the whole run, so that what moves between evaluations is the masks
            gates = self.masks.sample(seed=self.seed, step=NO_STEP, stream=0)
            _check_hidden(gates, "evaluation under relaxed masks: every hidden gate")
            return {kind: z.detach() for kind, z in gates.items()}
        whole = self.binding.gather_log_alpha()
        found = exact_gates(whole, self.targets) if mode == EXACT else expected_gates(whole)
        return self.binding.slice_gates(found)

    def mode_points(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the mean loss under exact masks, how far it is above that under expected ones, and
        the mean loss under relaxed masks, by tag."""
        points = {
            tags.EXACT_MEAN_LOSS: means[EXACT],
            tags.DISCRETISATION_GAP: means[EXACT] - means[EXPECTED],
        }
        if RELAXED in means:
            points[tags.RELAXED_MEAN_LOSS] = means[RELAXED]
        return points

    def label(self, mode: str) -> str:
        """Return the masks that ``mode`` binds."""
        return f"{mode} masks"

    def evaluations(self, interval: int) -> list[Evaluation]:
        """Return the survey of masks."""
        return [SurveyOfMasks(self.survey, self.masks.parts, self.targets, self.target, interval)]

    def state(self) -> MaskState:
        """Return masks, multipliers, their optimizer, and on which side each gate stood."""
        return MaskState(
            masks=self.masks,
            constraint=self.constraint,
            optimizer=self.optimizer,
            sides=self.sides,
        )

    def details(self) -> dict[str, Any]:
        """Return the steps of the masks' optimizer, and the extents of every kind's mask."""
        return {
            MASK_OPTIMIZER_STEPS: self.optimizer.num_steps,
            MASK_EXTENTS: {kind: list(part.extents) for kind, part in self.masks.parts.items()},
        }

    def planned(self) -> dict[str, Any]:
        """Return the kinds of mask and the number of noise streams, and what terms add."""
        return super().planned() | {
            "masks": frozenset(self.masks.parts),
            "noise_streams": self.config.mask_noise_streams,
        }

    def survey(self, step: int) -> MaskSurvey:
        """Look at all masks, and remember on which side each gate stands.

        Collective over the replica's model group and the pipeline group.

        Args:
            step: steps done.
        """
        whole = self.binding.gather_log_alpha()
        gates = expected_gates(whole)
        own = self.sides.changed(self.binding.slice_gates(gates))
        changed = self.binding.whole_sums(own)
        chances = {kind: scores(log_alpha) for kind, log_alpha in whole.items()}
        return MaskSurvey(
            log_alpha=whole,
            kept=KeptUnits.of(gates, self.source),
            chances=KeptUnits.expected(chances, self.source),
            census=take_census(whole, self.targets),
            target_sizes=target_sizes(self.constraint, max(0, step - 1)),
            changed={kind: round(float(rows.sum())) for kind, rows in changed.items()},
        )

    def replicated(self) -> dict[str, Tensor]:
        """Return what every rank has a copy of: multipliers, and log_alpha that is not divided."""
        copies = dict(self.constraint.state_dict())
        for kind, log_alpha in self.masks.log_alpha.items():
            if not KINDS[kind].split_over_tensor and not KINDS[kind].split_over_pipeline:
                copies[f"log_alpha of {kind}"] = log_alpha.detach()
        return copies


def _check_hidden(gates: Mapping[str, Tensor], whose: str) -> None:
    if HIDDEN in gates and not gates[HIDDEN].any():
        raise ValueError(
            f"{whose} is closed, so no norm is defined; raise --target-hidden-size or lower "
            f"--mask-lr"
        )


def modes_of_evaluation(masks: MaskConfig) -> list[str]:
    """List the masks that an evaluation binds one after the other: expected-size ones, which steer
    the mixture, exact-size ones, which are cut, and on request those that training samples."""
    return [EXPECTED, EXACT, *([RELAXED] if masks.eval_relaxed_masks else [])]
