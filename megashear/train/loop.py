"""The loop: steps, evaluations that move the mixture, log lines, checkpoints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megashear.checkpoint.details import ENVIRONMENT, RUN
from megashear.checkpoint.store import weight_not_finite
from megashear.config import TrainConfig
from megashear.models.llama import gather_weights
from megashear.monitor import tags
from megashear.monitor.charts import charts, sections
from megashear.monitor.console import progress
from megashear.monitor.notes import notes
from megashear.monitor.sinks import Sinks, open_sinks
from megashear.monitor.step_clock import StepClock
from megashear.monitor.throughput import Throughput
from megashear.parallel import device
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.watchdog import Watchdog
from megashear.tasks.find import LoadedTasks
from megashear.tokenizer.models import Tokenizer
from megashear.tokenizer.tokenizer_files import end_tokens
from megashear.train.checkpoints import RunCheckpoints
from megashear.train.evaluate import DomainLosses, HeldOutLosses
from megashear.train.evaluations import EqualCopies, Evaluation, Moment, is_due
from megashear.train.mixing import Mixing, RunData
from megashear.train.objectives import Objective
from megashear.train.points import StepLog
from megashear.train.result import RunResult
from megashear.train.run_reader import RunReader
from megashear.train.state import RunState
from megashear.train.step import Step, TrainStep
from megashear.train.stops import DIVERGED, Stops, exit_status
from megashear.train.task_scores import TaskScores
from megashear.train.text_samples import TextSamples

logger = logging.getLogger(__name__)

EVALUATION, CHECKPOINT = tags.PAUSES
DATA, _, COMMUNICATION, _ = tags.STEP_PARTS


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything one rank needs to train; :meth:`run` does it. Collective over the world."""

    train_step: TrainStep
    """Makes one step."""
    state: RunState
    """What checkpoints hold."""
    data: RunData
    """The domains."""
    train: TrainConfig
    """The flags."""
    tokenizer_files: Path | Sequence[Path]
    """The tokenizer's files, or their directory, which every checkpoint carries."""
    tokenizer: Tokenizer | None
    """To ask the model about text; None where nothing is asked."""
    watchdog: Watchdog
    """Is told of every step, evaluation and save."""
    tasks: LoadedTasks | None = None
    """Downstream tasks to ask now and then."""
    source: Path | None = None
    """Iteration that the run starts or resumes from."""
    bf16: bool = False
    """Whether checkpoints have float32 masters too."""
    clock: StepClock = field(default_factory=lambda: StepClock(synchronize=device.synchronize))
    """Knows what the time of a step goes to."""

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.train_step.objective

    @property
    def chunks(self) -> Sequence[DistributedDataParallel]:
        """This rank's model chunks."""
        return self.train_step.chunks

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Of the weights."""
        return self.train_step.optimizer

    @property
    def groups(self) -> ParallelGroups:
        """Where this rank stands."""
        return self.train_step.groups

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
        checkpoints = RunCheckpoints(
            self.state,
            self.train,
            self.train_step.guard,
            tokenizer=self.tokenizer_files,
            source=self.source,
            first_step=first_step,
            watchdog=self.watchdog,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watchdog)
            stack.enter_context(stops.listening())
            stack.enter_context(device.waiting_inside(lambda: self.clock.part(COMMUNICATION)))
            if first_step < self.train.train_iters:
                checkpoints.check(bf16=self.bf16)
            with raise_together():
                sinks = self._sinks(first_step)
            # points that explain a failure are written before it ends the run
            stack.enter_context(contextlib.closing(sinks))
            return _Run(self, first_step, stops, checkpoints, sinks).to_the_end()

    def _sinks(self, first_step: int) -> Sinks:
        if self.groups.rank != 0:
            return Sinks()
        found = charts(
            domains=self.data.manifest.names,
            has_references=self.data.references is not None,
            terms=self.objective.further_terms,
            more=self.objective.charts(),
        )
        # steps done are the x axis: this process writes from the next one on
        run = self.state.facts.get(RUN, {})
        environment = self.state.facts.get(ENVIRONMENT, {})
        texts = notes(run, environment, sections=sections(found))
        return open_sinks(self.train, first_step=first_step, config=run, layout=found, texts=texts)


class _Run:
    """One process's share of a run, from its first step to its last.

    Args:
        trainer: what the run is made of.
        first_step: steps done before.
        stops: knows who asks for an early end.
        checkpoints: saves the run.
        sinks: where points go.
    """

    def __init__(
        self,
        trainer: Trainer,
        first_step: int,
        stops: Stops,
        checkpoints: RunCheckpoints,
        sinks: Sinks,
    ) -> None:
        self.trainer, self.train, self.data = trainer, trainer.train, trainer.data
        self.step, self.last = first_step, trainer.train.train_iters
        self.request = 0.0
        """To stop, as ranks agreed on it after the last step."""
        self.stop: str | None = None
        """Why the run is stopped."""
        self.ran_out: str | None = None
        """Which text ran out."""
        self.stops, self.checkpoints, self.sinks = stops, checkpoints, sinks
        self.groups = trainer.groups
        self.guard = trainer.train_step.guard
        self.meter = Throughput(num_devices=self.groups.world_size)
        self.mixing = Mixing(self.data, sinks)
        self.log = StepLog(
            *(trainer.train_step, trainer.state.shape, self.train),
            *(self.meter, trainer.clock, sinks),
        )
        self.held_out = HeldOutLosses(
            trainer.objective,
            self.data.manifest.names,
            self.data.held_out,
            self.data.references if self.data.references is None else self.data.references.tolist(),
            self.data.eval_sequences,
            self.train,
            self.groups,
            trainer.watchdog.beat,
        )
        interval = self.train.eval_interval
        self.evaluations: list[Evaluation] = [
            EqualCopies(
                *(trainer.chunks, self.data.loader.mixture, trainer.objective.replicated),
                *(self.groups, interval),
            ),
            *trainer.objective.evaluations(interval),
            self.held_out,
        ]
        self.samples: TextSamples | None = None
        if trainer.tokenizer is not None:
            reader = RunReader(
                objective=trainer.objective,
                shape=trainer.state.shape,
                tokenizer=trainer.tokenizer,
                ends=end_tokens(trainer.state.token_ids, trainer.tokenizer),
                train=self.train,
                groups=self.groups,
                beat=trainer.watchdog.beat,
            )
            self.samples = TextSamples(reader, self.data.manifest.names, self.data.held_out)
            self.evaluations.append(self.samples)
            if trainer.tasks is not None:
                self.evaluations.append(TaskScores(reader, trainer.tasks))

    def to_the_end(self) -> RunResult:
        """Train, and evaluate, log and save in between. Collective over the world."""
        self._train()
        self.data.loader.close()
        evaluating = self.meter.share(EVALUATION)
        if self.ran_out is not None:
            self._end_early(self.ran_out)
        ended = self.step == self.last or self.ran_out is not None
        found = self._end() if ended else {}
        skipped = self.guard.not_finite if ended else 0
        return RunResult(
            step=self.step,
            stopped=self.stop,
            exit_status=exit_status(self.request) or (DIVERGED if skipped else 0),
            skipped_last=skipped,
            held_out={mode: losses.losses for mode, losses in found.items()},
            held_out_errors={mode: losses.known_errors for mode, losses in found.items()},
            eval_sequences=self.data.eval_sequences,
            evaluation_share=evaluating,
            checkpoint=self.checkpoints.last,
            tensorboard=self.train.tensorboard_dir,
            ended_early=self.ran_out,
        )

    def _train(self) -> None:
        """Make steps until the last one, a stop, or the end of the text."""
        if self.step == 0:  # a run that is resumed has written them
            self.mixing.log(self.step, always=True)
        stage = self.trainer.objective.stage
        bar = progress(self.last, rank=self.groups.rank, initial=self.step, desc=stage)
        with bar:
            while self.step < self.last and self.stop is None and not self._runs_out():
                self.request = self._train_one_step()
                bar.update()
                self._evaluate_if_due()
                # after all that moves weights: a phase, text that ran out, an evaluation
                self.mixing.log(self.step, always=self._is_logged(self.step))
                self.stop = self.stops.reason(self.request, self.step)
                self._save_if_due(stops=self.stop is not None)
        if self.stop is not None:
            logger.info("step %d: stopping, for %s", self.step, self.stop)

    def _runs_out(self) -> bool:
        """Return whether no text is left for the next step, equal on every rank."""
        self.ran_out = self.data.loader.ran_out()
        return self.ran_out is not None

    def evaluate(self, *, is_end: bool) -> None:
        """Run the evaluations that are due, and write their points.

        Args:
            is_end: whether training has ended.
        """
        moment = Moment(self.step, is_end)
        gather_weights(self.trainer.chunks)
        points: dict[str, float] = {}
        for evaluation in self.evaluations:
            if evaluation.due(moment):
                points |= evaluation.run(moment, self.sinks)
        if is_end:
            # a run that is killed after its last save evaluates again
            self.sinks.replace(self.step, points)
        else:
            self.sinks.scalars(self.step, points)

    def _train_one_step(self) -> float:
        """Make the next step, and log it; return the request to stop that ranks agreed on."""
        trainer, loader = self.trainer, self.data.loader
        rate = trainer.train_step.schedule.get_lr({})
        drawn, drawn_by_domain = loader.consumed_samples, loader.mixture.drawn.copy()
        trainer.watchdog.beat(f"step {self.step + 1}")
        is_logged = self._is_logged(self.step + 1)
        # on a GPU parts are told apart by waiting for it, which is done seldom
        with trainer.clock.step(is_timed=is_logged or not device.has_cuda()):
            with trainer.clock.part(DATA):
                batches = loader.next_batch()
            taken = trainer.train_step(
                batches, self.step, asked=self.stops.request(), part=trainer.clock.part
            )
        if taken.skipped is not None:
            self._skip(taken, self.mixing.samples_since(drawn_by_domain))
        self.mixing.log_phases(self.step, range(drawn, loader.consumed_samples))
        self.step += 1
        self.log.add(taken, rate)
        if is_logged:
            self.log.write(self.step)
        return taken.request

    def _skip(self, taken: Step, samples: str) -> None:
        """Log a step that was not taken, and end the run where there were too many.

        Raises:
            DivergedError: on every rank.
        """
        number, guard = self.step + 1, self.guard
        logger.warning(
            "step %d is skipped (%d in a row, %d in all): %s; its samples: %s",
            *(number, guard.in_a_row, guard.skipped, taken.skipped, samples),
        )
        reason = f"step {number}: {taken.skipped}; samples of this step: {samples}"
        if (bad := weight_not_finite(self.trainer.chunks)) is not None:
            # loaded weights were finite, and steps cannot mend one: nothing to wait for
            raise self.checkpoints.diverged(
                f"{reason}. The weight {bad} since the update of step {number - guard.in_a_row}",
                number,
            )
        if guard.gives_up:
            raise self.checkpoints.diverged(
                f"{reason}; --max-skipped-steps {self.train.max_skipped_steps} in a row are used "
                f"up",
                number,
            )

    def _evaluate_if_due(self) -> None:
        moment = Moment(self.step, is_end=False)
        if not any(each.due(moment) for each in self.evaluations):
            return
        device.synchronize()  # or steps still in flight would count as evaluation
        with self.meter.pause(EVALUATION):
            self.evaluate(is_end=False)
            if self.held_out.due(moment):  # else its losses are of an earlier step
                self.mixing.reweight(self.step, next(iter(self.held_out.found.values())).losses)
        self.sinks.scalars(self.step, {tags.part_share(EVALUATION): self.meter.share(EVALUATION)})

    def _save_if_due(self, *, stops: bool) -> None:
        self.checkpoints.look(self.step, self.sinks)
        if not self.checkpoints.due(self.step, stops=stops):
            return
        with self.meter.pause(CHECKPOINT):
            self.checkpoints.save(self.step, self.sinks, wait=stops)
        self.sinks.scalars(self.step, {tags.part_share(CHECKPOINT): self.meter.share(CHECKPOINT)})

    def _end_early(self, ran_out: str) -> None:
        logger.warning(
            "step %d: the run ends %d steps early: %s. Resume with --resume and another "
            "--data-exhausted, or with more text in a new run",
            *(self.step, self.last - self.step, ran_out),
        )
        if self.log.write(self.step):
            self.mixing.log(self.step, always=True)

    def _end(self) -> dict[str, DomainLosses]:
        """Save the last step, evaluate on all held-out text, and keep the losses.

        Raises:
            DivergedError: on every rank: a loss is not finite.
        """
        self.checkpoints.end(self.step, self.sinks)
        self.evaluate(is_end=True)
        found = self.held_out.found
        if (bad := self.held_out.not_finite()) is not None:
            raise self.checkpoints.diverged(f"step {self.step}: {bad}", self.step)
        self.checkpoints.finish(self.step, found, self.samples.found if self.samples else [])
        # whatever continues after this run must know of a signal that came meanwhile
        _, self.request = self.trainer.train_step.agree([], self.stops.request())
        self.stop = self.stops.reason(self.request, None)
        self.checkpoints.close()
        return found

    def _is_logged(self, step: int) -> bool:
        return is_due(self.train.log_interval, step) or step == self.last
