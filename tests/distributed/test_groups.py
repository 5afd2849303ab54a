"""Where each process stands, against Megatron's order spelled out: tensor, then data, then pipe."""

import os
from typing import Any

import pytest
import torch.distributed as dist

from megashear.config import ModelConfig
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed, process_group
from tests.ranks import run_ranks
from tests.tiny import layout

GROUPS = ("tensor", "pipeline", "model", "data")


def standing(parallel: Any) -> dict[str, Any]:
    groups = ParallelGroups.create(parallel)
    members = {name: dist.get_process_group_ranks(getattr(groups, name)) for name in GROUPS}
    return {
        "ranks": (groups.tensor_rank, groups.data_rank, groups.pipeline_rank),
        "sizes": (groups.tensor_size, groups.data_size, groups.pipeline_size),
        "ends": (groups.is_first_stage, groups.is_last_stage),
        **members,
    }


@pytest.mark.parametrize(("tp", "dp", "pp"), [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4)])
def test_ranks_count_tensor_first_and_stages_last(tp: int, dp: int, pp: int) -> None:
    found = run_ranks(tp * dp * pp, lambda rank: standing(layout(tp=tp, pp=pp)))
    place = {
        (t, d, p): (p * dp + d) * tp + t for t in range(tp) for d in range(dp) for p in range(pp)
    }
    for (t, d, p), rank in place.items():
        here = found[rank]
        assert here["ranks"] == (t, d, p)
        assert here["sizes"] == (tp, dp, pp)
        assert here["ends"] == (p == 0, p == pp - 1)
        assert here["tensor"] == [place[i, d, p] for i in range(tp)]
        assert here["data"] == [place[t, i, p] for i in range(dp)]
        assert here["pipeline"] == [place[t, d, i] for i in range(pp)]
        assert sorted(here["model"]) == sorted(place[i, d, j] for i in range(tp) for j in range(pp))


def test_a_world_that_does_not_divide_is_refused_on_every_rank() -> None:
    def body(rank: int) -> None:
        with pytest.raises(ValueError, match=r"world size 3 is not a multiple.*= 2 \* 1"):
            ParallelGroups.create(layout(tp=2))

    run_ranks(3, body)


def test_one_process_alone_meets_itself_and_leaves_nothing_open() -> None:
    def body(rank: int) -> tuple[bool, int, int, bool]:
        dist.destroy_process_group()
        # no port is asked for: neither an address nor a rank is known
        assert not {"MASTER_ADDR", "RANK"} & set(os.environ)
        opened = dist.is_initialized()
        with distributed(layout(), ModelConfig()) as groups:
            dist.barrier()
            sizes = groups.world_size, groups.data_size
        return (opened, *sizes, dist.is_initialized())

    assert run_ranks(1, body) == [(False, 1, 1, False)]


def test_groups_that_are_open_are_used_and_left_open() -> None:
    def body(rank: int) -> tuple[int, bool]:
        with process_group():
            size = dist.get_world_size()
        return size, dist.is_initialized()

    assert run_ranks(2, body) == [(2, True)] * 2


def test_destroyed_groups_make_room_for_others() -> None:
    def body(rank: int) -> tuple[int, int]:
        first = ParallelGroups.create(layout(tp=2))
        first.destroy()
        second = ParallelGroups.create(layout(pp=2))
        return first.tensor_size, second.pipeline_size

    assert run_ranks(2, body) == [(2, 2)] * 2


def test_groups_that_were_not_destroyed_are_not_replaced_in_silence() -> None:
    # the twin
    def body(rank: int) -> None:
        ParallelGroups.create(layout(tp=2))
        with pytest.raises(AssertionError, match="already initialized"):
            ParallelGroups.create(layout(pp=2))

    run_ranks(2, body)
