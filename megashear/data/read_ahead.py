"""Readers of sequences, in this process or ahead of time in worker processes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megashear.data.mixture import DomainMixture
from megashear.data.sequences import DomainSequences
from megashear.files.processes import begin_worker
from megashear.parallel import device

_JOIN_S = 5.0
"""Seconds to wait for a worker that was killed."""
_FIRST = 100
"""Priority of what is done at the end of a process; torch's own queues have 10 at most."""
_UNREADABLE = "cannot be read"
"""Marks an error of reading; other errors are of the processes that read."""


class Request(NamedTuple):
    """Neighbouring sequences of a global batch, read together."""

    start: int
    """Place of the first in the global batch."""
    samples: tuple[tuple[int, int], ...]
    """(domain, sample of the domain) of each."""


DrawBatch = Callable[[DomainMixture], list[Request]]
"""Draws a global batch and returns what this replica has to read of it; nothing where text ran
out."""


class Reader(Protocol):
    """Gives the text of requests."""

    def read(self, wanted: Sequence[Request], mixture: DomainMixture) -> list[Tensor]:
        """Return the text of each request, in their order.

        Args:
            wanted: requests of one global batch.
            mixture: the mixture as it stands after that batch.
        """

    def close(self) -> None:
        """Free what the reader holds; the next read takes it again."""


class SequenceReader(Dataset[Tensor | None]):
    """Reads requests out of the domains' files; as a ``Dataset``, its indices are requests.

    Args:
        domains: sequences of every domain.
        with_documents: whether to return the documents of tokens and labels, too.
    """

    def __init__(self, domains: Sequence[DomainSequences], *, with_documents: bool = False) -> None:
        self._domains = domains
        self._with_documents = with_documents

    def __getitem__(self, request: Request) -> Tensor | None:
        """Return the text of a request: tokens and labels, int64 [2, b, s]; [4, b, s] with the
        numbers of their documents. None for an empty request.

        Raises:
            RuntimeError: a sequence cannot be read; names domain and sample.
        """
        if not request.samples:
            return None
        length = self._domains[0].sequence_length
        # One block of inputs and labels: one tensor to send between processes, and to pin.
        num_planes = 4 if self._with_documents else 2
        block = torch.empty(num_planes, len(request.samples), length, dtype=torch.int64)
        for row, (number, sample) in enumerate(request.samples):
            domain = self._domains[number]
            try:
                parts = [domain[sample]]
                if self._with_documents:
                    parts.append(domain.documents(sample))
            except Exception as error:
                raise RuntimeError(
                    f"sample {sample} of domain {domain.name} {_UNREADABLE}: "
                    f"{type(error).__name__}: {error}; copy the domain's files again, or look "
                    f"after the file system"
                ) from error
            for plane, part in zip((0, 2), parts):
                block[plane, row], block[plane + 1, row] = part[:-1], part[1:]
        return block

    def read(self, wanted: Sequence[Request], mixture: DomainMixture) -> list[Tensor]:
        """Return the text of requests, read in this process; see ``Reader``."""
        return [block for block in map(self.__getitem__, wanted) if block is not None]

    def close(self) -> None:
        """Do nothing: nothing is held."""


class _Forecast:
    """Endless requests for the batches to come, if the weights stay as they are.

    The ``DataLoader`` asks this iterator for the next request whenever one was answered.
    """

    def __init__(self, draw_batch: DrawBatch) -> None:
        self._draw_batch = draw_batch
        self._mixture: DomainMixture | None = None
        self._pending: deque[Request] = deque()
        self.issued: deque[Request] = deque()
        """Requests that are not answered yet, in order."""

    def restart(self, pending: Sequence[Request], mixture: DomainMixture) -> None:
        """Issue ``pending`` next, then what ``mixture`` will draw."""
        self._pending = deque(pending)
        self._mixture = mixture.copy()

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        if not self._pending:
            assert self._mixture is not None
            # An empty request where text ran out: other weights may bring some after all.
            self._pending.extend(self._draw_batch(self._mixture) or [Request(0, ())])
        self.issued.append(self._pending.popleft())
        return self.issued[-1]


class ReadAhead:
    """Reads the batches to come in worker processes while the model computes.

    What will be drawn is a forecast, for the weights may change. So every request made ahead is
    compared with what is drawn in the end. Where they differ, the batch is put together from what
    was read or is on its way, for a domain's samples are drawn in their order whatever the weights
    are; only missing samples are read then, and the forecast begins anew. Reading ahead can
    therefore change the speed and nothing else.

    The workers are torch's: they end with their parent, however it ends, and one that ends alone
    raises here. They are forked at the first read, so that they share the domains' indices with
    this process. They ignore the signals that end a job. When a process ends, multiprocessing sends
    its children such a signal and waits for them, so they must be gone by then: see `_end_at_exit`.
    """

    def __init__(self, reader: SequenceReader, num_workers: int, draw_batch: DrawBatch) -> None:
        """Keep all arguments and start nothing.

        Args:
            reader: runs in the workers.
            num_workers: processes, at least 1. Up to twice as many requests are read ahead.
            draw_batch: draws a batch from a copy of the mixture.
        """
        assert num_workers >= 1, num_workers
        self._reader = reader
        self._num_workers = num_workers
        self._forecast = _Forecast(draw_batch)
        self._answers: Iterator[npt.NDArray[np.int64] | None] | None = None
        self._workers: list[BaseProcess] = []

    def read(self, wanted: Sequence[Request], mixture: DomainMixture) -> list[Tensor]:
        """Return the text of requests, waiting for what was not read ahead; see ``Reader``.

        Raises:
            RuntimeError: a sequence cannot be read, or a worker died or cannot be started.
        """
        blocks: list[Tensor] = []
        for number, request in enumerate(wanted):
            if not self._forecast.issued or self._forecast.issued[0] != request:
                return blocks + self._read_changed(wanted[number:], mixture)
            _, block = self._next()
            assert block is not None
            blocks.append(block)
        return blocks

    def close(self) -> None:
        """End the workers; the next read starts others."""
        self._answers = None
        self._forecast.issued.clear()
        _kill(self._workers)  # torch cannot end one whose disk hangs

    def _read_changed(self, wanted: Sequence[Request], mixture: DomainMixture) -> list[Tensor]:
        """Return the text of requests that differ from the forecast."""
        # What is missing: in equal pieces, two for each worker.
        ahead = {sample for request in self._forecast.issued for sample in request.samples}
        missing = [s for request in wanted for s in request.samples if s not in ahead]
        size = max(1, -(-len(missing) // (2 * self._num_workers)))
        pieces = [Request(0, tuple(missing[at : at + size])) for at in range(0, len(missing), size)]
        num_answers = len(self._forecast.issued) + len(pieces)
        # Forecast anew: the pieces, then what follows.
        self._forecast.restart(pieces, mixture)
        self._start()
        # Collect answers: what was on its way, then the pieces.
        rows: dict[tuple[int, int], Tensor] = {}
        for _ in range(num_answers):
            request, block = self._next()
            if block is not None:
                rows |= zip(request.samples, block.unbind(1))
        # Put the batch together.
        return [torch.stack([rows[s] for s in request.samples], dim=1) for request in wanted]

    def _start(self) -> None:
        if self._answers is not None:
            return
        before = set(multiprocessing.active_children())
        try:
            self._answers = iter(
                DataLoader(
                    self._reader,
                    batch_size=None,  # a request is a batch already
                    sampler=self._forecast,  # endless: has no length
                    num_workers=self._num_workers,
                    collate_fn=_to_send,
                    multiprocessing_context="fork",
                    worker_init_fn=functools.partial(_begin_worker, os.getpid()),
                    # its own, or starting would draw from torch's global generator
                    generator=torch.Generator(),
                )
            )
        except OSError as error:
            raise RuntimeError(
                f"--num-workers {self._num_workers}: processes that read training sequences ahead "
                f"cannot be started: {error}; give fewer, or 0 to read in the rank itself"
            ) from error
        finally:
            # Also after a start that failed half way.
            self._workers = [p for p in multiprocessing.active_children() if p not in before]
            _end_at_exit(self._workers)

    def _next(self) -> tuple[Request, Tensor | None]:
        """Wait for the answer to the oldest request, and return both."""
        assert self._answers is not None
        try:
            block = next(self._answers)
        except (RuntimeError, OSError, EOFError) as error:
            if _UNREADABLE in str(error):
                raise
            # The connection to a dead worker breaks before torch looks after it.
            what = str(error) if "worker" in str(error) else f"DataLoader worker lost: {error}"
            # Else torch's handler would raise once more, anywhere while the caller ends.
            _kill(self._workers)
            raise RuntimeError(
                f"{what} (a process that reads training sequences ahead; --num-workers 0 reads "
                f"in the rank itself)"
            ) from error
        # One block is pinned, not each of its parts.
        answer = None if block is None else device.pinned(torch.from_numpy(block))
        return self._forecast.issued.popleft(), answer


def make_reader(reader: SequenceReader, num_workers: int, draw_batch: DrawBatch) -> Reader:
    """Return a reader with worker processes, or one that reads in this process.

    Args:
        reader: reads in this process.
        num_workers: processes that read ahead. 0 reads when asked; so does a daemonic process,
            which may have no children.
        draw_batch: see ``ReadAhead``.

    Raises:
        ValueError: a negative number of workers.
    """
    if num_workers < 0:
        raise ValueError(f"--num-workers is {num_workers}; wanted 0 (read in this process) or more")
    if num_workers == 0 or multiprocessing.current_process().daemon:
        return reader
    return ReadAhead(reader, num_workers, draw_batch)


def _begin_worker(rank: int, worker: int) -> None:
    # Signals to a whole job are for the ranks, which still read until they have saved.
    begin_worker(rank, (signal.SIGTERM, signal.SIGINT))


def _end_at_exit(workers: Collection[BaseProcess]) -> None:
    """Have workers killed when this process ends, before multiprocessing waits for them.

    Finalizers run at the end of an interpreter and of a process that multiprocessing started;
    functions of `atexit` do not run in the latter. A forked child does not run those it inherits.
    """
    Finalize(None, _kill, args=(workers,), exitpriority=_FIRST)


def _kill(workers: Collection[BaseProcess]) -> None:
    # Twice: torch's handler raises once, anywhere in here, when the first worker has ended.
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
            for worker in workers:
                worker.join(_JOIN_S)


def _to_send(block: Any) -> npt.NDArray[np.int64] | None:
    """Turn a block into an array, whose bytes go through the pipe.

    A tensor would go as a file descriptor, through a socket in a temporary folder that a killed
    worker leaves behind.
    """
    return None if block is None else block.numpy()
