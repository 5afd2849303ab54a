"""Sequences that go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences that go through the model together; s is the sequence length, b their number."""

    tokens: Tensor
    """Input ids, int64 [b, s]."""
    labels: Tensor
    """The token after each input, int64 [b, s]."""
    loss_mask: Tensor
    """1 where a label counts, 0 in sequences that only fill up a batch; float32 [b, s]."""
    domains: Tensor
    """Domain of each sequence, int64 [b]."""
    positions: Tensor
    """Place of each sequence in the global batch (in an evaluation: among the chosen sequences;
    filling ones go on counting behind them), int64 [b]."""


def micro_batch(
    tokens: Tensor,
    labels: Tensor,
    domains: Sequence[int],
    positions: Sequence[int],
    num_counted: int,
) -> MicroBatch:
    """A microbatch of sequences.

    Args:
        tokens: input ids, int64 [b, s].
        labels: the token after each, int64 [b, s].
        domains: domain of each sequence.
        positions: place of each sequence in the global batch.
        num_counted: sequences whose labels count; those behind them only fill up.
    """
    counted = torch.arange(len(tokens)) < num_counted  # [b]
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=counted[:, None].expand_as(labels).float(),  # [b, s]
        domains=torch.tensor(domains, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
    )
