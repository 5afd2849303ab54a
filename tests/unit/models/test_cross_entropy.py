"""Cross entropy over shards of a vocabulary, against torch's over the whole in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megashear.models import cross_entropy
from megashear.models.cross_entropy import vocab_parallel_cross_entropy
from tests.ranks import run_ranks
from tests.tiny import relative_error

FLOAT32 = 2e-6
"""Relative, against float64: sums over 24 exponentials, each rounded at 6e-8; measured 2e-7."""
BFLOAT16 = 4e-3
"""Relative: the gradient is rounded once, at 2^-9; the loss is not rounded."""
VOCAB, PADDED = 22, 24
EXTENTS = (5, 3)


def whole_logits(scale: float = 4.0) -> Tensor:
    """Return logits of the padded vocabulary, with closed padding."""
    logits = torch.randn(*EXTENTS, PADDED, generator=torch.Generator().manual_seed(1)) * scale
    logits[..., VOCAB:] = -math.inf
    return logits


def labels() -> Tensor:
    return torch.randint(VOCAB, EXTENTS, generator=torch.Generator().manual_seed(2))


def weights() -> Tensor:
    """Return a gradient of the loss that differs between tokens."""
    return torch.rand(EXTENTS, generator=torch.Generator().manual_seed(3)) + 0.5


def wanted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the logits, float64."""
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf.flatten(0, -2), labels().flatten(), reduction="none")
    loss = loss.view(EXTENTS)
    loss.backward(weights().double())
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def found(
    tp: int, logits: Tensor, *, shift: int = 0, at_once: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return every rank's loss and the whole gradient; ``shift`` is a mistake in the labels."""

    def body(rank: int) -> tuple[Tensor, Tensor]:
        if at_once is not None:
            cross_entropy._AT_ONCE = {"cpu": at_once}
        leaf = logits.chunk(tp, dim=-1)[rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf.clone(), labels() + shift, dist.group.WORLD)
        loss.backward(weights())
        assert leaf.grad is not None
        assert leaf.grad.dtype == logits.dtype
        return loss.detach(), leaf.grad

    ranks = run_ranks(tp, body)
    return [loss for loss, _ in ranks], torch.cat([gradient for _, gradient in ranks], dim=-1)


@pytest.mark.parametrize("at_once", [None, 5 * PADDED // 4], ids=["together", "in parts"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(tp: int, at_once: int | None) -> None:
    losses, gradient = found(tp, whole_logits(), at_once=at_once)
    loss, wanted_gradient = wanted(whole_logits())
    for each in losses:
        assert each.dtype == torch.float32
        assert torch.equal(each, losses[0])  # ranks hold copies of it
    assert relative_error(losses[0], loss) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < FLOAT32
    assert not gradient[..., VOCAB:].any()  # padding stays as it is


@pytest.mark.parametrize("tp", [1, 2])
def test_a_label_beside_the_right_one_is_noticed(tp: int) -> None:
    losses, gradient = found(tp, whole_logits(), shift=-1)
    loss, wanted_gradient = wanted(whole_logits())
    assert relative_error(losses[0], loss) > 0.1
    assert relative_error(gradient, wanted_gradient) > 0.1


def test_a_rank_of_padding_alone_adds_nothing() -> None:
    logits = whole_logits()
    logits[..., PADDED * 3 // 4 :] = -math.inf  # all of the last of four ranks
    logits.scatter_(-1, labels()[..., None], 1.0)
    losses, gradient = found(4, logits)
    loss, wanted_gradient = wanted(logits)
    assert relative_error(losses[0], loss) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < FLOAT32


def test_large_logits_neither_overflow_nor_lose_the_label() -> None:
    logits = whole_logits(scale=300.0)  # exp(300) is no float32
    losses, gradient = found(2, logits)
    loss, wanted_gradient = wanted(logits)
    assert relative_error(losses[0], loss) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < FLOAT32


def test_logits_far_from_zero_lose_nothing() -> None:
    # the sum of a softmax is 1 wherever its logits lie
    logits = whole_logits() + 1000.0
    losses, gradient = found(2, logits)
    loss, wanted_gradient = wanted(logits)
    assert relative_error(losses[0], loss) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < FLOAT32


@pytest.mark.parametrize("tp", [1, 2])
def test_bfloat16_is_rounded_once(tp: int) -> None:
    logits = whole_logits().bfloat16()
    losses, gradient = found(tp, logits)
    loss, wanted_gradient = wanted(logits)
    assert relative_error(losses[0], loss) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < BFLOAT16
    # each value is the nearest, or its neighbour where float32 was halfway
    one_off = (gradient.float() - wanted_gradient).abs() <= 2**-8 * wanted_gradient.abs()
    assert one_off.all()


def test_the_gradient_lies_where_the_logits_lay_and_is_asked_for_once() -> None:
    def body(rank: int) -> None:
        leaf = whole_logits().requires_grad_()
        logits = leaf * 1.0
        place, seen = logits.data_ptr(), []
        logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
        loss = vocab_parallel_cross_entropy(logits, labels(), dist.group.WORLD).sum()
        loss.backward(retain_graph=True)
        assert seen == [place]
        # a second pass would not read logits
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    run_ranks(1, body)
