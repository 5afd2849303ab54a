import json
import logging
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megashear.data.batch import DocumentBorders, MicroBatch
from megashear.data.loader import MixtureLoader
from megashear.data.mixture import DataExhausted, DomainMixture
from megashear.data.sequences import DomainSequences

LENGTH = 250  # leaves so few sequences that the run below crosses epochs
WEIGHTS = [0.5, 0.2, 0.3]
OTHER_WEIGHTS = [0.1, 0.1, 0.8]
STEPS = 30


def loader(
    data,
    *,
    batch=12,
    micro=1,
    rank=0,
    size=1,
    seed=5,
    length=LENGTH,
    workers=0,
    exhausted="repeat",
    borders=None,
    is_read=True,
) -> MixtureLoader:
    domains = [
        DomainSequences(data.prefix(name), length, seed, i) for i, name in enumerate(data.names)
    ]
    return MixtureLoader(
        domains,
        DomainMixture(
            WEIGHTS,
            available=None
            if exhausted == "repeat"
            else [domain.samples_per_epoch for domain in domains],
            when_exhausted=exhausted,
        ),
        global_batch_size=batch,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        num_workers=workers,
        borders=borders,
        is_read=is_read,
    )


def rows(batches: list[MicroBatch]) -> list[tuple]:
    """(position, domain, text) of every sequence, in order."""
    return [
        (batch.positions[i].item(), batch.domains[i].item(), *batch.tokens[i].tolist())
        for batch in batches
        for i in range(len(batch.tokens))
    ]


def run(each: MixtureLoader, steps: range) -> list[list[tuple]]:
    """Rows of each step; the weights change at step 10."""
    found = []
    for step in steps:
        if step == 10:
            each.mixture.set_weights(OTHER_WEIGHTS)
        found.append(rows(each.next_batch()))
    return found


def test_labels_are_the_next_tokens(data) -> None:
    batches = loader(data, micro=3).next_batch()
    assert len(batches) == 4
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (3, LENGTH)
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        assert batch.tokens.dtype == batch.labels.dtype == batch.domains.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.float32
        assert batch.loss_mask.all()
    assert [p for batch in batches for p in batch.positions.tolist()] == list(range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_borders_are_off_and_mark_what_they_are_asked_to(data, workers: int) -> None:
    plain = loader(data, micro=3).next_batch()
    assert all(batch.documents is None and batch.loss_mask.all() for batch in plain)
    apart = loader(data, micro=3, workers=workers, borders=DocumentBorders(part_attention=True))
    masked = loader(data, micro=3, workers=workers, borders=DocumentBorders(mask_loss=True))
    num_borders, seen = 0, [0, 0, 0]
    for batch, parted, uncounted in zip(plain, apart.next_batch(), masked.next_batch()):
        assert torch.equal(parted.tokens, batch.tokens)
        assert torch.equal(uncounted.labels, batch.labels)
        assert parted.loss_mask.all()
        assert uncounted.documents is None
        for row, domain in enumerate(batch.domains.tolist()):
            numbers = apart.domains[domain].documents(seen[domain])
            seen[domain] += 1
            assert torch.equal(parted.documents[row], numbers[:-1])
            first = numbers[1:] != numbers[:-1]
            assert torch.equal(uncounted.loss_mask[row] == 0, first)
            # documents begin with BOS: it is the label that does not count
            assert set(batch.labels[row][first].tolist()) <= {data.bos_id}
            num_borders += int(first.sum())
    assert num_borders > 5
    apart.close()
    masked.close()


@pytest.fixture(scope="module")
def whole(data) -> list[list[tuple]]:
    return run(loader(data), range(STEPS))


def assert_same_batches(whole: list, parts: list[list]) -> None:
    for step, expected in enumerate(whole):
        assert [row for part in parts for row in part[step]] == expected, step


@pytest.mark.parametrize(
    ("size", "micro", "workers"),
    [(1, 4, 0), (2, 3, 0), (3, 2, 0), (4, 1, 0), (12, 1, 0), (1, 1, 1), (1, 2, 3), (2, 6, 2)],
)
def test_every_layout_and_number_of_workers_reads_the_same_batches(
    data, whole, size, micro, workers
) -> None:
    parts = []
    for rank in range(size):
        each = loader(data, rank=rank, size=size, micro=micro, workers=workers)
        parts.append(run(each, range(STEPS)))
        each.close()
    assert_same_batches(whole, parts)


def test_equal_batches_notice_a_replica_that_draws_for_itself(data, whole) -> None:
    parts = [run(loader(data, batch=6), range(STEPS)) for _ in range(2)]
    with pytest.raises(AssertionError):
        assert_same_batches(whole, parts)


def test_the_run_crosses_epochs(data, whole) -> None:
    drawn = Counter(row[1] for step in whole for row in step)
    domains = loader(data).domains
    assert any(drawn[d.domain_index] > 2 * d.samples_per_epoch for d in domains)


def test_within_an_epoch_nothing_is_skipped_or_repeated(data, whole) -> None:
    for domain in loader(data).domains:
        read = [row[2:] for step in whole for row in step if row[1] == domain.domain_index]
        expected = [tuple(domain[i].tolist()[:-1]) for i in range(len(read))]
        assert read == expected


@pytest.mark.parametrize("stop", [1, 7, 10, 17])
@pytest.mark.parametrize(("size", "workers"), [(1, 0), (3, 0), (1, 2)])
def test_resumed_run_goes_on_with_the_same_batches(
    data, whole, stop: int, size: int, workers: int
) -> None:
    first = loader(data, rank=0, size=2, workers=workers)
    run(first, range(stop))
    state = json.loads(json.dumps(first.state_dict()))
    assert first.consumed_samples == 12 * stop  # what was read ahead is not consumed
    first.close()
    parts = []
    for rank in range(size):
        resumed = loader(data, rank=rank, size=size)
        resumed.load_state_dict(state)
        assert resumed.consumed_samples == 12 * stop
        parts.append(run(resumed, range(stop, STEPS)))
    assert_same_batches(whole[stop:], parts)


@pytest.mark.parametrize("batch", [4, 36])
def test_another_global_batch_size_goes_on_with_the_same_samples(data, whole, batch: int) -> None:
    first = loader(data)
    run(first, range(6))
    other = loader(data, batch=batch)
    other.load_state_dict(first.state_dict())
    found = [row[1:] for _ in range(36 // batch) for row in rows(other.next_batch())]
    assert found == [row[1:] for step in whole[6:9] for row in step]


def test_resume_notices_a_forgotten_mixture(data, whole) -> None:
    with pytest.raises(AssertionError):
        assert_same_batches(whole[7:], [run(loader(data), range(7, STEPS))])


def test_state_does_not_grow(data) -> None:
    each = loader(data)
    before = len(json.dumps(each.state_dict()))
    run(each, range(STEPS))
    assert len(json.dumps(each.state_dict())) < before + 60 * len(data.names)


def test_only_own_samples_are_read(data, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = DomainSequences.__getitem__

    def noted(domain: DomainSequences, sample: int) -> torch.Tensor:
        read.append(sample)
        return original(domain, sample)

    monkeypatch.setattr(DomainSequences, "__getitem__", noted)
    loader(data, rank=1, size=4).next_batch()
    assert len(read) == 3


@pytest.mark.parametrize("borders", [None, DocumentBorders(mask_loss=True)])
def test_a_rank_that_needs_no_text_draws_alike_and_reads_nothing(
    data, monkeypatch: pytest.MonkeyPatch, borders: DocumentBorders | None
) -> None:
    reading = loader(data, micro=3, borders=borders)
    wanted = [reading.next_batch() for _ in range(3)]
    monkeypatch.delattr(DomainSequences, "__getitem__")
    drawing = loader(data, micro=3, workers=2, borders=borders, is_read=False)
    for batches in wanted:
        for found, batch in zip(drawing.next_batch(), batches, strict=True):
            assert torch.equal(found.positions, batch.positions)
            assert torch.equal(found.domains, batch.domains)
            assert found.tokens.shape == batch.tokens.shape
            assert found.loss_mask.shape == batch.loss_mask.shape
            assert not found.tokens.any()
    assert drawing.state_dict() == reading.state_dict()
    assert drawing._reader is not None
    assert all(domain._sequences is None for domain in drawing.domains)


@pytest.fixture
def second_of_two_ranks() -> Iterator[None]:
    """A process group whose other rank never comes: whoever waits for it waits for ever."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two_ranks")
def test_ranks_of_a_group_need_not_wait_for_each_other(untouched, whole) -> None:
    # Megatron's own cached way has rank 0 build the index and all others read its files.
    assert run(loader(untouched), range(STEPS)) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_ends_before_the_first_batch_that_has_no_text(data, workers: int) -> None:
    each = loader(data, batch=4, exhausted="stop", workers=workers)
    plain, sizes = DomainMixture(WEIGHTS), [d.samples_per_epoch for d in each.domains]
    steps = 0
    while each.ran_out() is None:
        each.next_batch()
        steps += 1
        drawn = [plain.draw() for _ in range(4)]
        assert all(sample < sizes[domain] for domain, sample in drawn)
    assert steps > 2
    domain, sample = next((d, n) for d, n in (plain.draw() for _ in range(4)) if n == sizes[d])
    name = data.names[domain]
    assert f"domain {name} is read: sample " in each.ran_out()
    assert f"would be number {sample + 1} of its {sample} sequences" in each.ran_out()
    state = each.state_dict()
    with pytest.raises(DataExhausted):
        each.next_batch()
    assert each.state_dict() == state  # it ends where the last batch ended
    each.mixture.set_weights([float(d != domain) / 2 for d in range(3)])
    assert each.ran_out() is None
    each.next_batch()  # what was expected to end goes on
    each.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_redistribute_reads_every_sample_once(data, caplog, workers: int) -> None:
    with caplog.at_level(logging.WARNING):
        each = loader(data, batch=2, exhausted="redistribute", workers=workers)
        found = []
        while each.ran_out() is None:
            found += rows(each.next_batch())
        each.close()
    assert each.ran_out().startswith("the domains with a weight are all read")
    sizes = [domain.samples_per_epoch for domain in each.domains]
    assert sum(sizes) - len(found) < 2  # less than a batch is left
    for domain, size in enumerate(sizes):
        texts = [row[2:] for row in found if row[1] == domain]
        assert size - len(texts) < 2
        assert texts == [tuple(each.domains[domain][i][:-1].tolist()) for i in range(len(texts))]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) >= 2
    assert all("its share goes to the others in proportion" in line for line in told)


def test_other_replicas_end_at_the_same_step(data) -> None:
    ends = []
    for rank in range(3):
        each, steps = loader(data, batch=6, rank=rank, size=3, exhausted="stop"), 0
        while each.ran_out() is None:
            each.next_batch()
            steps += 1
        ends.append((steps, each.ran_out(), each.state_dict()))
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize(
    ("exhausted", "way_out"),
    [
        ("repeat", "and repeats from there"),
        ("redistribute", "and then leaves its share to the others"),
        ("stop", "and ends the run there"),
    ],
)
def test_a_plan_that_wants_more_text_than_there_is_is_told(
    data, caplog, exhausted: str, way_out: str
) -> None:
    each = loader(data, exhausted=exhausted)
    size = each.domains[2].samples_per_epoch  # weight .3
    with caplog.at_level(logging.WARNING):
        each.warn_of_short_domains(int(size / 0.3))
        each.warn_of_short_domains(12)
        assert not [r for r in caplog.records if "numbers" in r.getMessage()]
        caplog.clear()
        each.warn_of_short_domains(int(3 * size / 0.3) + 1)
    told = [r.getMessage() for r in caplog.records if data.names[2] in r.getMessage()]
    assert len(told) == 1
    assert f"wants 3.0 times its {size} sequences" in told[0]
    assert f"after about {int(size / 0.3 / 12)} steps {way_out}" in told[0]


def test_new_epochs_are_told_less_and_less_often(data, caplog) -> None:
    each = loader(data, batch=1)
    size = each.domains[2].samples_per_epoch
    each.mixture.set_weights([0.0, 0.0, 1.0])
    with caplog.at_level(logging.WARNING):
        for _ in range(size):
            each.next_batch()
        assert not caplog.records
        for _ in range(8 * size):
            each.next_batch()
    told = [record.getMessage() for record in caplog.records]
    assert [f"in epoch {epoch} " in line for epoch, line in zip((2, 4, 8), told)] == [True] * 3
    name = each.domains[2].name
    assert f"domain {name}: in epoch 2 from here on, its {size} sequences" in told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "--num-workers is -1; wanted 0"),
        ({"batch": 12, "micro": 5}, "12 is not a positive multiple .* 5 \\* data-parallel size 1"),
        ({"batch": 12, "micro": 2, "size": 4}, r"--micro-batch-size 2 \* .* size 4 = 8"),
        ({"batch": 0}, "--global-batch-size 0 is not a positive multiple"),
        ({"micro": 0}, "--micro-batch-size 0"),
    ],
)
def test_batches_that_do_not_divide_are_refused(data, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(data, **options)


def test_weights_of_other_domains_are_refused(data) -> None:
    with pytest.raises(ValueError, match="3 domains but --domain-weights has 2"):
        MixtureLoader(
            loader(data).domains,
            DomainMixture([0.5, 0.5]),
            global_batch_size=2,
            micro_batch_size=1,
            data_parallel_rank=0,
            data_parallel_size=1,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ["cc"]}, r"domains was \['cc'\] in the saved run.*data of the saved run"),
        ({"sequence_length": 4096}, "samples_per_epoch was .*repeat and skip samples"),
        ({"samples_per_epoch": [1, 2, 3]}, "samples_per_epoch was .*repeat and skip samples"),
        ({"seed": 42}, "seed was 42 in the saved run and is 5 now.*--seed"),
    ],
)
def test_state_of_another_run_is_refused(data, change: dict, message: str) -> None:
    each = loader(data)
    with pytest.raises(ValueError, match=message):
        each.load_state_dict({**each.state_dict(), **change})


SHORTER = 100
"""Tokens of a sequence after the change."""


def with_length(data, state: dict, length: int, **more) -> MixtureLoader:
    """A loader of another sequence length that goes on from a state."""
    each = loader(data, length=length, **more)
    each.load_state_dict(json.loads(json.dumps(state)))
    return each


def test_another_sequence_length_begins_the_next_epochs(
    data, caplog: pytest.LogCaptureFixture
) -> None:
    before = loader(data)
    for _ in range(9):
        before.next_batch()
    drawn, sizes = before.mixture.drawn.tolist(), [d.samples_per_epoch for d in before.domains]
    assert any(count > size for count, size in zip(drawn, sizes)), "none was read twice"
    after = with_length(data, before.state_dict(), SHORTER)
    assert after.consumed_samples == before.consumed_samples
    batches = [row for _ in range(4) for row in rows(after.next_batch())]
    # by an independent count: the first epoch of which nothing was read, from its beginning
    for number, domain in enumerate(after.domains):
        epoch, partly = divmod(drawn[number], sizes[number])
        epoch += partly > 0
        fresh = DomainSequences(data.prefix(domain.name), SHORTER, 5, number)
        found = [row[2:] for row in batches if row[1] == number]
        wanted = [
            tuple(fresh[epoch * fresh.samples_per_epoch + n][:-1].tolist())
            for n in range(len(found))
        ]
        assert found == wanted, domain.name
        read = partly * LENGTH
        if partly:
            assert f"{read} of the {domain.num_tokens} tokens of its epoch {epoch - 1}" in (
                caplog.text
            )
        assert domain.epochs(drawn[number]) == epoch
    assert f"--seq-length was {LENGTH} in the saved run and is {SHORTER} now" in caplog.text


def test_a_run_of_two_sequence_lengths_is_resumed(data) -> None:
    before = loader(data)
    before.next_batch()
    whole = with_length(data, before.state_dict(), SHORTER)
    halves = with_length(data, before.state_dict(), SHORTER)
    for _ in range(3):
        whole.next_batch()
        halves.next_batch()
    resumed = with_length(data, halves.state_dict(), SHORTER, size=2)  # replica 0 of 2
    for _ in range(12):
        assert rows(resumed.next_batch()) == rows(whole.next_batch())[:6]
    # the twin: a state that forgets where the epochs begin reads other text
    state = halves.state_dict() | {"origins": [[0, 0] for _ in halves.domains]}
    again, right = (with_length(data, each, SHORTER) for each in (state, halves.state_dict()))
    assert rows(again.next_batch()) != rows(right.next_batch())


@pytest.mark.parametrize("policy", ["redistribute", "stop"])
def test_what_is_left_of_an_epoch_of_another_length_is_refused(data, policy: str) -> None:
    before = loader(data, exhausted=policy)
    before.next_batch()
    with pytest.raises(ValueError, match=rf"is 100 and samples of another.*{policy} needs it"):
        with_length(data, before.state_dict(), SHORTER, exhausted=policy)
