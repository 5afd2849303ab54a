"""Training sequences of one domain, numbered through any number of epochs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor


class DomainSequences:
    """Sequences of one domain, as the samples of an endless row of epochs.

    Documents are packed back to back, as Megatron-LM packs them: each epoch shuffles the documents,
    cuts their text into sequences that share their border token (every token but the first is a
    label once; less than one sequence is left over), and shuffles the sequences. Sample n depends
    on the text, the sequence length, and (seed, domain, n) alone.

    Each epoch is a ``GPTDataset`` of one epoch, held in memory: built with an empty cache path, it
    writes no files, so ranks need neither wait for one another nor race, and it needs no process
    group. Its one-epoch index takes 4 bytes per document and 12 bytes per sequence.
    """

    is_packed = False
    """Whether a sequence has several conversations (--pack)."""

    def __init__(
        self, prefix: str | Path, sequence_length: int, seed: int, domain_index: int
    ) -> None:
        """Open a domain.

        Args:
            prefix: path of the domain's ``.bin`` and ``.idx``, without these endings.
            sequence_length: tokens that the model sees of a sequence.
            seed: seed of all shuffling, >= 0.
            domain_index: place of the domain among the domains.

        Raises:
            ValueError: the files do not exist or have less text than one sequence.
        """
        if seed < 0:
            raise ValueError(f"--seed is {seed}; wanted an integer >= 0")
        self.name = Path(prefix).name
        self.sequence_length = sequence_length
        self.seed = seed
        self.domain_index = domain_index
        self._text = open_text(prefix)
        self.num_tokens = int(self._text.sequence_lengths.sum(dtype=np.int64))
        """Tokens of one epoch."""
        self._check(prefix)
        self.samples_per_epoch = self.count(sequence_length)
        """Sequences of one epoch."""
        self.origin = (0, 0)
        """Number of a sample that begins an epoch, and number of that epoch. Samples before it were
        drawn at another sequence length and cannot be read."""
        self._epoch = -1
        self._sequences: GPTDataset | None = None

    def __getitem__(self, sample: int) -> Tensor:
        """Return the tokens of a sample, int64 [sequence_length + 1]; any number >= 0 is valid."""
        epoch, place = self.place(sample)
        # GPTDataset's __getitem__ would also make masks and positions, which nobody uses.
        text, _ = self._of_epoch(epoch)._query_document_sample_shuffle_indices(place)
        return torch.from_numpy(text)

    def documents(self, sample: int) -> Tensor:
        """Return the number of the document of each token of a sample, int64, shaped like it.

        Documents are counted from 0 within the sample, by the borders in the ``.idx``.
        """
        epoch, place = self.place(sample)
        packed = self._of_epoch(epoch)
        number = packed.shuffle_index[place]
        first, offset = packed.sample_index[number]
        last, _ = packed.sample_index[number + 1]
        lengths = self._text.sequence_lengths[packed.document_index[first : last + 1]]
        lengths[0] -= offset
        numbers = np.arange(len(lengths), dtype=np.int64).repeat(lengths)
        return torch.from_numpy(numbers[: self.sequence_length + 1])

    def count(self, sequence_length: int) -> int:
        """Return the sequences of one epoch at a sequence length."""
        return (self.num_tokens - 1) // sequence_length

    def prepare(self, sample: int) -> None:
        """Build the index of the epoch that a sample is in."""
        self._of_epoch(self.place(sample)[0])

    def place(self, sample: int) -> tuple[int, int]:
        """Return the epoch of a sample, and its place in that epoch."""
        first, epoch = self.origin
        assert sample >= first, (sample, first)
        later, place = divmod(sample - first, self.samples_per_epoch)
        return epoch + later, place

    def epochs(self, num_drawn: int) -> float:
        """Return the epochs read once ``num_drawn`` samples are drawn, 1.5 for one and a half."""
        first, epoch = self.origin
        return epoch + (num_drawn - first) / self.samples_per_epoch

    def _check(self, prefix: str | Path) -> None:
        num_sequences(
            prefix,
            self.num_tokens,
            self.sequence_length,
            way_out="add text to this domain, leave it out,",
        )

    def _of_epoch(self, epoch: int) -> GPTDataset:
        """Return the sequences of one epoch; the latest epoch asked for is kept."""
        if self._sequences is None or epoch != self._epoch:
            self._sequences = self._build(epoch)
            self._epoch = epoch
        return self._sequences

    def _build(self, epoch: int) -> GPTDataset:
        # SeedSequence mixes, where seed + epoch would make domains and seeds share their orders.
        mixed = np.random.SeedSequence((self.seed, self.domain_index, epoch))
        prefix = self._text.path_prefix
        with _without_advice():
            config = GPTDatasetConfig(
                random_seed=int(mixed.generate_state(1, np.uint32)[0]),
                sequence_length=self.sequence_length,
                blend=([prefix], None),
                split="1,0,0",
                path_to_cache="",  # None would mean a directory beside the text
                tokenizer=_NoTokenizer(),
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            documents = np.arange(len(self._text), dtype=np.int32)
            sequences = GPTDataset(self._text, prefix, documents, None, Split.train, config)
        assert len(sequences) == self.samples_per_epoch, (len(sequences), self.samples_per_epoch)
        return sequences


def open_text(prefix: str | Path) -> IndexedDataset:
    """Open the documents of ``prefix``.bin and .idx, memory-mapped.

    Raises:
        ValueError: one of the files is missing, or they do not belong together.
    """
    if not IndexedDataset.exists(str(prefix)):
        raise ValueError(
            f"{prefix}.bin or {prefix}.idx does not exist; make them with `megashear preprocess`"
        )
    size = Path(f"{prefix}.bin").stat().st_size
    if not size:
        raise ValueError(f"{prefix}.bin is empty; preprocess this domain again")
    text = IndexedDataset(str(prefix))
    wanted = int(text.sequence_lengths.sum(dtype=np.int64)) * text.index.dtype_size
    if size != wanted:
        raise ValueError(
            f"{prefix}.bin has {size} bytes, its .idx wants {wanted}; copy both again, or "
            f"preprocess again"
        )
    return text


def num_sequences(
    prefix: str | Path, num_tokens: int, sequence_length: int, *, way_out: str
) -> int:
    """Return the number of sequences in a text, where neighbours share their border token.

    Args:
        prefix: path of the text, for the message.
        num_tokens: tokens of the text.
        sequence_length: tokens that the model sees of a sequence.
        way_out: for the message, what to do about too short a text besides shorter sequences.

    Raises:
        ValueError: the text has less than one sequence.
    """
    if sequence_length < 1:
        raise ValueError(f"--seq-length is {sequence_length}; wanted at least 1 token")
    if num_tokens <= sequence_length:
        raise ValueError(
            f"{prefix}.bin has {num_tokens} tokens, one sequence of --seq-length "
            f"{sequence_length} takes {sequence_length + 1}; {way_out} or lower "
            f"--seq-length"
        )
    return (num_tokens - 1) // sequence_length


@dataclass(frozen=True)
class _NoTokenizer:
    """Tokenizer for a GPTDataset whose text is tokenised already."""

    vocab_size: None = None  # the type of the stored tokens is read from the .idx
    pad: int = -1  # no token is padding: every label counts
    eod: int = -2  # not used, for positions and attention run through documents

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Return no names: no file is cached."""
        return {}


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep GPTDataset from warning that it saves no files, which is intended."""
    theirs = logging.getLogger(GPTDataset.__module__)
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)
