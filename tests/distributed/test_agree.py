"""Reductions keep their tensors' form, copies are held to be bit-equal, and errors are shared."""

import datetime
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megashear.parallel.agree import (
    assert_replicated,
    assert_same_bits,
    broadcast_object,
    check_same,
    flat_all_reduce,
    gather_objects,
    ordered_sum,
    raise_together,
)
from tests.ranks import run_ranks

SHAPES = ((2, 3), (), (0, 4), (5,))  # a scalar and an empty tensor among them


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def held(rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "combined"), [("SUM", torch.Tensor.sum), ("MAX", torch.amax)])
def test_flat_all_reduce_combines_each_tensor_in_its_own_shape_and_dtype(
    dtype: torch.dtype, op: str, combined: Any
) -> None:
    def body(rank: int) -> tuple[list[Tensor], bool]:
        own = held(rank, dtype)
        own[0].requires_grad_()
        reduced = flat_all_reduce(own, world(), getattr(dist.ReduceOp, op))
        kept = all(torch.equal(tensor, same) for tensor, same in zip(own, held(rank, dtype)))
        return reduced, kept and not any(tensor.requires_grad for tensor in reduced)

    # two addends: their sum does not depend on the order
    for reduced, left_as_they_are in run_ranks(2, body):
        assert left_as_they_are
        for tensor, *addends in zip(reduced, held(0, dtype), held(1, dtype)):
            wanted = combined(torch.stack(addends), dim=0)
            assert tensor.dtype == dtype
            assert tensor.shape == wanted.shape
            assert torch.equal(tensor, wanted)


def test_flat_all_reduce_of_one_rank_gives_copies() -> None:
    def body(rank: int) -> bool:
        own = held(rank)
        reduced = flat_all_reduce(own, world())
        reduced[0] += 1.0
        return torch.equal(own[0], held(rank)[0]) and flat_all_reduce([], world()) == []

    assert run_ranks(1, body) == [True]


def test_gather_and_broadcast_know_every_rank() -> None:
    def body(rank: int) -> tuple[list[Any], Any, list[Any]]:
        pairs = [dist.new_group([0, 2]), dist.new_group([1])]
        inside = gather_objects({"rank": rank}, pairs[rank % 2])
        return gather_objects((rank, "x" * rank)), broadcast_object([rank], source=2), inside

    everyone = [(0, ""), (1, "x"), (2, "xx")]
    even = [{"rank": 0}, {"rank": 2}]
    assert run_ranks(3, body) == [
        (everyone, [2], even),
        (everyone, [2], [{"rank": 1}]),
        (everyone, [2], even),
    ]


def copies(rank: int, drifted: int | None) -> dict[str, Tensor]:
    second = torch.ones(3, 4).t()
    if rank == drifted:
        second = torch.nextafter(second, torch.tensor(2.0))  # the last bit
    return {"first": torch.arange(6, dtype=torch.bfloat16), "second": second}


def test_equal_copies_pass_whatever_their_strides() -> None:
    def body(rank: int) -> None:
        named = copies(rank, None)
        named["second"] = named["second"].contiguous() if rank else named["second"]
        assert_replicated(named, "masks")

    run_ranks(2, body)


def test_the_last_bit_of_one_copy_is_noticed_on_every_rank_alike() -> None:
    def body(rank: int) -> str:
        with pytest.raises(RuntimeError, match="drifted") as caught:
            assert_replicated(copies(rank, drifted=2), "masks of step 7")
        return str(caught.value)

    messages = run_ranks(3, body)
    assert set(messages) == {
        "masks of step 7: copies of second have drifted apart; ranks [2] of their group differ "
        "from rank 0. Restart from the last checkpoint"
    }


@pytest.mark.parametrize("drifted", [None, 0, 2])
def test_sums_of_bits_notice_one_bit_and_places(drifted: int | None) -> None:
    def body(rank: int) -> str:
        named = copies(rank, drifted)
        try:
            assert_same_bits(named, "step 7", dist.group.WORLD, "data-parallel")
        except RuntimeError as error:
            return str(error)
        return ""

    (message,) = set(run_ranks(3, body))
    odd = {None: "", 0: "ranks [1, 2]", 2: "ranks [2]"}[drifted]
    assert odd in message
    assert bool(message) == (drifted is not None)
    assert ("copies of second have drifted apart" in message) == bool(message)


def test_sums_of_bits_notice_elements_that_changed_places() -> None:
    def body(rank: int) -> bool:
        tensor = torch.arange(10, dtype=torch.float32)
        named = {"swapped": tensor.flip(0) if rank else tensor}
        with pytest.raises(RuntimeError, match=r"data-parallel ranks \[1\] differ"):
            assert_same_bits(named, "step 7", dist.group.WORLD, "data-parallel")
        return True

    assert all(run_ranks(2, body))


def fail_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise KeyError("no such file")


def test_an_error_of_one_rank_is_raised_by_all() -> None:
    def body(rank: int) -> tuple[str, str]:
        try:
            with raise_together():
                fail_on(rank, failing=1)
        except (KeyError, ValueError) as error:
            return type(error).__name__, str(error)
        raise AssertionError("nothing was raised")

    shared = ("ValueError", "rank 1: 'no such file'")
    assert run_ranks(3, body) == [shared, ("KeyError", "'no such file'"), shared]


def test_no_error_raises_nothing() -> None:
    def body(rank: int) -> int:
        with raise_together():
            value = rank
        return value

    assert run_ranks(2, body) == [0, 1]


def test_an_error_that_is_not_shared_leaves_the_others_waiting() -> None:
    # the twin: the collective that follows, entered by all but the rank that failed
    def body(rank: int) -> str:
        group = dist.new_group(timeout=datetime.timedelta(seconds=1))
        try:
            fail_on(rank, failing=1)
            dist.all_reduce(torch.ones(1), group=group)
        except KeyError:
            time.sleep(3.0)  # past the timeout; a process that ended would free the other
            return "failed"
        except RuntimeError as error:
            return str(error)
        return "went on"

    waited, failed = run_ranks(2, body)
    assert failed == "failed"
    assert "Timed out" in waited


def test_ordered_sums_are_the_same_in_every_group() -> None:
    # three addends whose sum depends on their order in float32
    values = [1e8, 1.0, -1e8]

    def body(rank: int) -> tuple[float, int]:
        (total,) = ordered_sum([torch.tensor([values[rank]])], dist.group.WORLD)
        kept = ordered_sum([torch.ones(2, 3), torch.zeros(1)], dist.group.WORLD)
        assert [tuple(tensor.shape) for tensor in kept] == [(2, 3), (1,)]
        assert torch.equal(kept[0], torch.full((2, 3), 3.0))
        return float(total), rank

    first_to_last = float(sum(torch.tensor(value) for value in values))
    assert run_ranks(3, body) == [(first_to_last, rank) for rank in range(3)]
    assert first_to_last != 1.0


def test_ranks_that_start_from_different_things_all_say_so() -> None:
    def body(rank: int) -> None:
        check_same({"seed": 3, "first step": 0})
        with pytest.raises(ValueError, match=r"rank 1 has first step 50, rank 0 has 0; start all"):
            check_same({"seed": 3, "first step": 50 * rank})

    run_ranks(2, body)
