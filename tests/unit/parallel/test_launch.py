"""Errors in environment and configuration are raised before processes meet."""

import json
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megashear.config import ModelConfig, ParallelConfig
from megashear.parallel import agree, device, kernel_choice, launch
from megashear.parallel.launch import distributed, fresh_store, process_group, recorded
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor_model_parallel_size=2), "world size 3 is not a multiple of"),
    ],
)
def test_refusals_come_before_the_meeting(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    # a meeting would fail with these, but not with ValueError
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ValueError, match=message),
        distributed(parallel, ModelConfig()),
    ):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("status", [0, 2])
def test_a_process_of_torchrun_ends_as_its_command_does(status: int) -> None:
    def leaves() -> int:
        raise SystemExit(status)  # --help and --dry-run, or a flag that is refused

    assert recorded(lambda: status) == status
    if status:
        with pytest.raises(SystemExit) as end:
            recorded(leaves)
        assert end.value.code == status
    else:
        assert recorded(leaves) == 0


def meet_in(store: dist.Store, world_size: int) -> list[str]:
    """Return what rank 0 wrote for all ranks of one attempt (threads), in their part of a store."""
    found = [""] * world_size

    def rank_body(rank: int) -> None:
        time.sleep(0.1 * rank)  # the last rank's old mark is read first
        part = fresh_store(store, rank, world_size, timeout_s=20)
        part.set(f"rank{rank}", "here")
        part.wait([f"rank{other}" for other in range(world_size)])
        found[rank] = part.get("rank0").decode()

    threads = [threading.Thread(target=rank_body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_a_second_attempt_meets_in_the_store_that_a_first_one_left() -> None:
    store, everyone = dist.HashStore(), ["here"] * 3
    assert meet_in(store, 3) == everyone
    first = json.loads(store.get("megashear/meeting/call"))
    assert meet_in(store, 3) == everyone
    second = json.loads(store.get("megashear/meeting/call"))
    assert first[0] != second[0]
    assert not set(first[1]) & set(second[1])  # no mark of the first attempt was used


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    store.set("megashear/meeting/mark/2", "of an earlier attempt")
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not come to the start in 0.3 s"):
        fresh_store(store, 0, 3, timeout_s=0.3)
    with pytest.raises(RuntimeError, match=r"rank 1: the start did not come about in 0.3 s"):
        fresh_store(store, 1, 3, timeout_s=0.3)


@pytest.mark.parametrize(
    ("obstacles", "deterministic", "compiled"),
    [
        ((None, None), False, True),
        ((None, "no C compiler"), False, False),
        ((None, None), True, False),
    ],
)
def test_kernels_are_compiled_on_all_ranks_or_on_none(
    obstacles: tuple[str | None, ...], deterministic: bool, compiled: bool
) -> None:
    def body(rank: int) -> tuple[bool, list[str]]:
        kernel_choice.compile_obstacle = lambda: obstacles[rank]
        device.has_cuda = lambda: True
        told: list[str] = []
        launch.logger.warning = lambda text, *values: told.append(text % values)  # type: ignore[method-assign]
        launch._choose_kernels(ModelConfig(deterministic_mode=deterministic))
        return kernel_choice.compiles_kernels(), told

    for chosen, told in run_ranks(2, body):
        assert chosen is compiled
        if any(obstacles):
            assert "torch.compile does not work on rank 1 (no C compiler)" in told[0]
        else:
            assert told == []


@pytest.mark.parametrize("wrong", ["the core is for another CUDA", None])
def test_a_start_says_that_an_optional_package_is_for_another_cuda(wrong: str | None) -> None:
    def body(rank: int) -> list[str]:
        device.engine_mismatch = lambda *cuda: wrong
        told: list[str] = []
        launch.logger.warning = lambda text, *values: told.append(text % values)  # type: ignore[method-assign]
        with distributed(ParallelConfig(), ModelConfig()):
            return told

    assert run_ranks(1, body) == [[] if wrong is None else [wrong]]


def test_a_process_alone_leaves_no_temporary_file_if_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    with process_group():
        assert dist.get_world_size() == 1
        assert agree.gather_objects("alone") == ["alone"]
        assert list(tmp_path.iterdir()) == []  # files that are there now would stay
    assert not dist.is_initialized()
    # nccl meets through a file, which is removed if the process ends without an error
    with launch._own_store("cpu:gloo,cuda:nccl") as store:
        assert isinstance(store, dist.FileStore)
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []
