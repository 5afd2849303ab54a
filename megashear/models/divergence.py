"""Kullback-Leibler divergence of a student's next token from a teacher's, by vocabulary shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megashear.models.cross_entropy import largest_of_rows, num_parts
from megashear.models.fusion import fused
from megashear.parallel.agree import flat_all_reduce


def vocab_parallel_divergence(
    student: Tensor, teacher: Tensor, group: dist.ProcessGroup, *, temperature: float = 1.0
) -> Tensor:
    """Return sum_v p(v) (log p(v) - log q(v)) for each token, where p is the teacher's softmax of
    logits / temperature and q the student's. Collective over ``group``.

    Its gradient for the student's logits is (q - p) / temperature; the teacher gets none.

    Args:
        student: this rank's slice of the vocabulary, [..., vocab/tp]; it does not change.
        teacher: the same slice of the same vocabulary. It is overwritten by the gradient: nobody
            else may need it. Where a logit is minus infinity on both sides, as in padding, it
            counts for nothing.
        group: the tensor ranks.
        temperature: of both.

    Returns:
        float32 [...], nats, equal on the ranks of ``group``. Its backward pass may run once.
    """
    divergence: Tensor = _Divergence.apply(student, teacher, group, temperature)
    return divergence


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, group: dist.ProcessGroup, temperature: float
    ) -> Tensor:
        ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)  # [tokens, vocab/tp]
        assert theirs.data_ptr() == teacher.data_ptr(), "a view, for the gradient is written here"
        scale = 1 / temperature
        number = num_parts(ours)
        # largest logits of both over all ranks, so that no exponential overflows
        most = torch.stack([largest_of_rows(rows) * scale for rows in (ours, theirs)])
        (most,) = flat_all_reduce([most], group, dist.ReduceOp.MAX)
        # sums of exponentials, and of the teacher's times the difference of logits
        both = ours.tensor_split(number), theirs.tensor_split(number)
        parts = list(zip(*both, most.tensor_split(number, 1)))
        found = [torch.stack(_sums(a, b, top[0], top[1], scale)) for a, b, top in parts]
        (sums,) = flat_all_reduce([torch.cat(found, dim=1)], group)  # [3, tokens]
        own, other, lead = sums
        for (a, b, top), total in zip(parts, sums.tensor_split(number, 1)):
            _gradient_over(a, b, top[0], top[1], total[0], total[1], scale)
        ctx.save_for_backward(teacher)
        # the logarithms are of numbers from 1 to the size of the vocabulary: nothing is lost
        return (lead / other - other.log() + own.log()).view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(dloss[..., None]), None, None, None


@fused
def _sums(
    ours: Tensor, theirs: Tensor, most: Tensor, most_of_theirs: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's sum of exp(student), of exp(teacher), and of exp(teacher) times the
    teacher's lead over the student, all of logits below their largest, float32 [tokens]."""
    below = ours.float() * scale - most[:, None]
    below_of_theirs = theirs.float() * scale - most_of_theirs[:, None]
    share = below_of_theirs.exp()
    # in padding the difference is of two infinities, and the share 0
    lead = torch.where(share > 0, share * (below_of_theirs - below), 0.0)
    return below.exp().sum(dim=1), share.sum(dim=1), lead.sum(dim=1)


@fused
def _gradient_over(
    ours: Tensor,
    theirs: Tensor,
    most: Tensor,
    most_of_theirs: Tensor,
    total: Tensor,
    total_of_theirs: Tensor,
    scale: float,
) -> None:
    """Write (softmax of student - softmax of teacher) * scale over the teacher's logits."""
    own = (ours.float() * scale - most[:, None]).exp_() * (scale / total)[:, None]
    other = (theirs.float() * scale - most_of_theirs[:, None]).exp_()
    theirs.copy_(own - other * (scale / total_of_theirs)[:, None])
