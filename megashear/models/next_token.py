"""Scores of given next tokens over a vocabulary that tensor ranks share, without its gathering."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megashear.models.cross_entropy import largest_of_rows, num_parts
from megashear.parallel.agree import flat_all_reduce, gather_tensors


def token_scores(rows: Tensor, tokens: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the log-probability of tokens, and whether each is the likeliest of the vocabulary.

    Collective over ``group``.

    Args:
        rows: this rank's slice of the logits, [n, vocab/tp], n at least 1; columns of padding are
            minus infinity.
        tokens: int64 [n], in the whole vocabulary.
        group: the tensor ranks.

    Returns:
        float32 [n] and bool [n], equal on the ranks of ``group``. Of tokens with equal logits the
        first counts as the likeliest.
    """
    start = dist.get_rank(group) * rows.size(1)
    own = tokens - start
    is_own = (own >= 0) & (own < rows.size(1))
    place = own.clamp(0, rows.size(1) - 1)[:, None]
    predicted = torch.where(is_own, rows.gather(1, place).squeeze(1).float(), 0.0)
    # own largest logit, the first token that has it, and the sum of exponentials
    parts = [_largest_and_sum(part) for part in rows.tensor_split(num_parts(rows))]
    most, first, total = (torch.cat(found) for found in zip(*parts))
    # over all ranks
    (largest,) = flat_all_reduce([most], group, dist.ReduceOp.MAX)
    total, predicted = flat_all_reduce([total * (most - largest).exp(), predicted], group)
    nowhere = torch.iinfo(torch.int64).max
    first = torch.where(most == largest, first + start, nowhere)
    (first,) = flat_all_reduce([first], group, dist.ReduceOp.MIN)
    return (predicted - largest) - total.log(), first == tokens


def whole_rows(rows: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Return few rows of logits whole, without columns of padding, float32 [n, vocab] on the host.

    Collective over ``group``.

    Args:
        rows: this rank's slice, [n, vocab/tp].
        vocab_size: tokens of the vocabulary.
        group: the tensor ranks.
    """
    whole = torch.cat(gather_tensors(rows.float(), group), dim=1)
    return whole[:, :vocab_size].cpu()


def _largest_and_sum(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = rows.float()
    most = largest_of_rows(wide)
    return most, wide.argmax(dim=1), (wide - most[:, None]).exp().sum(dim=1)
