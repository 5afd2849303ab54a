"""Divergence over shards of a vocabulary, against torch's over the whole in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megashear.models import cross_entropy, divergence
from megashear.models.divergence import vocab_parallel_divergence
from megashear.parallel import agree
from tests.ranks import run_ranks
from tests.tiny import relative_error
from tests.unit.models.test_cross_entropy import (
    BFLOAT16,
    EXTENTS,
    PADDED,
    VOCAB,
    weights,
    whole_logits,
)

FLOAT32 = 5e-6
"""Relative, against float64: a difference of two logarithms of sums; measured 5e-7."""


def teacher_logits(scale: float = 4.0) -> Tensor:
    """Return logits of a teacher that agrees with the student in part, with closed padding."""
    noise = torch.randn(*EXTENTS, PADDED, generator=torch.Generator().manual_seed(5)) * scale
    logits = 0.5 * whole_logits(scale) + 0.5 * noise
    logits[..., VOCAB:] = -math.inf
    return logits


def wanted(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the divergence and the student's gradient, float64, of the tokens without padding."""
    leaf = student.double().requires_grad_()
    found = F.kl_div(
        (leaf[..., :VOCAB] / temperature).log_softmax(-1),
        (teacher.double()[..., :VOCAB] / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    found.backward(weights().double())
    assert leaf.grad is not None
    return found.detach(), leaf.grad


def found(
    tp: int,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    at_once: int | None = None,
    broken: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], Tensor]:
    """Return every rank's divergence and the student's whole gradient."""

    def body(rank: int) -> tuple[Tensor, Tensor]:
        if at_once is not None:
            cross_entropy._AT_ONCE = {"cpu": at_once}
        broken()
        leaf = student.chunk(tp, dim=-1)[rank].clone().requires_grad_()
        own = teacher.chunk(tp, dim=-1)[rank].clone()
        each = vocab_parallel_divergence(leaf, own, dist.group.WORLD, temperature=temperature)
        each.backward(weights())
        assert leaf.grad is not None
        assert leaf.grad.dtype == student.dtype
        assert torch.equal(leaf.detach(), student.chunk(tp, dim=-1)[rank])  # it is others' too
        return each.detach(), leaf.grad

    ranks = run_ranks(tp, body)
    return [each for each, _ in ranks], torch.cat([gradient for _, gradient in ranks], dim=-1)


@pytest.mark.parametrize("at_once", [None, 5 * PADDED // 4], ids=["together", "in parts"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_divergence_and_gradient_are_those_of_the_whole_vocabulary(
    tp: int, temperature: float, at_once: int | None
) -> None:
    pair = whole_logits(), teacher_logits()
    ranks, gradient = found(tp, *pair, temperature=temperature, at_once=at_once)
    value, wanted_gradient = wanted(*pair, temperature)
    for each in ranks:
        assert each.dtype == torch.float32
        assert torch.equal(each, ranks[0])  # ranks hold copies of it
    assert relative_error(ranks[0], value) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < FLOAT32
    assert not gradient[..., VOCAB:].any()  # padding stays as it is


def test_equal_distributions_have_no_divergence_and_no_gradient() -> None:
    logits = whole_logits()
    shifted = logits + torch.rand(EXTENTS)[..., None]  # a constant for a token changes no softmax
    (each, _), gradient = found(2, logits, shifted)
    assert each.abs().max() < 1e-6  # of logarithms of up to 3, rounded at 6e-8 of them
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("empty", ["student", "teacher", "both"])
def test_a_rank_of_padding_alone_adds_nothing(empty: str) -> None:
    student, teacher = whole_logits(), teacher_logits()
    for logits in (student, teacher):
        logits[..., PADDED * 3 // 4 :] = -math.inf  # all of the last of four ranks
    if empty == "student":  # probability 0 in the teacher too, or the divergence is infinite
        teacher[..., 0] = -1e4
    ranks, gradient = found(4, student, teacher)
    some = slice(0, PADDED * 3 // 4)
    leaf = student[..., some].double().requires_grad_()
    value = F.kl_div(
        leaf.log_softmax(-1),
        teacher[..., some].double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    value.backward(weights().double())
    assert leaf.grad is not None
    assert relative_error(ranks[0], value.detach()) < FLOAT32
    assert relative_error(gradient[..., some], leaf.grad) < FLOAT32


def test_large_logits_neither_overflow_nor_lose_digits() -> None:
    pair = whole_logits(scale=300.0), teacher_logits(scale=300.0)  # exp(300) is no float32
    ranks, gradient = found(2, *pair)
    value, wanted_gradient = wanted(*pair, 1.0)
    assert relative_error(ranks[0], value) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < FLOAT32


def test_gradients_of_bfloat16_logits_are_rounded_once() -> None:
    pair = whole_logits().bfloat16(), teacher_logits().bfloat16()
    ranks, gradient = found(2, *pair)
    value, wanted_gradient = wanted(*pair, 1.0)
    assert relative_error(ranks[0], value) < FLOAT32
    assert relative_error(gradient, wanted_gradient) < BFLOAT16


# twins: each breaks one thing, and must be noticed


def own_largest_alone() -> None:
    reduce = agree.flat_all_reduce

    def only_sums(tensors: Any, group: Any, op: Any = dist.ReduceOp.SUM) -> Any:
        return reduce(tensors, group) if op == dist.ReduceOp.SUM else tensors

    divergence.flat_all_reduce = only_sums


def own_sums_alone() -> None:
    reduce = agree.flat_all_reduce

    def only_largest(tensors: Any, group: Any, op: Any = dist.ReduceOp.SUM) -> Any:
        return tensors if op == dist.ReduceOp.SUM else reduce(tensors, group, op)

    divergence.flat_all_reduce = only_largest


@pytest.mark.parametrize("broken", [own_largest_alone, own_sums_alone])
def test_what_is_not_reduced_over_shards_is_noticed(broken: Callable[[], None]) -> None:
    pair = whole_logits(), teacher_logits()
    ranks, gradient = found(2, *pair, broken=broken)
    value, wanted_gradient = wanted(*pair, 1.0)
    assert relative_error(ranks[0], value) > 0.1
    assert relative_error(gradient, wanted_gradient) > 0.1


def test_padding_that_is_counted_is_noticed() -> None:
    student, teacher = whole_logits(), teacher_logits()
    value, wanted_gradient = wanted(student, teacher, 1.0)
    for logits in (student, teacher):
        logits[..., VOCAB:] = 0.0
    ranks, gradient = found(2, student, teacher)
    assert relative_error(ranks[0], value) > 1e-3
    assert relative_error(gradient, wanted_gradient) > 1e-3


def test_a_temperature_of_the_teacher_alone_is_noticed() -> None:
    student, teacher = whole_logits(), teacher_logits()
    ranks, gradient = found(2, student, teacher / 2.5)
    value, wanted_gradient = wanted(student, teacher, 2.5)
    assert relative_error(ranks[0], value) > 0.1
    assert relative_error(gradient, wanted_gradient) > 0.1
