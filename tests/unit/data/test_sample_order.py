"""Law 5 on text whose every token is another: which samples are read, whatever happens to a run."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megashear.data.loader import MixtureLoader
from megashear.data.loader_state import LoaderState
from megashear.data.mixture import DomainMixture
from megashear.data.sequences import DomainSequences
from tests.unit.data.test_mixture import ROUNDING, harmonic, weights_of

LENGTH = 8
DOCUMENTS = (40, 90, 230)
"""Documents of each domain; the first is read many times below."""
FAR = 10**6
"""Between the tokens of two domains, so that a token names its domain."""
PATIENCE_S = 60.0

Sample = tuple[int, int]
"""Domain and first token, which no other sample of an epoch begins with."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Prefixes of three domains in which no token is there twice."""
    folder, generator = tmp_path_factory.mktemp("counted"), np.random.default_rng(0)
    prefixes = []
    for domain, num_documents in enumerate(DOCUMENTS):
        prefix, token = folder / f"domain{domain}", domain * FAR
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for length in generator.integers(1, 60, num_documents).tolist():
            builder.add_document(np.arange(token, token + length), [length])
            token += length
        builder.finalize(f"{prefix}.idx")
        prefixes.append(prefix)
    return prefixes


class Layout(NamedTuple):
    """What may change when a run is resumed, and must not change what is read."""

    data_parallel_size: int = 1
    micro_batch_size: int = 1
    num_microbatches: int = 12
    num_workers: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.data_parallel_size * self.micro_batch_size * self.num_microbatches


def replicas(
    texts: Sequence[Path], layout: Layout, state: LoaderState | None = None
) -> list[MixtureLoader]:
    """One loader for each replica, all of them where ``state`` was saved."""
    found = []
    for rank in range(layout.data_parallel_size):
        each = MixtureLoader(
            [DomainSequences(text, LENGTH, 7, number) for number, text in enumerate(texts)],
            DomainMixture([1 / len(texts)] * len(texts)),
            global_batch_size=layout.global_batch_size,
            micro_batch_size=layout.micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=layout.data_parallel_size,
            num_workers=layout.num_workers,
        )
        if state is not None:
            each.load_state_dict(state)
        found.append(each)
    return found


def read_batch(loaders: Sequence[MixtureLoader]) -> list[Sample]:
    """The next global batch in order, put together from what the replicas read."""
    placed: dict[int, Sample] = {}
    for each in loaders:
        for batch in each.next_batch():
            domains, first = batch.domains.tolist(), batch.tokens[:, 0].tolist()
            placed |= zip(batch.positions.tolist(), zip(domains, first))
    assert sorted(placed) == list(range(loaders[0]._global_batch_size))  # each place once
    return [placed[place] for place in range(len(placed))]


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Layout, list[tuple[list[float], int]]]]:
    """Stretches between resumes: a layout, and weights with the batches they hold for."""
    layouts = st.builds(Layout, st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.just(0))
    stretch = st.lists(
        st.tuples(weights_of(len(DOCUMENTS)), st.integers(0, 5)), min_size=1, max_size=3
    )
    return draw(st.lists(st.tuples(layouts, stretch), min_size=1, max_size=4))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(history=histories())
def test_samples_follow_the_weights_and_nothing_else(texts: list[Path], history) -> None:
    alone = DomainMixture([1 / len(texts)] * len(texts))  # knows no layout and no resume
    promised, state, read, drawn = np.zeros(len(texts)), None, [], []
    for layout, stretch in history:
        loaders = replicas(texts, layout, state)
        for weights, num_batches in stretch:
            for mixture in (alone, *(each.mixture for each in loaders)):
                mixture.set_weights(weights)
            for _ in range(num_batches):
                read += read_batch(loaders)
                drawn += [alone.draw() for _ in range(layout.global_batch_size)]
                promised += layout.global_batch_size * alone.weights
                states = [each.state_dict() for each in loaders]
                assert all(other == states[0] for other in states)  # every rank agrees
                counts = np.array(states[0]["mixture"]["drawn"])
                assert counts.sum() == len(read)
                behind = promised - counts
                assert behind.min() > -1 - ROUNDING * len(read)
                assert behind.max() <= harmonic(len(texts)) - 1 + ROUNDING * len(read)
        state = json.loads(json.dumps(loaders[0].state_dict()))
    assert [domain for domain, _ in read] == [domain for domain, _ in drawn]
    assert_epochs_are_whole(texts, read)


def assert_epochs_are_whole(texts: Sequence[Path], read: Sequence[Sample]) -> None:
    """Nothing is skipped or repeated within an epoch, and samples are those of their number."""
    for number, text in enumerate(texts):
        domain = DomainSequences(text, LENGTH, 7, number)
        first = [token for which, token in read if which == number]
        size = domain.samples_per_epoch
        for epoch in range(0, len(first), size):
            of_epoch = first[epoch : epoch + size]
            assert len(set(of_epoch)) == len(of_epoch)
        assert first == [int(domain[sample][0]) for sample in range(len(first))]


def test_a_sample_read_twice_is_noticed(texts: list[Path]) -> None:
    loaders = replicas(texts, Layout())
    read = read_batch(loaders) + read_batch(loaders)
    assert_epochs_are_whole(texts, read)
    with pytest.raises(AssertionError):
        assert_epochs_are_whole(texts, [*read, read[0]])


# --- killed


CHANGES = {
    0: [0.2, 0.3, 0.5],
    600: [0.613, 0.24, 0.147],
    2400: [0.1, 0.1, 0.8],
    3600: [0.3, 0.6, 0.1],
}
"""Weights by the number of the sample from which they hold."""
TOTAL = 6000
KILLED_AFTER = 1800
BEFORE = Layout(data_parallel_size=2, micro_batch_size=3, num_microbatches=4, num_workers=2)
AFTER = [
    Layout(data_parallel_size=3, micro_batch_size=2, num_microbatches=10, num_workers=1),
    Layout(data_parallel_size=1, micro_batch_size=4, num_microbatches=6, num_workers=0),
]


def samples(loaders: Sequence[MixtureLoader], until: int) -> Iterator[tuple[LoaderState, list]]:
    """State before and samples of each batch; weights change where they are to."""
    while loaders[0].consumed_samples < until:
        place = loaders[0].consumed_samples
        if place in CHANGES:
            for each in loaders:
                each.mixture.set_weights(CHANGES[place])
        state = loaders[0].state_dict()
        yield state, read_batch(loaders)


def train_until_killed(texts: Sequence[Path], log: Path) -> None:
    with log.open("w") as file:
        for state, batch in samples(replicas(texts, BEFORE), 10**9):
            file.write(json.dumps([state, batch]) + "\n")
            file.flush()


def run_to_the_end(texts: Sequence[Path], layout: Layout, state: LoaderState | None) -> list:
    loaders = replicas(texts, layout, state)
    found = [sample for _, batch in samples(loaders, TOTAL) for sample in batch]
    for each in loaders:
        each.close()
    return found


@pytest.mark.parametrize("after", AFTER, ids=["dp3", "in-process"])
def test_a_killed_run_goes_on_at_another_layout_with_the_same_samples(
    texts: list[Path], tmp_path: Path, after: Layout
) -> None:
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=(texts, log)
    )
    process.start()
    deadline = time.monotonic() + PATIENCE_S
    lines: list[str] = []
    while len(lines) * BEFORE.global_batch_size < KILLED_AFTER:
        assert time.monotonic() < deadline, "the run is stuck"
        lines = log.read_text().splitlines() if log.exists() else []
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # a checkpoint of some while ago: what was read since is read again
    at = 1320
    num_batches = at // BEFORE.global_batch_size
    state, _ = json.loads(lines[num_batches])
    assert sum(state["mixture"]["drawn"]) == at
    read = [tuple(s) for line in lines[:num_batches] for s in json.loads(line)[1]]
    read += run_to_the_end(texts, after, state)
    assert read == run_to_the_end(texts, Layout(), None)
    assert len(read) == TOTAL
    assert_epochs_are_whole(texts, read)


def test_a_killed_run_that_forgets_what_it_owed_is_noticed(texts: list[Path]) -> None:
    whole = run_to_the_end(texts, Layout(), None)
    seen = itertools.islice(samples(replicas(texts, Layout()), TOTAL), 111)
    state = [state for state, _ in seen][-1]
    at = sum(state["mixture"]["drawn"])
    state["mixture"]["owed"] = [0.0] * len(texts)
    assert run_to_the_end(texts, AFTER[1], state) != whole[at:]
