"""Held-out loss per domain, token-weighted and equal on every rank, with its standard error."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megashear.config import DEFAULT_EVAL_SEQUENCES, TrainConfig
from megashear.data.batch import MicroBatch
from megashear.data.held_out import HeldOutSet
from megashear.monitor import tags
from megashear.monitor.console import format_evaluation, progress
from megashear.monitor.sinks import Sink
from megashear.parallel import device
from megashear.parallel.agree import ordered_sum
from megashear.parallel.groups import ParallelGroups
from megashear.planning.time import FORWARD_SHARE
from megashear.train.evaluations import Moment, is_due
from megashear.train.objectives import Objective
from megashear.train.schedule import ForwardPass

logger = logging.getLogger(__name__)

_SLAB = 16
"""Microbatches handed to the schedule at a time, so that memory does not grow with the set."""


@dataclass(frozen=True, kw_only=True)
class DomainLosses:
    """Held-out losses that an evaluation found."""

    losses: dict[str, float]
    """Cross entropy per token by domain, nats."""
    tokens: dict[str, int]
    """Tokens evaluated by domain."""
    errors: dict[str, float]
    """Standard error of each loss, nats; NaN where a domain has fewer than two sequences."""

    @property
    def mean(self) -> float:
        """Mean over domains, each counted alike."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def known_errors(self) -> dict[str, float | None]:
        """Standard errors as JSON has them: None for one that is not known."""
        return {name: None if math.isnan(e) else e for name, e in self.errors.items()}

    @property
    def mean_error(self) -> float:
        """Standard error of the mean over domains, whose texts are independent."""
        return math.hypot(*self.errors.values()) / len(self.errors)


def subsample_size(train: TrainConfig, *, num_domains: int, num_modes: int) -> int:
    """Return how many held-out sequences of a domain an evaluation within the run reads.

    Args:
        train: has --eval-sequences, --eval-tokens or --eval-share.
        num_domains: domains that an evaluation reads.
        num_modes: times that an evaluation reads them, one forward pass each.

    Raises:
        ValueError: the share does not pay for one sequence of each domain.
    """
    if train.eval_tokens is not None:
        return train.eval_tokens // train.seq_length
    if train.eval_share is None:
        return train.eval_sequences or DEFAULT_EVAL_SEQUENCES
    evaluations = train.train_iters // train.eval_interval if train.eval_interval else 0
    if not evaluations:
        return 1  # no evaluation is made
    trained = train.train_iters * train.global_batch_size  # sequences, forward and backward
    cost = evaluations * num_modes * num_domains * FORWARD_SHARE  # of one sequence a domain
    size = math.floor(train.eval_share * trained / cost)
    if size < 1:
        raise ValueError(
            f"--eval-share {train.eval_share:g} of {trained} training sequences does not pay for "
            f"{evaluations} evaluations of one sequence: {num_domains} domains * {num_modes} modes "
            f"* {FORWARD_SHARE:.2f} * {evaluations} = {cost:.1f}; give at least "
            f"{cost / trained:.2g}, or raise --eval-interval {train.eval_interval}"
        )
    return size


class HeldOutLosses:
    """Measures the held-out loss of every domain in each of an objective's modes.

    Args:
        objective: whose models are evaluated.
        names: of the domains.
        held_out: sets of the domains, in the same order.
        references: loss that each domain should have, nats per token; None where none is known.
        num_sequences: held-out sequences per domain in an evaluation within the run.
        train: interval, batch sizes, seed.
        groups: where this rank stands.
        beat: is told of every few batches, see `Watchdog`.
    """

    def __init__(
        self,
        objective: Objective,
        names: Sequence[str],
        held_out: Sequence[HeldOutSet],
        references: Sequence[float] | None,
        num_sequences: int,
        train: TrainConfig,
        groups: ParallelGroups,
        beat: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._objective, self._names = objective, names
        self._held_out, self._references = held_out, references
        self._num_sequences, self._train, self._groups = num_sequences, train, groups
        self._beat = beat
        self.found: dict[str, DomainLosses] = {}
        """What the last evaluation found, by mode."""

    def due(self, moment: Moment) -> bool:
        """Return whether losses are to be measured: at the interval, and at the end."""
        return moment.is_end or is_due(self._train.eval_interval, moment.step)

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Measure, log a line for each mode, and return points by tag.

        At the end all held-out text is read, else the run's subsample.
        """
        most = max(map(len, self._held_out)) if moment.is_end else self._num_sequences
        # one seed for the whole run, so that losses of different steps compare
        chosen = [part.subsample(most, self._train.seed) for part in self._held_out]
        self.found = {}
        for mode in self._objective.modes():
            with self._objective.evaluating(mode) as measure:
                self.found[mode] = evaluate_domains(
                    measure,
                    self._names,
                    self._held_out,
                    chosen,
                    self._groups,
                    micro_batch_size=self._train.eval_micro_batch_size
                    or self._train.micro_batch_size,
                    what=f"evaluation at step {moment.step} ({mode})",
                    beat=self._beat,
                )
        for mode, losses in self.found.items():
            labels = ["all held-out text"] * moment.is_end
            labels += [label for label in [self._objective.label(mode)] if label]
            line = format_evaluation(moment.step, losses.losses, errors=losses.errors)
            logger.info("".join([line, *(f" [{label}]" for label in labels)]))
        return self._points(moment)

    def not_finite(self) -> str | None:
        """Return what is not finite in the last evaluation, equal on every rank, or None."""
        for mode, domains in self.found.items():
            for name, loss in domains.losses.items():
                if not math.isfinite(loss):
                    label = self._objective.label(mode)
                    under = f" under {label}" if label else ""
                    return f"the held-out loss of {name} is {loss}{under}"
        return None

    def _points(self, moment: Moment) -> dict[str, float]:
        first = next(iter(self.found.values()))
        if moment.is_end:
            # tags of their own: other text than the curve's would put a step at its end
            points = {tags.full_loss(name): loss for name, loss in first.losses.items()}
            return points | {tags.FULL_MEAN_LOSS: first.mean}
        points = {tags.eval_loss(name): loss for name, loss in first.losses.items()}
        points[tags.EVAL_MEAN_LOSS] = first.mean
        points |= {tags.eval_error(name): error for name, error in first.errors.items()}
        points[tags.EVAL_MEAN_ERROR] = first.mean_error
        if self._references is not None:
            for (name, loss), reference in zip(first.losses.items(), self._references):
                points[tags.eval_excess(name)] = loss - reference
        return points | self._objective.mode_points(
            {mode: losses.mean for mode, losses in self.found.items()}
        )


def evaluate_domains(
    measure: ForwardPass,
    names: Sequence[str],
    held_out: Sequence[HeldOutSet],
    chosen: Sequence[Sequence[int]],
    groups: ParallelGroups,
    *,
    micro_batch_size: int,
    what: str = "evaluation",
    beat: Callable[[str], None] = lambda doing: None,
) -> DomainLosses:
    """Evaluate the chosen sequences of every domain. Collective over the world.

    Args:
        measure: the model.
        names: of the domains.
        held_out: sets of the domains, in the same order.
        chosen: indices of sequences of each set, equal on every rank.
        groups: where this rank stands.
        micro_batch_size: sequences per forward pass.
        what: text beside the progress bar.
        beat: is told of every few batches, see `Watchdog`.
    """
    sums = torch.zeros(len(names), _NUM_SUMS, dtype=torch.float64, device=device.device())
    per_pass = micro_batch_size * groups.data_size
    total = sum(-(-len(indices) // per_pass) for indices in chosen)  # microbatches
    with progress(total, rank=groups.rank, desc=what, unit="batch", leave=False) as bar:
        batches = itertools.chain.from_iterable(
            domain.batches(indices, micro_batch_size, groups.data_rank, groups.data_size)
            for domain, indices in zip(held_out, chosen)
        )
        for slab in slabs(batches, groups):
            beat(what)
            for found in measure(slab):
                terms = sums_of_sequences(found.sums, found.counts)
                sums.index_add_(0, found.domains.to(sums.device), terms)
            bar.update(min(len(slab), total - bar.n))
    # only last stages measured; tensor ranks of a stage measured the same
    (sums,) = ordered_sum([sums], groups.pipeline)
    (sums,) = ordered_sum([sums], groups.data)
    losses, errors = ratio_and_error(sums)
    return DomainLosses(
        losses=dict(zip(names, losses.tolist())),
        tokens={name: int(count) for name, count in zip(names, sums[:, 1].tolist())},
        errors=dict(zip(names, errors.tolist())),
    )


_NUM_SUMS = 6
"""Columns of ``sums_of_sequences``."""


def sums_of_sequences(losses: Tensor, counts: Tensor) -> Tensor:
    """Return what is added up over the sequences of a domain, float64 [b, 6].

    Args:
        losses: cross entropy summed over the tokens of each sequence, nats, [b].
        counts: tokens of each sequence, [b]; one without tokens only fills up a batch.

    Returns:
        Loss x, tokens n, sequences, and the products x x, x n, n n.
    """
    x, n = losses.double(), counts.double()
    return torch.stack([x, n, (n > 0).double(), x * x, x * n, n * n], dim=1)


def ratio_and_error(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token-weighted mean loss r = sum x / sum n of each domain, and its standard error.

    Tokens of a sequence are not independent, so sequences are counted: the error is that of a ratio
    of two sums over k sequences, sqrt(k / (k - 1) * sum (x - r n)^2) / sum n. The error holds for
    the loss over all text of the domain's kind, whatever share of the held-out text was read.

    Args:
        sums: of ``sums_of_sequences`` over each domain, [domains, 6].

    Returns:
        Two vectors over domains, nats per token; the error is NaN below two sequences.

    Source: Cochran 1977, "Sampling Techniques", section 6.3.
    """
    x, n, k, xx, xn, nn = sums.unbind(dim=1)
    ratio = x / n
    # rounding may leave a sum of squares just below 0
    squares = (xx - 2 * ratio * xn + ratio * ratio * nn).clamp(min=0)
    error = torch.where(k > 1, (k / (k - 1) * squares).sqrt() / n, torch.nan)
    return ratio, error


def slabs(batches: Iterable[MicroBatch], groups: ParallelGroups) -> Iterator[list[MicroBatch]]:
    """Yield microbatches in lists that the schedule takes at a time.

    The interleaved schedule takes a multiple of the stages only, so copies with a loss mask of 0
    fill the last list.
    """
    batches = iter(batches)
    slab_size = -(-_SLAB // groups.pipeline_size) * groups.pipeline_size
    while slab := list(itertools.islice(batches, slab_size)):
        if groups.virtual_size > 1:
            while len(slab) % groups.pipeline_size:
                slab.append(replace(slab[-1], loss_mask=torch.zeros_like(slab[-1].loss_mask)))
        yield slab
