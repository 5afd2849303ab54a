"""Worker processes that read ahead: what they may change (the speed) and what not (the samples)."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing import util
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from megashear.data import read_ahead
from megashear.data.loader import MixtureLoader
from megashear.data.read_ahead import ReadAhead, _Forecast
from megashear.data.sequences import DomainSequences
from megashear.files import processes
from tests.unit.data.test_loader import OTHER_WEIGHTS, WEIGHTS, loader, rows

PATIENCE_S = 60.0
"""How long to wait for what must happen; torch's workers look after their parent every 5 s."""


def workers_of(each: MixtureLoader) -> list[multiprocessing.Process]:
    assert isinstance(each._reader, ReadAhead)
    return each._reader._answers._workers


@contextlib.contextmanager
def opened(data, **options):
    each = loader(data, **{"workers": 2, **options})
    try:
        yield each
    finally:
        each.close()


def test_weights_count_from_the_very_next_batch(data) -> None:
    plain = loader(data)
    with opened(data) as ahead:
        for step in range(40):
            if step % 3 == 2:
                for each in (plain, ahead):
                    each.mixture.set_weights(OTHER_WEIGHTS if step % 2 else WEIGHTS)
            assert rows(ahead.next_batch()) == rows(plain.next_batch()), step


def test_a_batch_read_under_old_weights_is_noticed(data, monkeypatch: pytest.MonkeyPatch) -> None:
    def credulous(self: ReadAhead, wanted, mixture) -> list[torch.Tensor]:
        if self._answers is None:
            self._forecast.restart(wanted, mixture)
            self._start()
        return [self._next()[1] for _ in wanted]

    monkeypatch.setattr(ReadAhead, "read", credulous)
    plain = loader(data)
    with opened(data) as ahead:
        assert rows(ahead.next_batch()) == rows(plain.next_batch())
        for each in (plain, ahead):
            each.mixture.set_weights(OTHER_WEIGHTS)
        assert rows(ahead.next_batch()) != rows(plain.next_batch())


def test_what_was_read_ahead_under_old_weights_is_used(
    data, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    restart = _Forecast.restart

    def noted(self: _Forecast, pending, mixture) -> None:
        asked.append(sum(len(request.samples) for request in pending))
        restart(self, pending, mixture)

    monkeypatch.setattr(_Forecast, "restart", noted)
    with opened(data, batch=40) as each:
        for _ in range(3):
            each.next_batch()
        each.mixture.set_weights([0.4, 0.3, 0.3])  # a tenth of a batch moves
        each.next_batch()
        each.next_batch()
    assert asked[0] == 40  # at the start there is nothing
    assert asked[1:] == [pytest.approx(4, abs=2)]


def test_state_loaded_while_reading_ahead_counts(data) -> None:
    with opened(data) as each:
        state = each.state_dict()
        first = [rows(each.next_batch()) for _ in range(5)]
        each.load_state_dict(state)
        assert [rows(each.next_batch()) for _ in range(5)] == first


def test_reading_ahead_leaves_the_global_generator_alone(data) -> None:
    before = torch.get_rng_state()
    with opened(data) as each:
        each.next_batch()
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_share_the_index_and_end_with_close(data) -> None:
    with opened(data) as each:
        each.next_batch()
        # built before they were forked; they could not have told
        assert all(domain._sequences is not None for domain in each.domains)
        workers = workers_of(each)
        assert len(workers) == 2
        each.close()
        assert not any(worker.is_alive() for worker in workers)
        before = each.consumed_samples
        each.next_batch()  # others are started
        assert each.consumed_samples == before + 12


@contextlib.contextmanager
def in_a_child(body, *args):
    """The child process that runs ``body(*args, pipe)``, and what it sent; it ends with the block,
    and so do its own children."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def lead(*all_args) -> None:
        os.setpgrp()
        body(*all_args)

    process = context.Process(target=lead, args=(*args, sender))
    process.start()
    try:
        assert receiver.poll(PATIENCE_S), "the child sent nothing"
        yield process, receiver.recv()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def read_on(each: MixtureLoader) -> None:
    for _ in range(50):
        each.next_batch()


def lose_a_worker(data, message) -> None:
    """As a rank that multiprocessing started: it says why it ends, and ends."""
    try:
        each = loader(data, workers=2)
        each.next_batch()
        # torch notices while the next batch is read, or in between when the signal arrives
        os.kill(workers_of(each)[0].pid, signal.SIGKILL)
        read_on(each)
    except RuntimeError as error:
        message.send(str(error))
        raise


def fail_beside_its_workers(data, workers) -> None:
    each = loader(data, workers=2)
    each.next_batch()
    workers.send([worker.pid for worker in workers_of(each)])
    raise SystemExit(7)  # whatever ends a rank: nobody has closed the loader


def test_a_worker_that_dies_is_an_error_and_the_rank_ends(data) -> None:
    with in_a_child(lose_a_worker, data) as (process, message):
        assert "DataLoader worker" in message
        process.join(PATIENCE_S)
        assert process.exitcode == 1


def test_a_rank_that_multiprocessing_started_ends_with_its_workers(data) -> None:
    with in_a_child(fail_beside_its_workers, data) as (process, pids):
        process.join(PATIENCE_S)
        assert process.exitcode == 7
        assert not any(map(is_running, pids))


def test_workers_that_wait_for_a_rank_that_waits_for_them_are_noticed(
    data, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the twin: functions of atexit do not run in such a process
    monkeypatch.setattr(
        read_ahead, "_end_at_exit", lambda workers: atexit.register(read_ahead._kill, workers)
    )
    with in_a_child(fail_beside_its_workers, data) as (process, pids):
        process.join(1.0)
        assert process.exitcode is None
        assert all(map(is_running, pids))


@pytest.mark.parametrize("by_descriptor", [False, True])
def test_workers_have_no_temporary_folder_that_a_kill_would_leave(
    data, tmp_path: Path, by_descriptor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    if by_descriptor:  # the twin: what torch does with a tensor
        monkeypatch.setattr(read_ahead, "_to_send", lambda block: block)
        made = torch.from_numpy
        taken = lambda block: block if isinstance(block, torch.Tensor) else made(block)  # noqa: E731
        monkeypatch.setattr(torch, "from_numpy", taken)
    with opened(data) as each:
        assert rows(each.next_batch()) == rows(loader(data).next_batch())
        assert bool(list(tmp_path.iterdir())) is by_descriptor


def test_a_forked_child_does_not_end_the_workers_of_its_parent(data) -> None:
    with opened(data) as each:
        each.next_batch()
        process = multiprocessing.get_context("fork").Process(target=util._exit_function)
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == 0
        assert all(worker.is_alive() for worker in workers_of(each))
        each.next_batch()


def test_workers_that_cannot_be_started_are_told_of_and_none_is_left(
    data, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = ForkProcess.start, []

    def second_fails(process: ForkProcess) -> None:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(process)
        start(process)

    monkeypatch.setattr(ForkProcess, "start", second_fails)
    each = loader(data, workers=2)
    message = "--num-workers 2: processes .* cannot be started: .*unavailable; give fewer, or 0"
    with pytest.raises(RuntimeError, match=message):
        each.next_batch()
    each.close()
    assert not started[0].is_alive()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(
    data, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DomainSequences.__getitem__

    def broken(domain: DomainSequences, sample: int) -> torch.Tensor:
        if (domain.name, sample) == (data.names[1], 3):
            raise OSError(5, "Input/output error")
        return original(domain, sample)

    monkeypatch.setattr(DomainSequences, "__getitem__", broken)
    each = loader(data, workers=workers)
    message = f"sample 3 of domain {data.names[1]} cannot be read: OSError: .*Input/output error"
    with pytest.raises(RuntimeError, match=message):
        read_on(each)
    each.close()


def in_a_daemon(data, results) -> None:
    each = loader(data, workers=2)
    results.put((type(each._reader).__name__, rows(each.next_batch())))


def test_a_daemonic_process_reads_itself(data) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=in_a_daemon, args=(data, results), daemon=True)
    process.start()
    try:
        found = results.get(timeout=PATIENCE_S)
        assert found == ("SequenceReader", rows(loader(data).next_batch()))
    finally:
        process.kill()
        process.join()


def read_and_be_killed(data, pids) -> None:
    torch.set_num_threads(2)
    square = torch.randn(300, 300)
    square @ square  # torch's threads are running when the workers are forked
    each = loader(data, workers=2)
    each.next_batch()
    pids.send([worker.pid for worker in workers_of(each)])
    os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether a process is there and not only waiting for its parent to hear of its end."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_killed_rank_leaves_no_workers(data) -> None:
    with in_a_child(read_and_be_killed, data) as (process, pids):
        assert len(pids) == 2
        process.join(PATIENCE_S)
        assert process.exitcode == -signal.SIGKILL
        deadline = time.monotonic() + PATIENCE_S
        while any(map(is_running, pids)):
            assert time.monotonic() < deadline, f"workers {pids} outlived their parent"
            time.sleep(0.1)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_worker_ends_that_was_an_orphan_before_it_looked(
    is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOOK_S", 0.01)
    parent = os.getpid() if is_there else os.getpid() + 1

    def worker() -> None:
        processes.begin_worker(parent)
        time.sleep(0.5 if is_there else 60.0)

    process = multiprocessing.get_context("fork").Process(target=worker)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == (0 if is_there else 1)
