"""A run's checkpoints while it trains: saved, known to be good, and returned to."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megashear.checkpoint.description import iteration_name, read_description
from megashear.checkpoint.details import HELD_OUT_ERROR, HELD_OUT_LOSS, TEXT_SAMPLES
from megashear.checkpoint.finite import not_finite_anywhere
from megashear.checkpoint.saver import Saver, SaveReport
from megashear.checkpoint.store import amend_description, checkpoint_bytes
from megashear.checkpoint.text_sample import TextSample
from megashear.config import TrainConfig
from megashear.models.llama import gather_weights
from megashear.monitor import tags
from megashear.monitor.sinks import Sink
from megashear.parallel.agree import gather_objects, raise_together
from megashear.parallel.watchdog import Watchdog
from megashear.train.evaluate import DomainLosses
from megashear.train.evaluations import is_due
from megashear.train.guard import StepGuard
from megashear.train.state import RunState
from megashear.train.stops import DivergedError

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves a run where --save says; without it nothing is kept. Methods are collective over the
    world.

    Args:
        state: what a checkpoint holds.
        train: the flags.
        guard: knows for how many steps no weight has moved.
        tokenizer: the tokenizer's files, or their directory, which every checkpoint carries.
        source: iteration that the run starts or resumes from.
        first_step: steps done when the run starts.
        watchdog: is told of saves that are waited for.
    """

    def __init__(
        self,
        state: RunState,
        train: TrainConfig,
        guard: StepGuard,
        *,
        tokenizer: Path | Sequence[Path],
        source: Path | None,
        first_step: int,
        watchdog: Watchdog,
    ) -> None:
        self._state, self._train, self._guard = state, train, guard
        self._tokenizer, self._source = tokenizer, source
        self._saved_step = first_step
        self.last: Path | None = None
        """Newest checkpoint that this process saved, or found saved at the end of its run."""
        self._saver: Saver | None = None
        if train.save is not None:
            self._saver = Saver(
                train.save,
                state.groups,
                background=train.async_save,
                keep=train.keep,
                protected=source,
                resumed=first_step if self._is_ours(source) else None,
                beat=watchdog.beat,
            )

    def check(self, *, bf16: bool) -> None:
        """Refuse a --save that cannot take even one checkpoint.

        Args:
            bf16: whether checkpoints have float32 masters too.

        Raises:
            SaveError: on every rank.
        """
        if self._saver is not None:
            self._saver.check(checkpoint_bytes(self._state.shape, bf16=bf16))

    def due(self, step: int, *, stops: bool) -> bool:
        """Return whether to save after ``step`` steps, at which the run may stop.

        Args:
            step: steps done.
            stops: whether the run is stopped here.
        """
        if self._saver is None or step >= self._train.train_iters:
            return False
        return stops or is_due(self._train.save_interval, step)

    def save(self, step: int, sink: Sink, *, wait: bool = False) -> None:
        """Save a checkpoint of ``step`` steps done.

        Args:
            step: steps done.
            sink: where times of saves go.
            wait: until it is visible, even with --async-save.

        Raises:
            DivergedError: on every rank: a number of it is not finite, on some rank.
            SaveError: on every rank: it cannot be written.
        """
        saver, state = self._saver, self._state
        assert saver is not None, "a run without --save saves nothing"
        gather_weights(state.chunks)
        # whoever resumes from this checkpoint writes no point up to it again
        sink.flush()
        description = state.description(step)
        tensors = state.tensors(description)
        if (spoiled := not_finite_anywhere(tensors)) is not None:
            raise self.diverged(f"step {step} is not saved: {spoiled}", step)
        self._report(saver.save(description, tensors, tokenizer=self._tokenizer), sink)
        if wait:
            self._report(saver.wait(), sink)
        self.last = saver.root / iteration_name(step)
        self._saved_step = step

    def look(self, step: int, sink: Sink) -> None:
        """Report a save that was finished meanwhile, and prove those that were good.

        Args:
            step: steps done.
            sink: where times of saves go.
        """
        if self._saver is not None:
            self._report(self._saver.poll(), sink)
            self._saver.prove(self._newest_good(step))

    def end(self, step: int, sink: Sink) -> None:
        """Have the last step saved, before the long evaluation that a time limit may cut off.

        Args:
            step: steps done.
            sink: where times of saves go.
        """
        if self._saver is not None and step > self._saved_step:
            self.save(step, sink, wait=True)
        elif self._saver is not None and self.last is not None:
            self._report(self._saver.wait(), sink)  # text ran out where a save was due
        elif self._is_ours(self._source):
            self.last = self._source  # killed before the evaluation that comes now

    def finish(
        self, step: int, found: Mapping[str, DomainLosses], samples: Sequence[TextSample]
    ) -> None:
        """Add the last losses to the last checkpoint, which they prove to be good.

        Args:
            step: steps done.
            found: held-out losses over all held-out text, by mode; finite.
            samples: what the model writes.
        """
        if self._saver is not None:
            self._saver.prove(self._newest_good(step) if self._guard.in_a_row else step)
        if self.last is not None:
            self._amend(self.last, found, samples)

    def close(self) -> None:
        """Wait for deletions of older checkpoints."""
        if self._saver is not None:
            self._saver.finish()

    def diverged(self, what: str, step: int) -> DivergedError:
        """Name the last good checkpoint the latest, and return the error that ends the run.

        Args:
            what: is not finite.
            step: steps done.
        """
        saver, way_out = self._saver, "lower --lr, or look at the text of these steps"
        if saver is None:
            return DivergedError(f"{what}. Nothing was saved, as no --save is given: {way_out}")
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

    def _newest_good(self, step: int) -> int:
        """Return the newest iteration whose weights a step was taken from, after ``step`` steps."""
        return step - self._guard.in_a_row - 1

    def _is_ours(self, checkpoint: Path | None) -> bool:
        """Return whether a checkpoint is one of --save."""
        save = self._train.save
        return (
            save is not None
            and checkpoint is not None
            and checkpoint.resolve().parent == Path(save).resolve()
        )

    def _amend(
        self, saved: Path, found: Mapping[str, DomainLosses], samples: Sequence[TextSample]
    ) -> None:
        """Add what was found at the end to a checkpoint, unless a run has done so before."""
        details = {
            HELD_OUT_LOSS: {mode: domains.losses for mode, domains in found.items()},
            HELD_OUT_ERROR: {mode: domains.known_errors for mode, domains in found.items()},
            TEXT_SAMPLES: [dataclasses.asdict(sample) for sample in samples],
        }
        with raise_together():
            done = bool(read_description(saved).known.held_out_loss)
        if not any(gather_objects(done)):
            amend_description(saved, details, self._state.groups)

    def _report(self, finished: Sequence[SaveReport], sink: Sink) -> None:
        for saved in finished:
            sink.scalars(
                saved.iteration,
                {tags.SAVE_SECONDS: saved.seconds, tags.SAVE_STALL_SECONDS: saved.stall_seconds},
            )
            logger.info(
                "step %d: saved %s, %.3f GB in %.1f s, training paused for %.1f s",
                *(saved.iteration, saved.directory, saved.num_bytes / 1e9),
                *(saved.seconds, saved.stall_seconds),
            )
