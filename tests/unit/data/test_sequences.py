import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megashear.data.sequences import DomainSequences

LENGTH = 24


def samples(sequences: DomainSequences, epoch: int) -> list[tuple[int, ...]]:
    n = sequences.samples_per_epoch
    return [tuple(sequences[i].tolist()) for i in range(epoch * n, (epoch + 1) * n)]


def open_domain(data, name: str = "numbers", **change) -> DomainSequences:
    arguments = {"sequence_length": LENGTH, "seed": 1, "domain_index": 2, **change}
    return DomainSequences(data.prefix(name), **arguments)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_has_every_token_once(data, epoch: int) -> None:
    sequences = open_domain(data)
    text = IndexedDataset(str(data.prefix("numbers")))
    have = np.bincount(np.concatenate([text[i] for i in range(len(text))]), minlength=300)
    n = sequences.samples_per_epoch
    assert n == (have.sum() - 1) // LENGTH
    labels = [token for sample in samples(sequences, epoch) for token in sample[1:]]
    used = np.bincount(labels, minlength=300)
    # Not a label: the first token of the epoch, and less than a sequence at its end.
    assert (used <= have).all()
    assert have.sum() - used.sum() == have.sum() - n * LENGTH <= LENGTH


def by_hand(data, name: str, seed: int) -> list[tuple[int, ...]]:
    """Sequences of the text packed in the order that numpy's RandomState(seed) gives, sorted.

    A list, for text may repeat itself.
    """
    text = IndexedDataset(str(data.prefix(name)))
    order = np.arange(len(text), dtype=np.int32)
    np.random.RandomState(seed).shuffle(order)
    flat = np.concatenate([text[i] for i in order]).tolist()
    starts = range(0, len(flat) - LENGTH, LENGTH)
    return sorted(tuple(flat[start : start + LENGTH + 1]) for start in starts)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_is_a_permutation_of_the_packed_text(data, epoch: int) -> None:
    mixed = np.random.SeedSequence((1, 2, epoch)).generate_state(1, np.uint32)[0]
    assert sorted(samples(open_domain(data), epoch)) == by_hand(data, "numbers", mixed)


def test_the_packing_notices_another_order_of_documents(data) -> None:
    assert sorted(samples(open_domain(data), 0)) != by_hand(data, "numbers", 0)


def test_epochs_differ_in_order_and_borders(data) -> None:
    sequences = open_domain(data)
    first, second = samples(sequences, 0), samples(sequences, 1)
    assert set(first) != set(second)
    assert samples(sequences, 0) == first  # going back is allowed


@pytest.mark.parametrize("change", [{"seed": 2}, {"domain_index": 0}])
def test_seed_and_domain_choose_the_order(data, change: dict) -> None:
    assert samples(open_domain(data, **change), 0) != samples(open_domain(data), 0)


def test_a_sample_depends_on_nothing_read_before(data) -> None:
    n = open_domain(data).samples_per_epoch
    forward = open_domain(data)
    in_order = [forward[i].tolist() for i in range(3 * n)]
    jumping = open_domain(data)
    for i in (2 * n + 3, 1, n, 3 * n - 1, 0):
        assert jumping[i].tolist() == in_order[i]


def test_documents_are_those_of_the_index(data) -> None:
    sequences = open_domain(data, sequence_length=250)
    text = IndexedDataset(str(data.prefix("numbers")))
    whole = [text[i].tolist() for i in range(len(text))]
    inner = 0
    for sample in range(sequences.samples_per_epoch + 3):
        tokens, numbers = sequences[sample].tolist(), sequences.documents(sample).tolist()
        assert len(numbers) == len(tokens) == 251
        parts = [
            [token for token, number in zip(tokens, numbers) if number == n]
            for n in range(numbers[-1] + 1)
        ]
        assert list(itertools.chain(*parts)) == tokens  # rising, from 0
        for part in parts[1:-1]:  # neither cut at its beginning nor at its end
            inner += 1
            assert part in whole
        if len(parts) > 1:
            assert any(document[-len(parts[0]) :] == parts[0] for document in whole)
            assert any(document[: len(parts[-1])] == parts[-1] for document in whole)
    assert inner > 3


def test_building_an_epoch_beforehand_changes_nothing(data, caplog) -> None:
    n = open_domain(data).samples_per_epoch
    prepared = open_domain(data)
    prepared.prepare(2 * n + 1)
    assert prepared[2 * n + 1].tolist() == open_domain(data)[2 * n + 1].tolist()
    assert not caplog.records  # nor does Megatron speak


def test_reading_leaves_no_files(untouched) -> None:
    before = sorted(os.listdir(untouched.directory))
    sequences = open_domain(untouched)
    samples(sequences, 0), samples(sequences, 1)
    assert sorted(os.listdir(untouched.directory)) == before


def test_text_of_exactly_one_sequence_is_enough(data) -> None:
    whole = open_domain(data)
    longest = open_domain(data, sequence_length=whole.num_tokens - 1)
    assert longest.samples_per_epoch == 1
    assert sorted(longest[7].tolist()) == sorted(longest[0].tolist())
    with pytest.raises(ValueError, match=r"numbers\.bin has \d+ tokens, one sequence of --seq-len"):
        open_domain(data, sequence_length=whole.num_tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 0}, "--seq-length is 0; wanted at least 1"),
        ({"seed": -1}, "--seed is -1; wanted an integer >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(data, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_domain(data, **change)


def test_files_that_do_not_belong_together_are_refused(data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.bin or .*does not exist; .*preprocess"):
        DomainSequences(tmp_path / "gone", LENGTH, 1, 0)
    index = Path(f"{data.prefix('words')}.idx").read_bytes()
    (tmp_path / "words.idx").write_bytes(index)
    (tmp_path / "words.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"words\.bin is empty"):
        DomainSequences(tmp_path / "words", LENGTH, 1, 0)
    (tmp_path / "words.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"words\.bin has 2 bytes, its \.idx wants \d+"):
        DomainSequences(tmp_path / "words", LENGTH, 1, 0)
