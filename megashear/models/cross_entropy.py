"""Cross entropy over a vocabulary that tensor ranks share, in the memory of the logits.

megatron-core's keeps a float32 softmax beside bfloat16 logits and passes over them a dozen times.
This one keeps the logits, or in float32 their exponentials where they lay, and writes the gradient
over them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megashear.models.fusion import fused
from megashear.parallel.agree import flat_all_reduce

_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}
"""Logits that go through float32 together: as many as a core's cache holds, or as a GPU is kept
busy with while the copy is small beside the model."""


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """-log softmax(logits) at the labels, in float32. Collective over ``group``.

    Args:
        logits: this rank's slice of the vocabulary, [..., vocab/tp]. They are overwritten, by what
            the backward pass needs and then by their gradient, so that nobody else may need them.
        labels: int64 [...], in the whole vocabulary.
        group: the tensor ranks.

    Returns:
        float32 [...], equal on the ranks of ``group``; its gradient may be asked for once.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows = logits.flatten(0, -2)  # [tokens, vocab/tp]
        width = rows.size(1)
        own = labels.flatten() - dist.get_rank(group) * width
        is_own = (own >= 0) & (own < width)
        place = own.clamp(0, width - 1)[:, None]
        predicted = torch.where(is_own, rows.gather(1, place).squeeze(1).float(), 0.0)
        # bfloat16 would round exponentials: they are taken again in the backward pass
        kept = rows.dtype == torch.float32
        exponentials = _exponentials_over if kept else _exponentials
        found = [exponentials(part) for part in rows.tensor_split(_num_parts(rows))]
        most, total = (torch.cat(parts) for parts in zip(*found))
        (largest,) = flat_all_reduce([most], group, dist.ReduceOp.MAX)
        share = (most - largest).exp()
        total, predicted = flat_all_reduce([total * share, predicted], group)
        # small numbers beside each other: log(total) + largest would round away what follows
        loss = total.log() - (predicted - largest)
        # what the exponentials that the backward pass finds or takes are to be multiplied by
        factor = (share if kept else torch.ones_like(share)) / total
        ctx.save_for_backward(logits, largest, factor, loss, place, is_own)
        ctx.kept = kept
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        logits, largest, factor, loss, place, is_own = ctx.saved_tensors
        rows, dloss = logits.flatten(0, -2), dloss.flatten()
        assert rows.data_ptr() == logits.data_ptr(), "a view, for the gradient is written here"
        factor = factor * dloss
        if ctx.kept:
            rows.mul_(factor[:, None])
        else:
            number = _num_parts(rows)
            for parts in zip(*(each.tensor_split(number) for each in (rows, largest, factor))):
                _gradient_over(*parts)
        # p - 1 at the label, of which p was rounded
        at_label = (torch.expm1(-loss) * dloss).to(rows.dtype)[:, None]
        rows.scatter_(1, place, torch.where(is_own[:, None], at_label, rows.gather(1, place)))
        return logits, None, None


@fused
def _exponentials(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each row, and the sum of exp(logit - largest); float32 [tokens]."""
    wide = rows.float()
    most = _largest(wide)
    return most, (wide - most[:, None]).exp_().sum(dim=1)


@fused
def _exponentials_over(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `_exponentials` does, and write it over the logits, float32."""
    most = _largest(rows)
    return most, rows.sub_(most[:, None]).exp_().sum(dim=1)


@fused
def _gradient_over(rows: Tensor, largest: Tensor, factor: Tensor) -> None:
    """Write exp(logit - largest) * factor over the logits."""
    rows.copy_((rows.float() - largest[:, None]).exp_().mul_(factor[:, None]))


def _largest(rows: Tensor) -> Tensor:
    # finite, even where all of this rank's rows are padding
    return rows.amax(dim=1).clamp(min=torch.finfo(torch.float32).min)


def _num_parts(rows: Tensor) -> int:
    """Return in how many parts, one as large as the other, rows go through float32."""
    at_once = max(1, _AT_ONCE[rows.device.type] // rows.size(1))
    return max(1, math.ceil(rows.size(0) / at_once))
