"""Batches of this replica, equal on all its tensor and pipeline ranks, and resumable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megashear.data import loader_state, supply
from megashear.data.batch import DocumentBorders, MicroBatch, micro_batch
from megashear.data.loader_state import LoaderState
from megashear.data.mixture import DataExhausted, DomainMixture
from megashear.data.read_ahead import Request, SequenceReader, make_reader
from megashear.data.sequences import DomainSequences

_READ_AT_ONCE = 2
"""Requests a worker that a batch is divided into: twice as many as workers, so that all of them
are busy to the end of a batch; and as many as torch's DataLoader keeps on the way by default, so
that a whole batch is read ahead."""


class MixtureLoader:
    """Draws global batches from a mixture of domains and reads this replica's share of them.

    All ranks draw the same samples in the same order and each replica reads its own, so nothing is
    communicated, and a run saved at one data-parallel size resumes at any other.

    This process draws, at microseconds a sample; worker processes read ahead what is likely to be
    drawn next. Weights may change between any two batches: the next batch is drawn with the new
    weights, whatever was read ahead.
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
                not, unless documents are kept apart: it draws like all others, reads nothing, and
                has microbatches of token 0.

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
        # Without workers there is nobody to keep busy.
        num_requests = _READ_AT_ONCE * num_workers or num_microbatches
        at_once = -(-num_microbatches // num_requests)
        self._request_size = at_once * micro_batch_size
        self._borders = borders or DocumentBorders()
        reader = SequenceReader(self.domains, with_documents=self._borders.are_read)
        self._is_read = is_read
        self._reader = make_reader(reader, num_workers if is_read else 0, self._forecast)
        self._is_open = False

    @property
    def consumed_samples(self) -> int:
        """Number of sequences that all replicas together have drawn."""
        return self.mixture.num_drawn

    def next_batch(self) -> list[MicroBatch]:
        """Return the microbatches of this replica for the next step.

        Replica d of dp has samples [d B / dp, (d + 1) B / dp) of a global batch of B.

        Raises:
            RuntimeError: text cannot be read, or a worker process died.
            DataExhausted: no whole batch is left, on every rank alike; see :meth:`ran_out`.
        """
        self._open()
        before = self.mixture.copy()
        try:
            wanted = self._draw(self.mixture)
        except DataExhausted:
            self.mixture = before
            raise
        supply.report_ends(self.domains, before, self.mixture)
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
        """Return why no further batch can be drawn, for people; None where one can.

        Equal on every rank, as what is drawn is.
        """
        if self.mixture.when_exhausted == "repeat":
            return None
        try:
            self._draw(self.mixture.copy())
        except DataExhausted as end:
            return supply.reason_for_end(end, self.domains, self.mixture)
        return None

    def warn_of_short_domains(self, num_samples: int) -> None:
        """Warn of each domain that has less text than ``num_samples`` more samples need."""
        supply.warn_of_short_domains(
            self.domains, self.mixture, num_samples, self._global_batch_size
        )

    def close(self) -> None:
        """End the worker processes; the next batch starts others."""
        self._reader.close()
        self._is_open = False

    def _blocks(self, wanted: Sequence[Request]) -> list[Tensor]:
        if self._is_read:
            return self._reader.read(wanted, self.mixture)
        length = self.domains[0].sequence_length
        num_planes = 4 if self._borders.are_read else 2
        # One zero, shown at every place.
        zero = torch.zeros((), dtype=torch.int64)
        return [zero.expand(num_planes, len(request.samples), length) for request in wanted]

    def _open(self) -> None:
        if not self._is_open and self._is_read:
            for domain, drawn in zip(self.domains, self.mixture.drawn.tolist()):
                if self.mixture.shares[domain.domain_index]:
                    domain.prepare(drawn)  # here: workers share what exists before they start
            self._is_open = True

    def _forecast(self, mixture: DomainMixture) -> list[Request]:
        """Draw as ``_draw`` does; return nothing where text runs out."""
        try:
            return self._draw(mixture)
        except DataExhausted:
            return []

    def _draw(self, mixture: DomainMixture) -> list[Request]:
        """Draw a global batch and return what this replica has to read of it.

        Raises:
            DataExhausted: text ran out within the batch.
        """
        drawn = [mixture.draw() for _ in range(self._global_batch_size)]
        starts = range(self._own.start, self._own.stop, self._request_size)
        return [
            Request(start, tuple(drawn[start : min(start + self._request_size, self._own.stop)]))
            for start in starts
        ]

    def state_dict(self) -> LoaderState:
        """Return where the next batch begins, for any data-parallel size; fit for JSON."""
        return loader_state.state_of(self.domains, self.mixture)

    def load_state_dict(self, state: LoaderState) -> None:
        """Resume where the loader that gave ``state`` stood, with its weights.

        The batch sizes, the data-parallel size and, where domains repeat, the sequence length may
        differ from the saved run's.

        Raises:
            ValueError: see ``loader_state.restore``.
        """
        loader_state.restore(state, self.domains, self.mixture)
