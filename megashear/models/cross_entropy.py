"""Cross entropy over a vocabulary that tensor ranks share, in the memory of the logits.

The cross entropy of megatron-core keeps a float32 softmax beside bfloat16 logits and passes over
them a dozen times. This one keeps the logits, or in float32 writes their exponentials over them,
and then writes the gradient over them.
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
"""Logits that are copied to float32 together: on a CPU as many as a core's cache holds, on a GPU
enough to keep it busy while the copy is small beside the model."""


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Return -log softmax(logits) at the labels. Collective over ``group``.

    Args:
        logits: this rank's slice of the vocabulary, [..., vocab/tp]. They are overwritten, first by
            what the backward pass needs and then by their gradient: nobody else may need them.
        labels: int64 [...], in the whole vocabulary.
        group: the tensor ranks.

    Returns:
        float32 [...], equal on the ranks of ``group``. Its backward pass may run once.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        # own logits at labels
        rows = logits.flatten(0, -2)  # [tokens, vocab/tp]
        width = rows.size(1)
        own = labels.flatten() - dist.get_rank(group) * width
        is_own = (own >= 0) & (own < width)
        place = own.clamp(0, width - 1)[:, None]
        predicted = torch.where(is_own, rows.gather(1, place).squeeze(1).float(), 0.0)
        # Exponentials of own logits. bfloat16 would round them, and so they are computed again in
        # the backward pass.
        kept = rows.dtype == torch.float32
        exponentials = _exponentials_over if kept else _exponentials
        found = [exponentials(part) for part in rows.tensor_split(num_parts(rows))]
        most, total = (torch.cat(parts) for parts in zip(*found))
        # sums over all ranks
        (largest,) = flat_all_reduce([most], group, dist.ReduceOp.MAX)
        share = (most - largest).exp()
        total, predicted = flat_all_reduce([total * share, predicted], group)
        # Loss. The difference comes first: log(total) + largest would round small digits away.
        loss = total.log() - (predicted - largest)
        # factor from exponentials, kept or computed again, to probabilities
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
            number = num_parts(rows)
            for parts in zip(*(each.tensor_split(number) for each in (rows, largest, factor))):
                _gradient_over(*parts)
        # p - 1 at the label: computed from the loss, for p in ``rows`` is rounded
        at_label = (torch.expm1(-loss) * dloss).to(rows.dtype)[:, None]
        rows.scatter_(1, place, torch.where(is_own[:, None], at_label, rows.gather(1, place)))
        return logits, None, None


@fused
def _exponentials(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and its sum of exp(logit - largest), float32 [tokens]."""
    wide = rows.float()
    most = largest_of_rows(wide)
    return most, (wide - most[:, None]).exp_().sum(dim=1)


@fused
def _exponentials_over(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_exponentials` does, and write the exponentials over the logits, float32."""
    most = largest_of_rows(rows)
    return most, rows.sub_(most[:, None]).exp_().sum(dim=1)


@fused
def _gradient_over(rows: Tensor, largest: Tensor, factor: Tensor) -> None:
    """Write exp(logit - largest) * factor over the logits."""
    rows.copy_((rows.float() - largest[:, None]).exp_().mul_(factor[:, None]))


def largest_of_rows(rows: Tensor) -> Tensor:
    """Return each row's largest logit, float32 [tokens]; finite even where all are padding."""
    return rows.amax(dim=1).float().clamp(min=torch.finfo(torch.float32).min)


def num_parts(rows: Tensor) -> int:
    """Return the number of equal parts in which rows are copied to float32."""
    at_once = max(1, _AT_ONCE[rows.device.type] // rows.size(1))
    return max(1, math.ceil(rows.size(0) / at_once))
