"""Held-out sequences of one domain, and a fixed choice of them for evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megashear.data.batch import DocumentBorders, MicroBatch, micro_batch
from megashear.data.sequences import num_sequences, open_text


class HeldOutSet:
    """Held-out text of a domain, cut in file order into sequences that share a border token."""

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int,
        *,
        domain_index: int = 0,
        borders: DocumentBorders | None = None,
    ) -> None:
        """Open a held-out set.

        Args:
            prefix: path of the ``.bin`` and ``.idx`` files, without these endings.
            sequence_length: tokens that the model sees of a sequence.
            domain_index: place of the domain among the domains.
            borders: meaning of document borders in the batches; none unless given.

        Raises:
            ValueError: no such files, or less text than one sequence.
        """
        self.name = Path(prefix).name
        self.sequence_length = sequence_length
        self.domain_index = domain_index
        self.borders = borders or DocumentBorders()
        self._text = open_text(prefix)
        self.num_tokens = int(self._text.sequence_lengths.sum(dtype=np.int64))
        """Tokens of the whole set."""
        self._length = self._count(prefix)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Return the tokens of a sequence, int64 [sequence_length + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.name}")
        # Documents lie back to back in the file, so the cut needs no index.
        stored = self._text.index
        tokens = self._text.bin_reader.read(
            dtype=stored.dtype,
            count=self.sequence_length + 1,
            offset=index * self.sequence_length * stored.dtype_size,
        )
        return torch.from_numpy(tokens.astype(np.int64))

    def documents(self, index: int) -> Tensor:
        """Return the number of the document of each token of a sequence, shaped like it.

        Documents are counted from 0 within the sequence, by the borders in the ``.idx``.
        """
        stored, start = self._text.index, index * self.sequence_length
        places = np.arange(start, start + self.sequence_length + 1) * stored.dtype_size  # bytes
        numbers = stored.sequence_pointers.searchsorted(places, side="right")
        return torch.from_numpy(numbers - numbers[0])

    def subsample(self, num_sequences: int, seed: int) -> list[int]:
        """Choose ``num_sequences`` sequences, or all if there are fewer; return sorted indices.

        One ``seed`` always gives the same choice, so that losses of different steps compare.
        """
        if num_sequences < 1:
            raise ValueError(f"{num_sequences} held-out sequences asked for; wanted at least 1")
        chosen = np.random.default_rng(seed).permutation(len(self))[:num_sequences]
        return sorted(chosen.tolist())

    def batches(
        self,
        indices: Sequence[int],
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> Iterator[MicroBatch]:
        """Yield this replica's microbatches of the chosen sequences.

        Every replica gets the same number of microbatches of one shape, for replicas and pipeline
        stages run in step; sequences of token 0 with a loss mask of 0 fill the last ones. Replicas
        take microbatches in turn.
        """
        assert micro_batch_size >= 1, micro_batch_size
        assert 0 <= data_parallel_rank < data_parallel_size, (
            data_parallel_rank,
            data_parallel_size,
        )
        filling = torch.zeros(self.sequence_length + 1, dtype=torch.int64)
        for turn in range(0, len(indices), micro_batch_size * data_parallel_size):
            start = turn + data_parallel_rank * micro_batch_size
            chosen = indices[start : start + micro_batch_size]
            num_filling = micro_batch_size - len(chosen)
            text = torch.stack([self[index] for index in chosen] + [filling] * num_filling)
            documents = None
            if self.borders.are_read:
                numbers = [self.documents(index) for index in chosen] + [filling] * num_filling
                documents = _parts(torch.stack(numbers))
            yield micro_batch(
                *_parts(text),
                [self.domain_index] * micro_batch_size,
                range(start, start + micro_batch_size),
                len(chosen),
                borders=self.borders,
                documents=documents,
            )

    def _count(self, prefix: str | Path) -> int:
        return num_sequences(
            prefix,
            self.num_tokens,
            self.sequence_length,
            way_out="preprocess again with a larger --held-out-fraction or more text,",
        )


def _parts(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of the inputs and the part of the labels, [b, s] each."""
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
