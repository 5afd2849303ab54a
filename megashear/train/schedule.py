"""One pass of Megatron's pipeline schedule over this replica's microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megashear.data.batch import MicroBatch
from megashear.models.core import document_mask
from megashear.parallel import device

Select = Callable[[torch.nn.Module, int], Tensor]
"""Chooses the noise stream of a chunk's next microbatch; MaskBinding.select."""


class SequenceLosses(NamedTuple):
    """What the last stage measured of one microbatch, on the device."""

    sums: Tensor
    """Cross entropy summed over the counted tokens of each sequence, nats, [b]."""
    counts: Tensor
    """Counted tokens of each sequence, [b]."""
    domains: Tensor
    """Domain of each sequence, int64 [b], on the host."""


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    *,
    forward_only: bool,
    streams: Sequence[int] | None = None,
    select: Select | None = None,
) -> list[SequenceLosses]:
    """Run every microbatch forward, and backward unless ``forward_only``.

    Collective over the replica's model group, and over the data group when gradients are reduced.
    The loss of a microbatch is the mean over its counted tokens, that of the step their mean.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        batches: this replica's microbatches, all of one shape, the same on all its ranks.
        forward_only: whether to leave gradients alone.
        streams: noise stream of each microbatch, where ``select`` is given.
        select: called before a chunk runs a microbatch.

    Returns:
        One entry per microbatch on the last stage, none on others.
    """

    def forward_step(
        pending: Iterator[tuple[MicroBatch, int]], chunk: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch, stream = next(pending)
        per_token = run_chunk(chunk, batch, stream=stream, select=select)
        return per_token, partial(_loss, batch)  # last stage: cross entropy [b, s]

    pairs = list(zip(batches, streams if streams is not None else [0] * len(batches)))
    size, length = batches[0].tokens.shape
    # megatron-core's forward_only leaves autograd on, and with it every activation in memory
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            # every chunk of an interleaved schedule goes through the microbatches on its own
            data_iterator=[iter(pairs) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=forward_only,
        )


def run_chunk(
    chunk: torch.nn.Module,
    batch: MicroBatch,
    *,
    stream: int = 0,
    select: Select | None = None,
    with_labels: bool = True,
) -> Tensor:
    """Run a microbatch through one chunk.

    Args:
        chunk: of this rank, its input set by the schedule.
        batch: the microbatch.
        stream: its noise stream.
        select: given while masks are bound, and only then.
        with_labels: whether to compute losses on the last stage, else logits.

    Returns:
        Cross entropy [b, s] or logits [b, s, v/tp] on the last stage; hidden states on others.
    """
    to = device.device()
    positions = torch.arange(batch.tokens.size(1), device=to).expand_as(batch.tokens)
    apart = None
    if batch.documents is not None:
        apart = document_mask(batch.documents.to(to, non_blocking=True))
    output: Tensor = chunk(
        batch.tokens.to(to, non_blocking=True),
        positions,
        apart if select is None else select(chunk, stream),
        labels=batch.labels.to(to, non_blocking=True) if with_labels else None,
        # layers on folded weights take the stream for their mask, see FoldedModel
        extra_block_kwargs=None if select is None else {"context_mask": apart},
    )
    return output


def _loss(batch: MicroBatch, per_token: Tensor) -> tuple[Tensor, SequenceLosses]:
    mask = batch.loss_mask.to(per_token.device, non_blocking=True)
    sums, counts = (per_token * mask).sum(dim=1), mask.sum(dim=1)  # [b]
    loss = sums.sum() / counts.sum().clamp(min=1.0)
    return loss, SequenceLosses(sums.detach(), counts, batch.domains)
