"""Sequences of whole conversations: one in each sequence, or several packed into it."""

from __future__ import annotations

import bisect
import functools
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megashear.data.batch import DocumentBorders
from megashear.data.context import FILLING
from megashear.data.held_out import HeldOutSet
from megashear.data.sequences import DomainSequences

logger = logging.getLogger(__name__)


class ConversationRows:
    """Conversations of a domain laid into rows of one length, each whole within one row.

    A conversation longer than a row is cut at its end, and dropped if no token to learn is left.
    Which conversations share a row depends on their lengths alone.

    Args:
        text: the conversations, a document each.
        sequence_length: tokens that the model sees of a row.
        is_packed: lay as many into a row as it has room for; else one into each.
    """

    def __init__(self, text: IndexedDataset, sequence_length: int, *, is_packed: bool) -> None:
        self._text = text
        self._size = sequence_length + 1
        lengths = np.minimum(text.sequence_lengths, self._size)
        is_cut = text.sequence_lengths > self._size
        kept = ~is_cut
        for number in np.flatnonzero(is_cut):
            kept[number] = bool((text.get(int(number), length=self._size) >= 0).any())
        self.num_cut = int((is_cut & kept).sum())
        """Conversations of which only the beginning is read."""
        self.num_dropped = int((~kept).sum())
        """Conversations that are not read at all."""
        self.num_conversations = int(kept.sum())
        """Conversations that are read."""
        self.num_tokens = int(lengths[kept].sum(dtype=np.int64))
        """Tokens that are read."""
        numbers = np.flatnonzero(kept)
        rows = np.arange(len(numbers))
        if is_packed:
            rows = best_fit(lengths[numbers], self._size)
        order = np.argsort(rows, kind="stable")
        self._members = numbers[order]
        self._starts = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def tokens(self, row: int) -> Tensor:
        """Return the stored tokens of a row, int64 [sequence_length + 1]; see `context`."""
        parts = self._parts(row)
        filling = np.full(self._size - sum(map(len, parts)), FILLING)
        return torch.from_numpy(np.concatenate([*parts, filling]).astype(np.int64))

    def documents(self, row: int) -> Tensor:
        """Return the number of the conversation of each token of a row, shaped like it.

        What fills the row up counts as one more.
        """
        lengths = [len(part) for part in self._parts(row)]
        lengths.append(self._size - sum(lengths))
        return torch.from_numpy(np.arange(len(lengths), dtype=np.int64).repeat(lengths))

    def _parts(self, row: int) -> list[npt.NDArray[np.int32]]:
        members = self._members[self._starts[row] : self._starts[row + 1]]
        return [self._text.get(int(number))[: self._size] for number in members]


def best_fit(lengths: npt.NDArray[np.integer], size: int) -> npt.NDArray[np.int64]:
    """Return the row of each item: the longest items first, each into the fullest row with room.

    Args:
        lengths: of the items, at most ``size`` each.
        size: of a row.

    Source: Johnson 1974, "Fast algorithms for bin packing": at most 11/9 of the fewest rows, and 1.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # those that some row has, rising
    num_rows = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = num_rows, size
            num_rows += 1
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        rows[item] = row
        left = by_room.setdefault(room - length, [])
        if not left:
            bisect.insort(rooms, room - length)
        left.append(row)
    return rows


class ConversationSequences(DomainSequences):
    """Rows of whole conversations of one domain, shuffled anew in each epoch.

    Sample n depends on the text, the sequence length, packing, and (seed, domain, n) alone.
    """

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int,
        seed: int,
        domain_index: int,
        *,
        is_packed: bool,
    ) -> None:
        """Open a domain; see `DomainSequences`.

        Raises:
            ValueError: the files do not exist, or no conversation has a token to learn.
        """
        self.is_packed = is_packed
        super().__init__(prefix, sequence_length, seed, domain_index)

    def __getitem__(self, sample: int) -> Tensor:
        """Return the stored tokens of a sample, int64 [sequence_length + 1]."""
        return self._rows.tokens(self._row(sample))

    def documents(self, sample: int) -> Tensor:
        """Return the number of the conversation of each token of a sample, shaped like it."""
        return self._rows.documents(self._row(sample))

    def prepare(self, sample: int) -> None:
        """Shuffle the epoch that a sample is in."""
        self._row(sample)

    def count(self, sequence_length: int) -> int:
        """Return the rows of one epoch at a sequence length."""
        if sequence_length == self.sequence_length:
            return len(self._rows)
        return len(ConversationRows(self._text, sequence_length, is_packed=self.is_packed))

    def _check(self, prefix: str | Path) -> None:
        _check_rows(self._rows, prefix, self.sequence_length)
        rows = self._rows
        places = len(rows) * (self.sequence_length + 1)
        logger.info(
            "domain %s: an epoch is %d conversations in %d sequences of %d tokens, %.1f %% of them "
            "filled; %d of the conversations are cut at --seq-length, and %d others, of which no "
            "token of the assistant would be left, are not read",
            *(self.name, rows.num_conversations, len(rows), self.sequence_length),
            *(100 * rows.num_tokens / places, rows.num_cut, rows.num_dropped),
        )

    @functools.cached_property
    def _rows(self) -> ConversationRows:
        return ConversationRows(self._text, self.sequence_length, is_packed=self.is_packed)

    def _row(self, sample: int) -> int:
        epoch, place = self.place(sample)
        if epoch != self._epoch:
            mixed = np.random.SeedSequence((self.seed, self.domain_index, epoch))
            self._order = np.random.default_rng(mixed).permutation(len(self._rows))
            self._epoch = epoch
        return int(self._order[place])


class HeldOutConversations(HeldOutSet):
    """Held-out conversations of a domain, in rows."""

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int,
        *,
        is_packed: bool,
        domain_index: int = 0,
        borders: DocumentBorders | None = None,
    ) -> None:
        """Open a held-out set; see `HeldOutSet`.

        Raises:
            ValueError: no such files, or no conversation has a token to learn.
        """
        self._is_packed = is_packed
        super().__init__(prefix, sequence_length, domain_index=domain_index, borders=borders)

    def __getitem__(self, index: int) -> Tensor:
        """Return the stored tokens of a row, int64 [sequence_length + 1]."""
        return self._rows.tokens(index)

    def documents(self, index: int) -> Tensor:
        """Return the number of the conversation of each token of a row, shaped like it."""
        return self._rows.documents(index)

    def _count(self, prefix: str | Path) -> int:
        _check_rows(self._rows, prefix, self.sequence_length)
        return len(self._rows)

    @functools.cached_property
    def _rows(self) -> ConversationRows:
        return ConversationRows(self._text, self.sequence_length, is_packed=self._is_packed)


def _check_rows(rows: ConversationRows, prefix: str | Path, sequence_length: int) -> None:
    """Refuse a domain of which nothing is read.

    Raises:
        ValueError: nothing is.
    """
    if not len(rows):
        raise ValueError(
            f"{prefix}.bin has {rows.num_dropped} conversations, and in none of them does the "
            f"assistant speak within the first {sequence_length + 1} tokens; raise --seq-length"
        )
