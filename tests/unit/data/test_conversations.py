"""Rows hold whole conversations, each once an epoch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megashear.data.batch import DocumentBorders, micro_batch
from megashear.data.context import as_context, ids_of, largest_id
from megashear.data.conversations import ConversationSequences, HeldOutConversations, best_fit
from megashear.data.indexed import write_index
from megashear.data.loader_state import LoaderState, restore, state_of
from megashear.data.mixture import DomainMixture

LENGTH = 12


def conversation(number: int, length: int, targets: int) -> np.ndarray:
    """Tokens that say where they are from; the last ``targets`` are to be learned."""
    ids = np.arange(length, dtype=np.int32) + 100 * (number + 1)
    return np.concatenate([as_context(ids[: length - targets]), ids[length - targets :]])


SIZES = [(5, 2), (13, 3), (4, 1), (20, 2), (18, 9), (7, 3), (3, 1), (6, 2), (13, 1)]
"""Length, and tokens to learn, of each conversation; 13 fit into a row."""


def write(folder: Path, sizes: list[tuple[int, int]] = SIZES) -> Path:
    texts = [conversation(n, length, targets) for n, (length, targets) in enumerate(sizes)]
    prefix = folder / "chat"
    Path(f"{prefix}.bin").write_bytes(np.concatenate(texts).tobytes())
    lengths = folder / "lengths"
    lengths.write_bytes(np.array([len(text) for text in texts], dtype=np.int32).tobytes())
    write_index(Path(f"{prefix}.idx"), lengths, "int32")
    return prefix


def opened(prefix: Path, *, is_packed: bool, seed: int = 3) -> ConversationSequences:
    return ConversationSequences(prefix, LENGTH, seed, 0, is_packed=is_packed)


@given(st.lists(st.integers(1, 30), max_size=40))
def test_rows_hold_no_more_than_their_size_and_are_few(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), 30)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert (filled <= 30).all()
    assert (filled > 0).all()
    # no two rows would fit into one
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > 30


@pytest.mark.parametrize("is_packed", [False, True])
def test_every_conversation_is_whole_in_one_row_once_an_epoch(
    tmp_path: Path, is_packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        rows = opened(write(tmp_path), is_packed=is_packed)
    for epoch in range(3):
        samples = range(epoch * rows.samples_per_epoch, (epoch + 1) * rows.samples_per_epoch)
        found = []
        for sample in samples:
            text, documents = rows[sample], rows.documents(sample)
            assert text.shape == documents.shape == (LENGTH + 1,)
            parts = [text[documents == n].tolist() for n in range(int(documents.max()) + 1)]
            found += [part for part in parts if part != [-1] * len(part)]
        # that of 20 has nothing to learn in its first 13 tokens
        wanted = [
            conversation(n, *size)[: LENGTH + 1].tolist() for n, size in enumerate(SIZES) if n != 3
        ]
        assert sorted(found) == sorted(wanted)
    assert rows.samples_per_epoch == (5 if is_packed else 8)
    assert "1 of the conversations are cut at --seq-length, and 1 others" in caplog.text


def test_orders_differ_between_epochs_and_seeds_and_repeat(tmp_path: Path) -> None:
    prefix = write(tmp_path)

    def order(seed: int, first: int) -> list[int]:
        rows = opened(prefix, is_packed=False, seed=seed)
        return [int(ids_of(rows[n])[0]) for n in range(first, first + rows.samples_per_epoch)]

    assert order(3, 0) == order(3, 0)
    assert order(3, 0) != order(3, 8)
    assert order(3, 0) != order(4, 0)
    assert sorted(order(3, 0)) == sorted(order(3, 8)) == sorted(order(4, 0))


def test_labels_that_count_are_the_tokens_to_learn(tmp_path: Path) -> None:
    rows = opened(write(tmp_path), is_packed=True)
    text = torch.stack([rows[n] for n in range(rows.samples_per_epoch)])
    numbers = torch.stack([rows.documents(n) for n in range(rows.samples_per_epoch)])
    batch = micro_batch(
        *(text[:, :-1], text[:, 1:], [0] * len(text), range(len(text)), len(text)),
        borders=DocumentBorders(part_attention=True),
        documents=(numbers[:, :-1], numbers[:, 1:]),
    )
    # the one of 18 is cut in its 9 tokens to learn, after 4 of them
    wanted = sum(targets for n, (_, targets) in enumerate(SIZES) if n not in (3, 4)) + 4
    assert batch.loss_mask.sum() == wanted
    assert batch.tokens.min() >= 0
    assert batch.labels.min() >= 0
    learned = batch.labels[batch.loss_mask.bool()]
    assert sorted(learned.tolist()) == sorted(text[text >= 0].tolist())


def test_a_run_resumes_with_the_packing_it_was_started_with(tmp_path: Path) -> None:
    prefix = write(tmp_path, [(10, 2)] * 4)  # no two fit into a row: as many rows either way

    def standing(state: LoaderState | None = None, *, is_packed: bool) -> LoaderState:
        rows, mixture = [opened(prefix, is_packed=is_packed)], DomainMixture([1.0])
        if state is not None:
            restore(state, rows, mixture)
        return state_of(rows, mixture)

    saved = standing(is_packed=True)
    assert standing(saved, is_packed=True) == saved
    with pytest.raises(ValueError, match=r"pack was True in .* False now.* with the saved --pack"):
        standing(saved, is_packed=False)
    # checkpoints of earlier versions do not say it
    del saved["pack"]  # type: ignore[misc]
    assert standing(saved, is_packed=False)["pack"] is False


def test_a_sequence_length_at_which_nobody_answers_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path, [(30, 2), (40, 1)])
    message = r"has 2 conversations, and in none of them does the assistant speak within the first "
    with pytest.raises(ValueError, match=message + "13 tokens; raise --seq-length"):
        opened(prefix, is_packed=True)
    with pytest.raises(ValueError, match=message):
        HeldOutConversations(prefix, LENGTH, is_packed=False)


def test_the_largest_id_may_be_context() -> None:
    assert largest_id(np.array([-8, 3, 5], dtype=np.int32)) == (7, 0)
    assert largest_id(np.array([8, 60000], dtype=np.uint16)) == (60000, 1)
