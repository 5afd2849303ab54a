"""Batches of this replica, equal on all its tensor and pipeline ranks, and resumable."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megashear.data.batch import DocumentBorders, MicroBatch, micro_batch
from megashear.data.held_out import HeldOutSet
from megashear.data.mixture import DataExhausted, DomainMixture, MixtureState
from megashear.data.read_ahead import Request, SequenceReader, make_reader
from megashear.data.sequences import DomainSequences

__all__ = ["DomainSequences", "HeldOutSet", "LoaderState", "MicroBatch", "MixtureLoader"]

logger = logging.getLogger(__name__)

_READ_AT_ONCE = 2
"""Requests a worker that a batch is divided into: twice as many as workers, so that all of them
are busy to the end of a batch; and as many as torch's DataLoader keeps on the way by default, so
that a whole batch is read ahead."""


class LoaderState(TypedDict):
    """Where a loader stands: plain numbers and names, a few for each domain."""

    domains: list[str]
    samples_per_epoch: list[int]
    sequence_length: int
    seed: int
    mixture: MixtureState
    origins: list[list[int]]
    """`DomainSequences.origin` of every domain."""


class MixtureLoader:
    """Draws global batches from a mixture of domains and reads this replica's share of them.

    All ranks draw the same samples in the same order, each replica reads its own, so nothing is
    communicated, and a state saved at one data-parallel size is resumed at any other.

    This process draws, at microseconds a sample, and worker processes read what it expects to draw
    next. Weights may change between any two batches: the next batch is drawn with the new ones,
    whatever was read ahead.
    """

    def __init__(
        self,
        domains: Sequence[DomainSequences],
        mixture: DomainMixture,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
        borders: DocumentBorders | None = None,
        is_read: bool = True,
    ) -> None:
        """Take the domains in the order of the mixture's weights.

        Args:
            domains: sequences of every domain, all with one seed and one sequence length.
            mixture: chooses the domain of each sample; its weights may change between batches.
            global_batch_size: sequences in a step, over all replicas.
            micro_batch_size: sequences that go through the model together.
            data_parallel_rank: which replica this is.
            data_parallel_size: number of replicas.
            num_workers: processes that read ahead; 0 reads in this process.
            borders: what document borders mean; nothing unless given.
            is_read: whether this rank needs the text. A stage in the middle of a pipeline does
                not, unless documents are kept apart: it draws as all do, reads nothing, and has
                microbatches of token 0.

        Raises:
            ValueError: the batch does not divide, or domains and mixture do not belong together.
        """
        if len(domains) != len(mixture.weights):
            raise ValueError(
                f"{len(domains)} domains but --domain-weights has {len(mixture.weights)}; give "
                f"one weight for each of {[domain.name for domain in domains]}"
            )
        share = micro_batch_size * data_parallel_size
        if global_batch_size < 1 or share < 1 or global_batch_size % share:
            raise ValueError(
                f"--global-batch-size {global_batch_size} is not a positive multiple of "
                f"--micro-batch-size {micro_batch_size} * data-parallel size {data_parallel_size} "
                f"= {share}"
            )
        assert 0 <= data_parallel_rank < data_parallel_size, (
            data_parallel_rank,
            data_parallel_size,
        )
        assert len({(domain.seed, domain.sequence_length) for domain in domains}) == 1
        assert [domain.domain_index for domain in domains] == list(range(len(domains)))
        self.domains = list(domains)
        self.mixture = mixture
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        replica_size = global_batch_size // data_parallel_size
        start = data_parallel_rank * replica_size
        self._own = range(start, start + replica_size)
        num_microbatches = replica_size // micro_batch_size
        # without workers there is nobody to keep busy
        num_requests = _READ_AT_ONCE * num_workers or num_microbatches
        at_once = -(-num_microbatches // num_requests)
        self._request_size = at_once * micro_batch_size
        self._borders = borders or DocumentBorders()
        reader = SequenceReader(self.domains, with_documents=self._borders.are_read)
        self._is_read = is_read
        self._reader = make_reader(reader, num_workers if is_read else 0, self._expect)
        self._is_open = False

    @property
    def consumed_samples(self) -> int:
        """Sequences drawn so far by all replicas together."""
        return self.mixture.num_drawn

    def next_batch(self) -> list[MicroBatch]:
        """The microbatches of this replica for the next step.

        Replica d of dp has samples [d B / dp, (d + 1) B / dp) of a global batch of B.

        Raises:
            RuntimeError: text cannot be read, or a worker process died.
            DataExhausted: there is no whole batch left, see :meth:`ran_out`; on every rank alike.
        """
        self._open()
        before = self.mixture.copy()
        try:
            wanted = self._draw(self.mixture)
        except DataExhausted:
            self.mixture = before
            raise
        self._tell_epochs(before.drawn)
        self._tell_exhausted(before.exhausted)
        size, batches = self._micro_batch_size, []
        for request, block in zip(wanted, self._blocks(wanted)):
            for at in range(0, len(request.samples), size):
                tokens, labels, *documents = block[:, at : at + size]
                batches.append(
                    micro_batch(
                        tokens,
                        labels,
                        [domain for domain, _ in request.samples[at : at + size]],
                        range(request.start + at, request.start + at + size),
                        size,
                        borders=self._borders,
                        documents=(documents[0], documents[1]) if documents else None,
                    )
                )
        return batches

    def ran_out(self) -> str | None:
        """Why no further batch can be drawn, for people; None where one can.

        Equal on every rank, as what is drawn is.
        """
        if self.mixture.when_exhausted == "repeat":
            return None
        try:
            self._draw(self.mixture.copy())
        except DataExhausted as end:
            what = "the domains with a weight are all read"
            if end.domain is not None:
                domain = self.domains[end.domain]
                what = (
                    f"domain {domain.name} is read: sample {end.sample + 1} of the run would be "
                    f"number {domain.samples_per_epoch + 1} of its {domain.samples_per_epoch} "
                    f"sequences"
                )
            return f"{what}, and --data-exhausted is {self.mixture.when_exhausted}"
        return None

    def tell_plan(self, num_samples: int) -> None:
        """Warn of each domain that has less text than ``num_samples`` more samples want of it."""
        way_out = {
            "repeat": "repeats from there",
            "redistribute": "then leaves its share to the others (--data-exhausted redistribute)",
            "stop": "ends the run there (--data-exhausted stop)",
        }[self.mixture.when_exhausted]
        for domain, share, drawn in zip(self.domains, self.mixture.shares, self.mixture.drawn):
            size = domain.samples_per_epoch
            drawn_here = int(drawn) - domain.origin[0]
            wanted = drawn_here + share * num_samples
            left = size - drawn_here
            if wanted > size and left >= 0:
                logger.warning(
                    "domain %s: at its weight %.3f the run wants %.1f times its %d sequences "
                    "(%d tokens); it is read after about %d steps and %s",
                    *(domain.name, share, wanted / size, size, domain.num_tokens),
                    *(left / share / self._global_batch_size, way_out),
                )

    def close(self) -> None:
        """End the worker processes; the next batch would start others."""
        self._reader.close()
        self._is_open = False

    def _blocks(self, wanted: Sequence[Request]) -> list[Tensor]:
        if self._is_read:
            return self._reader.read(wanted, self.mixture)
        length = self.domains[0].sequence_length
        num_planes = 4 if self._borders.are_read else 2
        # one zero, seen everywhere
        zero = torch.zeros((), dtype=torch.int64)
        return [zero.expand(num_planes, len(request.samples), length) for request in wanted]

    def _open(self) -> None:
        if not self._is_open and self._is_read:
            for domain, drawn in zip(self.domains, self.mixture.drawn.tolist()):
                if self.mixture.shares[domain.domain_index]:
                    domain.prepare(drawn)  # here, for workers share what there is before they start
            self._is_open = True

    def _expect(self, mixture: DomainMixture) -> list[Request]:
        """As ``_draw``; nothing where text runs out."""
        try:
            return self._draw(mixture)
        except DataExhausted:
            return []

    def _draw(self, mixture: DomainMixture) -> list[Request]:
        """Draw a global batch; what this replica has to read of it.

        Raises:
            DataExhausted: amid the batch.
        """
        drawn = [mixture.draw() for _ in range(self._global_batch_size)]
        starts = range(self._own.start, self._own.stop, self._request_size)
        return [
            Request(start, tuple(drawn[start : min(start + self._request_size, self._own.stop)]))
            for start in starts
        ]

    def _tell_exhausted(self, before: npt.NDArray[np.bool_]) -> None:
        for number in np.flatnonzero(self.mixture.exhausted & ~before):
            domain = self.domains[number]
            logger.warning(
                "domain %s: its %d sequences (%d tokens) are read, at sample %d of the run%s",
                *(domain.name, domain.samples_per_epoch, domain.num_tokens, self.consumed_samples),
                "; its share goes to the others in proportion"
                if self.mixture.when_exhausted == "redistribute"
                else "",
            )

    def _tell_epochs(self, before: npt.NDArray[np.int64]) -> None:
        """Say so where a domain's text begins to repeat, as its drawn samples grew."""
        if self.mixture.when_exhausted != "repeat":
            return  # nothing is read twice
        for domain, old, new in zip(self.domains, before, self.mixture.drawn):
            size, origin = domain.samples_per_epoch, domain.origin[0]
            # epoch of the sample drawn last; the first one, 0, is not worth a word
            first, last = (domain.place(max(int(at) - 1, origin))[0] for at in (old, new))
            first += 1
            if last < first:
                continue
            # Loud as often as the number of epochs doubles: a tiny domain starts thousands.
            doubled = any((epoch + 1).bit_count() == 1 for epoch in range(first, last + 1))
            logger.log(
                logging.WARNING if doubled else logging.INFO,
                "domain %s: in epoch %d from here on, its %d sequences (%d tokens) repeat; "
                "lower its weight or add text to see no token twice",
                *(domain.name, last + 1, size, domain.num_tokens),
            )

    def state_dict(self) -> LoaderState:
        """Where the next batch begins, for any data-parallel size; fit for JSON."""
        return {
            "domains": [domain.name for domain in self.domains],
            "samples_per_epoch": [domain.samples_per_epoch for domain in self.domains],
            "sequence_length": self.domains[0].sequence_length,
            "seed": self.domains[0].seed,
            "mixture": self.mixture.state_dict(),
            "origins": [list(domain.origin) for domain in self.domains],
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on where the loader that gave ``state`` stood, with its weights.

        The batch sizes and the data-parallel size may differ from the saved run's. The sequence
        length may as well, where domains repeat: another length cuts and shuffles the text anew,
        so a domain whose epoch is partly read begins its next epoch, which is said.

        Raises:
            ValueError: the text or the seed differ, or the sequence length where domains do not
                repeat, so that going on would repeat some samples and skip others.
        """
        here = self.state_dict()
        length = here["sequence_length"]
        # as the saved run would have counted this text
        here["sequence_length"] = state["sequence_length"]
        here["samples_per_epoch"] = [
            (domain.num_tokens - 1) // state["sequence_length"] for domain in self.domains
        ]
        for key, way_out in (
            ("domains", "resume with the data of the saved run"),
            ("samples_per_epoch", "resume with the data of the saved run"),
            ("seed", "resume with the saved --seed"),
        ):
            if state[key] != here[key]:  # type: ignore[literal-required]
                raise ValueError(
                    f"cannot resume the data: {key} was {state[key]} in the saved run and is "  # type: ignore[literal-required]
                    f"{here[key]} now, which would repeat and skip samples; {way_out}, "  # type: ignore[literal-required]
                    f"or start a new run from its weights"
                )
        # checkpoints of before sequence lengths could change have none
        origins = state.get("origins", [[0, 0] for _ in self.domains])
        moved = length != state["sequence_length"]
        if (moved or any(first for first, _ in origins)) and self.mixture.when_exhausted != (
            "repeat"
        ):
            raise ValueError(
                f"cannot resume the data: --seq-length is {length} and samples of another length "
                f"({state['sequence_length']} last) were read, so what is left of an epoch is not "
                f"known, and --data-exhausted {self.mixture.when_exhausted} needs it; resume with "
                f"the saved --seq-length and --data-exhausted, or start a new run from its weights"
            )
        for domain, (first, epoch) in zip(self.domains, origins):
            domain.origin = (first, epoch)
        if moved:
            self._begin_epochs(state)
        self.mixture.load_state_dict(state["mixture"])

    def _begin_epochs(self, state: LoaderState) -> None:
        """Let every domain go on at the beginning of an epoch of its new sequences."""
        old = state["sequence_length"]
        logger.warning(
            "--seq-length was %d in the saved run and is %d now: steps go on, and samples are "
            "counted whatever their length; held-out losses of before do not compare with later "
            "ones",
            *(old, self.domains[0].sequence_length),
        )
        for domain, drawn, size in zip(
            self.domains, state["mixture"]["drawn"], state["samples_per_epoch"]
        ):
            first, epoch = domain.origin
            later, place = divmod(drawn - first, size)
            epoch += later + (place > 0)
            if place:
                logger.warning(
                    "domain %s: %d of the %d tokens of its epoch %d are read; it begins epoch %d, "
                    "in which these come again among all others",
                    *(domain.name, place * old, domain.num_tokens, epoch - 1, epoch),
                )
            domain.origin = (drawn, epoch)
