"""One pass of Megatron's pipeline schedule over this replica's microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megashear.data.batch import MicroBatch
from megashear.models.core import document_mask
from megashear.models.llama import unwrap
from megashear.parallel import device
from megashear.train.terms import CrossEntropy, LossTerm

Select = Callable[[torch.nn.Module, int], Tensor]
"""Chooses the noise stream of a chunk's next microbatch; MaskBinding.select."""


Result = TypeVar("Result")


class SequenceLosses(NamedTuple):
    """Losses of one microbatch that the last stage measured, on the device."""

    sums: Tensor
    """Cross entropy summed over the counted tokens of each sequence, nats, [b]."""
    counts: Tensor
    """Counted tokens of each sequence, [b]."""
    domains: Tensor
    """Domain of each sequence, int64 [b], on the host."""
    terms: Mapping[str, Tensor] = MappingProxyType({})
    """Sums of each further term of the loss over the counted tokens of each sequence, [b]."""


LANGUAGE_MODELLING = ((CrossEntropy(), 1.0),)
"""Terms and weights of a loss that is the cross entropy alone."""


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    *,
    forward_only: bool,
    streams: Sequence[int] | None = None,
    select: Select | None = None,
    terms: Sequence[tuple[LossTerm, float]] = LANGUAGE_MODELLING,
) -> list[SequenceLosses]:
    """Run every microbatch forward, and backward unless ``forward_only``.

    Collective over the replica's model group, and over the data group when gradients are reduced.
    The loss of a microbatch is the sum of its terms' means over counted tokens, times their
    weights; the loss of the step is the mean over microbatches, or over the counted tokens of all
    of them where the model was built so.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        batches: this replica's microbatches, all of one shape, the same on all its ranks.
        forward_only: whether to leave gradients alone.
        streams: noise stream of each microbatch, where ``select`` is given.
        select: called before a chunk runs a microbatch.
        terms: terms of the loss, each with its weight at this step. Where one reads logits, the
            cross entropy is taken of a copy of them.

    Returns:
        One entry per microbatch on the last stage, none on others.
    """

    def forward_step(
        pending: Iterator[tuple[MicroBatch, int]], chunk: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch, stream = next(pending)
        output = run_chunk(
            chunk,
            batch,
            stream=stream,
            select=select,
            with_labels=not reads_logits,
            in_float32=False,
        )
        # last stage: cross entropy [b, s], or logits [b, s, vocab/tp]
        measure = _loss_sum if is_by_token else _loss
        return output, partial(measure, chunk if reads_logits else None, batch, terms)

    reads_logits = any(term.needs_logits for term, _ in terms)
    is_by_token = unwrap(chunks[0]).config.calculate_per_token_loss
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


def run_forward(chunks: Sequence[torch.nn.Module], batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Run every microbatch forward, and return what the last stage's chunk gives.

    Collective over the replica's model group.

    Args:
        chunks: this rank's model chunks, not wrapped for data parallelism.
        batches: as for `run_schedule`.

    Returns:
        One entry per microbatch on the last stage, none on others.
    """
    # the schedule may free what is in the tensor that it holds
    return _collect(chunks, batches, lambda batch, output: output.detach())


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """A model as it is evaluated: its chunks, and the masks that are bound, if any."""

    chunks: Sequence[torch.nn.Module]
    """This rank's model chunks."""
    select: Select | None = None
    """Given while masks are bound, and only then."""

    def __call__(self, batches: Sequence[MicroBatch]) -> list[SequenceLosses]:
        """Measure microbatches: their losses on the last stage, none on others.

        Collective over the replica's model group.
        """
        return run_schedule(self.chunks, batches, forward_only=True, select=self.select)

    def read(
        self, batches: Sequence[MicroBatch], reader: Callable[[MicroBatch, Tensor], Result]
    ) -> list[Result]:
        """Run every microbatch forward, and return what ``reader`` takes from its logits.

        Collective over the replica's model group.

        Args:
            batches: as for `run_schedule`.
            reader: is given a microbatch and this rank's slice of its logits, [b, s, vocab/tp], in
                the precision of the model; may communicate over the tensor group.

        Returns:
            One entry per microbatch on the last stage, none on others.
        """
        return _collect(self.chunks, batches, reader, select=self.select, in_float32=False)


def _collect(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    reader: Callable[[MicroBatch, Tensor], Result],
    *,
    select: Select | None = None,
    in_float32: bool = True,
) -> list[Result]:
    def forward_step(
        pending: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Result]]:
        batch = next(pending)
        output = run_chunk(chunk, batch, select=select, with_labels=False, in_float32=in_float32)
        return output, lambda output, non_loss_data: reader(batch, output)

    size, length = batches[0].tokens.shape
    with torch.no_grad():
        found: list[Result] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found


def run_chunk(
    chunk: torch.nn.Module,
    batch: MicroBatch,
    *,
    stream: int = 0,
    select: Select | None = None,
    with_labels: bool = True,
    in_float32: bool = True,
) -> Tensor:
    """Run a microbatch through one chunk.

    Args:
        chunk: of this rank, its input set by the schedule.
        batch: the microbatch.
        stream: its noise stream.
        select: given while masks are bound, and only then.
        with_labels: whether to compute losses on the last stage, else logits.
        in_float32: whether logits of a bfloat16 model are copied to float32; losses are float32 in
            any case.

    Returns:
        Cross entropy [b, s] or logits [b, s, v/tp] on the last stage; hidden states on others.
    """
    to = device.device()
    positions = torch.arange(batch.tokens.size(1), device=to).expand_as(batch.tokens)
    apart = None
    if batch.documents is not None:
        apart = document_mask(batch.documents.to(to, non_blocking=True))
    # a flag of megatron-core's wrapper of mixed precision, which a float32 model has not
    is_narrow = unwrap(chunk).config.bf16 and not in_float32 and not with_labels
    output: Tensor = chunk(
        batch.tokens.to(to, non_blocking=True),
        positions,
        apart if select is None else select(chunk, stream),
        labels=batch.labels.to(to, non_blocking=True) if with_labels else None,
        # layers on folded weights take the stream for their mask, see FoldedModel
        extra_block_kwargs=None if select is None else {"context_mask": apart},
        **({"fp32_output": False} if is_narrow else {}),
    )
    return output


def _loss(
    chunk: torch.nn.Module | None,
    batch: MicroBatch,
    terms: Sequence[tuple[LossTerm, float]],
    output: Tensor,
) -> tuple[Tensor, SequenceLosses]:
    """Return the loss of a microbatch, and what was measured; arguments as of `_loss_sum`."""
    total, count, measured = _loss_sum(chunk, batch, terms, output)
    return total / count.clamp(min=1), measured


def _loss_sum(
    chunk: torch.nn.Module | None,
    batch: MicroBatch,
    terms: Sequence[tuple[LossTerm, float]],
    output: Tensor,
) -> tuple[Tensor, Tensor, SequenceLosses]:
    """Return the sum of a microbatch's loss, its number of tokens, and what was measured.

    Args:
        chunk: the last one, where ``output`` is its logits; None where it is the cross entropy.
        batch: the microbatch.
        terms: terms of the loss, each with its weight.
        output: cross entropy [b, s], or logits [b, s, vocab/tp].
    """
    cross_entropy, logits = output, None
    if chunk is not None:
        logits = output
        labels = batch.labels.to(output.device, non_blocking=True)
        # a copy, for its gradient is written over the logits that it is taken of
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(term.needs_entropy for term, _ in terms)
        ):
            own = logits.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            cross_entropy = unwrap(chunk).compute_language_model_loss(labels, own)
        del own
    mask = batch.loss_mask.to(output.device, non_blocking=True)
    sums, counts = (cross_entropy * mask).sum(dim=1), mask.sum(dim=1)  # [b]
    total, further = None, {}
    for term, weight in terms:
        added = sums
        if not isinstance(term, CrossEntropy):
            added = (term.per_token(batch, cross_entropy, logits) * mask).sum(dim=1)
            further[term.name] = added.detach()
        added = added.sum() if weight == 1.0 else weight * added.sum()
        total = added if total is None else total + added
    assert total is not None, "a loss has terms"
    measured = SequenceLosses(sums.detach(), counts, batch.domains, further)
    return total, counts.sum().to(torch.int), measured
