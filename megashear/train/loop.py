"""The loop: steps, evaluations that move the mixture, log lines, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megashear.checkpoint.description import (
    ENVIRONMENT,
    HELD_OUT_ERROR,
    HELD_OUT_LOSS,
    Description,
    iteration_name,
    read_description,
)
from megashear.checkpoint.finite import not_finite_anywhere
from megashear.checkpoint.saver import Saved, Saver
from megashear.checkpoint.store import (
    MaskState,
    amend_description,
    checkpoint_bytes,
    run_state,
    weight_not_finite,
)
from megashear.config import OptimizerConfig, TrainConfig
from megashear.data.held_out import HeldOutSet
from megashear.data.loader import MixtureLoader
from megashear.data.manifest import DataManifest
from megashear.data.reweight import Reweighting
from megashear.data.shares import Vector
from megashear.models.llama import gather_weights, unwrap
from megashear.monitor import tags
from megashear.monitor.charts import charts
from megashear.monitor.console import format_evaluation, format_step, progress
from megashear.monitor.notes import notes
from megashear.monitor.sinks import Sink, Sinks, open_sinks
from megashear.monitor.step_clock import StepClock
from megashear.monitor.throughput import Throughput
from megashear.parallel import device
from megashear.parallel.agree import (
    assert_replicated,
    assert_same_bits,
    flat_all_reduce,
    gather_objects,
    raise_together,
)
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.watchdog import Watchdog
from megashear.shape import ModelShape
from megashear.train.evaluate import DomainLosses, evaluate_domains
from megashear.train.guard import StepGuard
from megashear.train.inputs import EVAL_SEQUENCES
from megashear.train.objectives import (
    EXACT,
    RELAXED,
    LanguageModelling,
    MaskMetrics,
    StructuredPruning,
)
from megashear.train.result import RunResult
from megashear.train.schedule import SequenceLosses
from megashear.train.step import WEIGHTS, Step, TrainStep
from megashear.train.stops import (
    DIVERGED,
    DivergedError,
    Stops,
    exit_status,
)
from megashear.train.watch import cost_points, show_masks, survey_points, utilisation_points

logger = logging.getLogger(__name__)

EVALUATION, CHECKPOINT = tags.PAUSES
DATA, _, COMMUNICATION, _ = tags.STEP_PARTS

GUARD = "step_guard"
"""Key of the guard's state in a checkpoint's details."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The domains of a run."""

    manifest: DataManifest
    loader: MixtureLoader
    held_out: Sequence[HeldOutSet]
    references: Vector | None
    """Reference loss of each domain, where one is known."""
    reweighting: Reweighting | None
    """Moves the weights after evaluations; None leaves them alone."""
    phase_changes: Mapping[int, Vector]
    """Weights by the sample from which a phase has them, for the log; the mixture has them too."""
    eval_sequences: int
    """Held-out sequences per domain in an evaluation within the run."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything one rank needs to train; :meth:`run` does it. Methods are collective over the
    world."""

    shape: ModelShape
    chunks: Sequence[DistributedDataParallel]
    objective: LanguageModelling
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    data: RunData
    groups: ParallelGroups
    train: TrainConfig
    optimizer_config: OptimizerConfig
    details: dict[str, Any]
    """Plain values that every checkpoint carries: the run, the target shape."""
    token_ids: dict[str, Any]
    """Special tokens as the source's config.json has them."""
    tokenizer: Path
    """Directory of the tokenizer's files, which every checkpoint carries."""
    guard: StepGuard
    """Which steps are taken."""
    watchdog: Watchdog
    """Told of every step, evaluation and save."""
    source: Path | None = None
    """Iteration that the run starts from, or goes on from."""
    bf16: bool = False
    """Whether checkpoints have float32 masters too."""
    clock: StepClock = field(default_factory=lambda: StepClock(synchronize=device.synchronize))
    """What the time of a step goes to."""

    def run(self, first_step: int) -> RunResult:
        """Train from ``first_step`` (steps done) to the end.

        Returns:
            What was reached.

        Raises:
            DivergedError: on every rank, when too many steps are skipped, or weights or the last
                losses are not finite.
            RuntimeError: on every rank, when copies drift apart.
            SaveError: on every rank, when a checkpoint cannot be written.
        """
        stops = Stops(self.train)
        with self.watchdog, stops.listening(), device.waiting_inside(self._communication):
            return self._run(first_step, stops)

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """Makes one step."""
        return TrainStep(
            chunks=self.chunks,
            objective=self.objective,
            optimizer=self.optimizer,
            schedule=self.schedule,
            peak_lr=self.optimizer_config.lr,
            groups=self.groups,
            guard=self.guard,
        )

    def _communication(self) -> contextlib.AbstractContextManager[None]:
        return self.clock.part(COMMUNICATION)

    def _sinks(self, first_step: int) -> Sinks:
        if self.groups.rank != 0:
            return Sinks()
        objective = self.objective
        prunes = isinstance(objective, StructuredPruning)
        layout = charts(
            kinds=list(objective.masks.parts) if isinstance(objective, StructuredPruning) else [],
            domains=self.data.manifest.names,
            has_references=self.data.references is not None,
        )
        # steps done are the x axis: this process writes from the next one on
        run = self.details.get("run", {})
        texts = notes(run, self.details.get(ENVIRONMENT, {}), prunes=prunes)
        return open_sinks(self.train, first_step=first_step, config=run, layout=layout, texts=texts)

    def _run(self, first_step: int, stops: Stops) -> RunResult:
        saver = self._saver(first_step)
        if saver is not None and first_step < self.train.train_iters:
            saver.check(checkpoint_bytes(self.shape, bf16=self.bf16))
        with raise_together():
            sink = self._sinks(first_step)
        # points that explain a failure are written before it ends the run
        with contextlib.closing(sink):
            return self._train_and_evaluate(first_step, stops, saver, sink)

    def _train_and_evaluate(
        self, first_step: int, stops: Stops, saver: Saver | None, sink: Sinks
    ) -> RunResult:
        train, last = self.train, self.train.train_iters
        meter = Throughput(num_devices=self.groups.world_size)
        window: list[SequenceLosses] = []
        saved: Path | None = None
        saved_step = first_step
        found: dict[str, DomainLosses] = {}
        step, stop, request = first_step, None, 0.0
        skipped_last = 0
        mixture = self.data.loader.mixture
        if step == 0:  # who continues a run has written them
            self._log_mixture(step, sink)
        shares, shares_at = mixture.shares.tolist(), step
        # asked before each step, so that all ranks end together where text runs out
        ran_out = self.data.loader.ran_out() if step < last else None
        with progress(
            last, rank=self.groups.rank, initial=first_step, desc=self.objective.stage
        ) as bar:
            while step < last and ran_out is None:
                rate = self.schedule.get_lr({})
                drawn = self.data.loader.consumed_samples
                self.watchdog.beat(f"step {step + 1}")
                is_logged = (step + 1) % train.log_interval == 0 or step + 1 == last
                # on a GPU parts are told apart by waiting for it, which is done seldom
                with self.clock.step(is_timed=is_logged or not device.has_cuda()):
                    losses, norms, request, skipped = self._step(step, stops.request())
                if skipped is not None and (bad := weight_not_finite(self.chunks)) is not None:
                    # loaded weights were finite, and steps cannot mend one: nothing to wait for
                    raise self._diverged(
                        f"step {step + 1}: {skipped}. The weight {bad} since the update of step "
                        f"{step + 1 - self.guard.in_a_row}",
                        step + 1,
                        saver,
                    )
                if skipped is not None and self.guard.gives_up:
                    raise self._diverged(
                        f"step {step + 1}: {skipped}; --max-skipped-steps "
                        f"{train.max_skipped_steps} in a row are used up",
                        step + 1,
                        saver,
                    )
                self._tell_phases(step, range(drawn, self.data.loader.consumed_samples))
                window += losses
                step += 1
                bar.update()
                meter.step(train.global_batch_size * train.seq_length)
                if is_logged:
                    self._log(step, window, rate, norms, meter, sink)
                    window = []
                if self._evaluates_after(step):
                    device.synchronize()  # or steps still in flight would count as evaluation
                    with meter.pause(EVALUATION):
                        self._reweight(step, self.evaluate(step, sink, whole=False))
                    sink.scalars(step, {tags.part_share(EVALUATION): meter.share(EVALUATION)})
                # after all that moves them: a phase, text that ran out, an evaluation
                if is_logged or mixture.shares.tolist() != shares:
                    self._log_mixture(step, sink)
                    shares, shares_at = mixture.shares.tolist(), step
                stop = stops.reason(request, step)
                due = bool(train.save_interval) and step % train.save_interval == 0
                if saver is not None:
                    self._report(saver.poll(), sink)
                    saver.prove(self._newest_good(step))
                if saver is not None and step < last and (due or stop):
                    with meter.pause(CHECKPOINT):
                        saved = self.save(step, saver, sink, wait=stop is not None)
                    sink.scalars(step, {tags.part_share(CHECKPOINT): meter.share(CHECKPOINT)})
                    saved_step = step
                if stop is not None:
                    logger.info("step %d: stopping, for %s", step, stop)
                    break
                ran_out = self.data.loader.ran_out() if step < last else None
        self.data.loader.close()
        share = meter.share(EVALUATION)
        if ran_out is not None:
            logger.warning(
                "step %d: the run ends %d steps early: %s. Go on with --resume and another "
                "--data-exhausted, or with more text in a new run",
                *(step, last - step, ran_out),
            )
            if window:
                self._log(step, window, rate, norms, meter, sink)
                if shares_at != step:
                    self._log_mixture(step, sink)
        if step == last or ran_out is not None:
            # before the long evaluation, which a time limit may cut off
            if saver is not None and step > saved_step:
                saved = self.save(step, saver, sink, wait=True)
            elif saver is not None and saved is not None:
                self._report(saver.wait(), sink)  # text ran out where a save was due
            elif self._is_ours(self.source):
                saved = self.source  # killed before the evaluation that comes now
            found = self.evaluate(step, sink, whole=True)
            self._check_losses(found, step, saver)
            if saver is not None:
                saver.prove(self._newest_good(step) if self.guard.in_a_row else step)
            if saved is not None:
                self._amend(saved, found)
            # whoever goes on behind this run must hear of a signal that came meanwhile
            _, request = self.train_step.agree([], stops.request())
            stop = stops.reason(request, None)
            if saver is not None:
                saver.finish()
            skipped_last = self.guard.not_finite
        return RunResult(
            step=step,
            stopped=stop,
            exit_status=exit_status(request) or (DIVERGED if skipped_last else 0),
            skipped_last=skipped_last,
            held_out={mode: losses.losses for mode, losses in found.items()},
            held_out_errors={mode: losses.known_errors for mode, losses in found.items()},
            eval_sequences=self.data.eval_sequences,
            evaluation_share=share,
            checkpoint=saved,
            tensorboard=train.tensorboard_dir,
            ended_early=ran_out,
        )

    def evaluate(self, step: int, sink: Sink, *, whole: bool) -> dict[str, DomainLosses]:
        """Held-out losses in each of the objective's modes.

        Args:
            step: steps done.
            sink: where points go.
            whole: read all held-out sequences, not the run's subsample.
        """
        gather_weights(self.chunks)
        points: dict[str, float] = {}
        mixture = self.data.loader.mixture
        copies = {"domain weights": mixture.weights, "samples owed": mixture.owed}
        assert_replicated(
            {name: torch.from_numpy(values) for name, values in copies.items()}, f"step {step}"
        )
        self._check_copies(step)
        if isinstance(self.objective, StructuredPruning):
            assert_replicated(self.objective.replicated_tensors(), f"step {step}")
            if not (whole and self._evaluates_after(step)):  # else it was written at this step
                points |= self._look_at_masks(self.objective, step, sink)
        names = self.data.manifest.names
        most = max(map(len, self.data.held_out)) if whole else self.data.eval_sequences
        # one seed for the whole run, so that losses of different steps compare
        chosen = [part.subsample(most, self.train.seed) for part in self.data.held_out]
        found = {
            mode: evaluate_domains(
                self.objective,
                mode,
                names,
                self.data.held_out,
                chosen,
                self.groups,
                micro_batch_size=self.train.eval_micro_batch_size or self.train.micro_batch_size,
                step=step,
                beat=self.watchdog.beat,
            )
            for mode in self.objective.evaluation_modes()
        }
        first = next(iter(found.values()))
        if whole:
            # tags of their own: other text than the curve's would put a step at its end
            points |= {tags.full_loss(name): loss for name, loss in first.losses.items()}
            points[tags.FULL_MEAN_LOSS] = first.mean
        else:
            points |= {tags.eval_loss(name): loss for name, loss in first.losses.items()}
            points[tags.EVAL_MEAN_LOSS] = first.mean
            points |= {tags.eval_error(name): error for name, error in first.errors.items()}
            points[tags.EVAL_MEAN_ERROR] = first.mean_error
            for name, reference in zip(names, self._references_or_nothing()):
                points[tags.eval_excess(name)] = first.losses[name] - reference
            if EXACT in found:
                points[tags.EXACT_MEAN_LOSS] = found[EXACT].mean
                points[tags.DISCRETISATION_GAP] = found[EXACT].mean - first.mean
            if RELAXED in found:
                points[tags.RELAXED_MEAN_LOSS] = found[RELAXED].mean
        if whole:
            # a run that is killed after its last save evaluates again
            sink.replace(step, points)
        else:
            sink.scalars(step, points)
        for mode, losses in found.items():
            what = " [all held-out text]" if whole else ""
            what += "" if mode == "loss" else f" [{mode} masks]"
            line = format_evaluation(step, losses.losses, errors=losses.errors)
            logger.info("%s%s", line, what)
        return found

    def _look_at_masks(
        self, objective: StructuredPruning, step: int, sink: Sink
    ) -> dict[str, float]:
        survey = objective.survey(step)
        show_masks(sink, step, survey, objective.masks.parts, objective.targets)
        return survey_points(survey, objective.target)

    def _check_copies(self, step: int) -> None:
        """Hold the weights of replicas, and what tensor ranks have copies of, to each other."""
        weights = {
            f"chunk {number} {name}": parameter
            for number, chunk in enumerate(self.chunks)
            for name, parameter in unwrap(chunk).named_parameters()
        }
        assert_same_bits(weights, f"step {step}", self.groups.data, "data-parallel")
        copies = {
            name: parameter
            for name, parameter in weights.items()
            if not getattr(parameter, "tensor_model_parallel", False)
        }
        assert_same_bits(copies, f"step {step}", self.groups.tensor, "tensor-parallel")

    def save(self, step: int, saver: Saver, sink: Sink, *, wait: bool = False) -> Path:
        """Save a checkpoint of ``step`` steps done.

        Args:
            step: steps done.
            saver: writes it.
            sink: where its times go.
            wait: until it is visible, even with --async-save.

        Returns:
            Where it lies, or will.

        Raises:
            DivergedError: on every rank: a number of it is not finite, on some rank.
        """
        gather_weights(self.chunks)
        # who goes on from this checkpoint writes no point up to it again
        sink.flush()
        details = self.details | {
            "scheduler": self.schedule.state_dict(),
            "loader": self.data.loader.state_dict(),
            "consumed_samples": self.data.loader.consumed_samples,
            EVAL_SEQUENCES: self.data.eval_sequences,
            GUARD: self.guard.state_dict(),
        }
        if self.data.reweighting is not None:
            details["reweighting"] = self.data.reweighting.state_dict()
        masks = mask_state(self.objective)
        if masks is not None:
            details["mask_optimizer_steps"] = masks.optimizer.num_steps
            details["mask_extents"] = {
                kind: list(part.extents) for kind, part in masks.masks.parts.items()
            }
        description = Description(
            shape=self.shape,
            iteration=step,
            stage=self.objective.stage,
            token_ids=self.token_ids,
            details=details,
        )
        state = run_state(description, self.chunks, self.optimizer, self.groups, masks=masks)
        if (spoiled := not_finite_anywhere(state)) is not None:
            raise self._diverged(f"step {step} is not saved: {spoiled}", step, saver)
        self._report(saver.save(description, state, tokenizer=self.tokenizer), sink)
        if wait:
            self._report(saver.wait(), sink)
        return saver.root / iteration_name(step)

    def _saver(self, first_step: int) -> Saver | None:
        if self.train.save is None:
            return None
        return Saver(
            self.train.save,
            self.groups,
            background=self.train.async_save,
            keep=self.train.keep,
            protected=self.source,
            resumed=first_step if self._is_ours(self.source) else None,
            beat=self.watchdog.beat,
        )

    def _report(self, finished: Sequence[Saved], sink: Sink) -> None:
        for saved in finished:
            sink.scalars(
                saved.iteration,
                {tags.SAVE_SECONDS: saved.seconds, tags.SAVE_STALL_SECONDS: saved.stall_seconds},
            )
            logger.info(
                "step %d: saved %s, %.3f GB in %.1f s, training stood still for %.1f s",
                *(saved.iteration, saved.directory, saved.num_bytes / 1e9),
                *(saved.seconds, saved.stall_seconds),
            )

    def _is_ours(self, checkpoint: Path | None) -> bool:
        """Whether it is one of --save."""
        save = self.train.save
        return (
            save is not None
            and checkpoint is not None
            and checkpoint.resolve().parent == Path(save).resolve()
        )

    def _amend(self, saved: Path, found: dict[str, DomainLosses]) -> None:
        """Add the last losses to the last checkpoint, unless a run has done so before."""
        details = {
            HELD_OUT_LOSS: {mode: domains.losses for mode, domains in found.items()},
            HELD_OUT_ERROR: {mode: domains.known_errors for mode, domains in found.items()},
        }
        with raise_together():
            done = HELD_OUT_LOSS in read_description(saved).details
        if not any(gather_objects(done)):
            amend_description(saved, details, self.groups)

    def _evaluates_after(self, step: int) -> bool:
        return bool(self.train.eval_interval) and step % self.train.eval_interval == 0

    def _step(self, step: int, asked: float) -> Step:
        drawn = self.data.loader.mixture.drawn.copy()
        with self.clock.part(DATA):
            batches = self.data.loader.next_batch()
        taken = self.train_step(batches, step, asked=asked, part=self.clock.part)
        if taken.skipped is not None:
            taken = taken._replace(skipped=self._skipped(step, taken.skipped, drawn))
        return taken

    def _skipped(self, step: int, reason: str, drawn: npt.NDArray[np.int64]) -> str:
        after, domains = self.data.loader.mixture.drawn, self.data.loader.domains
        samples = ", ".join(
            f"{domain.name} {first} to {last - 1}"
            for domain, first, last in zip(domains, drawn.tolist(), after.tolist())
            if last > first
        )
        logger.warning(
            "step %d is skipped (%d in a row, %d in all): %s; its samples: %s",
            *(step + 1, self.guard.in_a_row, self.guard.skipped, reason, samples),
        )
        return f"{reason}; samples of this step: {samples}"

    def _newest_good(self, step: int) -> int:
        """Return the newest iteration whose weights a step was taken from, after ``step`` steps."""
        return step - self.guard.in_a_row - 1

    def _check_losses(
        self, found: Mapping[str, DomainLosses], step: int, saver: Saver | None
    ) -> None:
        """Refuse to end well with losses that are not finite; they are equal on all ranks."""
        for mode, domains in found.items():
            for name, loss in domains.losses.items():
                if not math.isfinite(loss):
                    what = f"step {step}: the held-out loss of {name} is {loss}"
                    what += "" if mode == "loss" else f" under {mode} masks"
                    raise self._diverged(what, step, saver)

    def _diverged(self, what: str, step: int, saver: Saver | None) -> DivergedError:
        """Name the last good checkpoint the latest, and return the error that ends the run.

        Collective over the world.
        """
        way_out = "lower --lr, or look at the text of these steps"
        if saver is None:
            return DivergedError(f"{what}. Nothing was saved, for --save is not given: {way_out}")
        saver.wait()
        good = saver.go_back(self._newest_good(step))
        if good is None:
            return DivergedError(
                f"{what}. No checkpoint in --save {saver.root} is known to be good: {way_out}, and "
                f"try --resume, or start anew with another --save"
            )
        return DivergedError(
            f"{what}. The last checkpoint from before is {good}: {way_out}, and resume from it "
            f"with --resume"
        )

    def _log(
        self,
        step: int,
        window: Sequence[SequenceLosses],
        rate: float,
        norms: Mapping[str, float],
        meter: Throughput,
        sink: Sink,
    ) -> None:
        device.synchronize()
        loss = self._mean_loss(window)
        norm, masks = norms[WEIGHTS], self._mask_metrics()
        pace = meter.window()
        points = {
            tags.LM_LOSS: loss,
            tags.GRAD_NORM: norm,
            tags.LEARNING_RATE: rate,
            tags.TOKENS_PER_SECOND: pace.tokens_per_second,
            tags.TOKENS_PER_SECOND_PER_DEVICE: pace.tokens_per_second_per_device,
            tags.SECONDS_PER_STEP: pace.seconds_per_step,
            tags.SKIPPED_STEPS: self.guard.skipped,
            **cost_points(self.clock.window(), self.groups),
            **utilisation_points(
                pace.tokens_per_second_per_device, self.shape, self.train.seq_length
            ),
        }
        if masks is not None:
            points[tags.PENALTY] = masks.penalty
            points[tags.MASK_GRAD_NORM] = masks.grad_norm
            points[tags.MASK_LEARNING_RATE] = masks.learning_rate
            for kind, expected in masks.expected.items():
                points[tags.expected_sparsity(kind)] = expected
                points[tags.target_sparsity(kind)] = masks.target[kind]
                points[tags.linear_multiplier(kind)] = masks.lambda1[kind]
                points[tags.quadratic_multiplier(kind)] = masks.lambda2[kind]
        sink.scalars(step, points)
        sparsity = (
            None
            if masks is None
            else {kind: (now, masks.target[kind]) for kind, now in masks.expected.items()}
        )
        logger.info(
            format_step(
                step,
                self.train.train_iters,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_second=pace.tokens_per_second,
                eta_seconds=meter.eta(self.train.train_iters - step),
                penalty=None if masks is None else masks.penalty,
                sparsity=sparsity,
            )
        )

    def _mask_metrics(self) -> MaskMetrics | None:
        objective = self.objective
        return objective.metrics if isinstance(objective, StructuredPruning) else None

    def _log_mixture(self, step: int, sink: Sink) -> None:
        """Log what is read from here on, and what was read."""
        mixture = self.data.loader.mixture
        points = {}
        for number, name in enumerate(self.data.manifest.names):
            points[tags.mixture_weight(name)] = float(mixture.shares[number])
            if step:
                drawn = int(mixture.drawn[number])
                points[tags.mixture_share(name)] = drawn / mixture.num_drawn
                epochs = self.data.loader.domains[number].epochs(drawn)
                points[tags.mixture_epoch(name)] = epochs
        sink.scalars(step, points)

    def _mean_loss(self, window: Sequence[SequenceLosses]) -> float:
        total = torch.zeros(2, dtype=torch.float64, device=device.device())
        for losses in window:  # on the last stage
            total[0] += losses.sums.double().sum()
            total[1] += losses.counts.double().sum()
        for group in (self.groups.pipeline, self.groups.data):
            (total,) = flat_all_reduce([total], group)
        return float(total[0] / total[1])

    def _references_or_nothing(self) -> list[float]:
        return [] if self.data.references is None else self.data.references.tolist()

    def _reweight(self, step: int, found: dict[str, DomainLosses]) -> None:
        if self.data.reweighting is None:
            return
        names, mixture = self.data.manifest.names, self.data.loader.mixture
        losses = next(iter(found.values())).losses
        weights = self.data.reweighting(mixture.weights, [losses[name] for name in names])
        mixture.set_weights(weights)
        self._tell_weights(f"step {step}", weights)

    def _tell_phases(self, step: int, samples: range) -> None:
        for sample in sorted(set(samples) & self.data.phase_changes.keys()):
            self._tell_weights(
                f"step {step + 1}: from sample {sample} on", self.data.phase_changes[sample]
            )

    def _tell_weights(self, when: str, weights: Vector) -> None:
        shares = zip(self.data.manifest.names, weights)
        logger.info("%s: domain weights %s", when, " ".join(f"{n} {w:.3f}" for n, w in shares))


def mask_state(objective: LanguageModelling) -> MaskState | None:
    """What a checkpoint keeps of the masks; None outside pruning."""
    if not isinstance(objective, StructuredPruning):
        return None
    return MaskState(
        masks=objective.masks,
        constraint=objective.constraint,
        optimizer=objective.optimizer,
        sides=objective.sides,
    )
