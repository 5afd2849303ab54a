"""Sequences that go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config import ModelConfig
from megashear.data.context import ids_of
from megashear.parallel import device


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences that go through the model together; s is the sequence length, b their number."""

    tokens: Tensor
    """Input ids, int64 [b, s]."""
    labels: Tensor
    """The token after each input, int64 [b, s]."""
    loss_mask: Tensor
    """1 where a label counts, 0 where it is context and in sequences that only fill a batch;
    float32 [b, s]."""
    domains: Tensor
    """Domain of each sequence, int64 [b]."""
    documents: Tensor | None = None
    """Number of the document of each input, counted within its sequence, int64 [b, s]; None where
    attention runs through document borders."""
    positions: Tensor
    """Place of each sequence in the global batch, int64 [b]. In an evaluation: its place among the
    chosen sequences, with sequences that only fill a batch counted after them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentBorders:
    """Meaning of the borders of documents packed into a sequence; by default they have none."""

    part_attention: bool = False
    """No token attends to another document."""
    mask_loss: bool = False
    """The first label of each document does not count."""

    @classmethod
    def of(cls, model: ModelConfig, *, are_packed: bool = False) -> DocumentBorders:
        """Return the meaning that the flags give.

        Args:
            model: the flags.
            are_packed: whether documents are conversations of one sequence, which never see each
                other.
        """
        return cls(
            part_attention=model.reset_attention_mask or are_packed, mask_loss=model.eod_mask_loss
        )

    @property
    def are_read(self) -> bool:
        """Whether a batch must know where documents begin."""
        return self.part_attention or self.mask_loss


def micro_batch(
    tokens: Tensor,
    labels: Tensor,
    domains: Sequence[int],
    positions: Sequence[int],
    num_counted: int,
    *,
    borders: DocumentBorders,
    documents: tuple[Tensor, Tensor] | None = None,
) -> MicroBatch:
    """Make a microbatch of sequences.

    Args:
        tokens: stored tokens of the input, int64 [b, s]; see `context`.
        labels: stored token after each, int64 [b, s].
        domains: domain of each sequence.
        positions: place of each sequence in the global batch.
        num_counted: sequences whose labels count; those after them only fill the batch.
        borders: what document borders mean.
        documents: numbers of the documents of tokens and of labels, int64 [b, s] each; needed
            where ``borders`` are read.
    """
    assert (documents is not None) == borders.are_read
    loss_mask = torch.ones(labels.shape)  # [b, s]
    loss_mask[num_counted:] = 0.0
    if bool((tokens < 0).any() | (labels < 0).any()):
        loss_mask = loss_mask * (labels >= 0)
        tokens, labels = ids_of(tokens), ids_of(labels)
    if documents is not None and borders.mask_loss:
        loss_mask = loss_mask * (documents[0] == documents[1])
    apart = documents[0] if documents is not None and borders.part_attention else None
    return MicroBatch(
        tokens=device.pinned(tokens),
        labels=device.pinned(labels),
        loss_mask=device.pinned(loss_mask),
        documents=None if apart is None else device.pinned(apart),
        domains=torch.tensor(domains, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
    )
