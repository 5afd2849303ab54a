"""Compare the memory that `megashear plan` says a rank holds with the GPU's allocator.

    torchrun --nproc-per-node 8 tools/benchmarks/memory.py --shape llama2-7b \
      --target-shape llama2-2.7b --use-distributed-optimizer --overlap-grad-reduce \
      --overlap-param-gather --bf16 --micro-batch-size 1 --global-batch-size 32

A model of fresh weights is trained on random tokens for a few steps, with masks if --target-shape
is given. Without a GPU the steps run too, and the allocator's column is empty.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megashear.bounds import Length, Sequences, Steps
from megashear.commands.outcome import is_first_rank, user_errors
from megashear.commands.parse import parse
from megashear.config import MaskConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megashear.data.batch import MicroBatch
from megashear.masks.kinds import EXTENTS
from megashear.masks.targets import whole_parts
from megashear.models.llama import build_llama
from megashear.parallel import device
from megashear.parallel.agree import gather_objects
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.planning.memory import rank_memory
from megashear.planning.work import GIB, Work
from megashear.shape import PRESETS, ModelShape, read_shape
from megashear.train.guard import StepGuard
from megashear.train.objectives import LanguageModelling, Objective
from megashear.train.optim import build_optimizer, build_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.step import TrainStep

PROG = "tools/benchmarks/memory.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRun:
    """Settings of the comparison of plan and allocator."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    shape: str
    """Preset or JSON file of extents."""
    target_shape: str | None = None
    """Target of pruning, a preset or a JSON file; without it there are no masks."""
    micro_batch_size: Sequences = 1
    """Sequences per replica and forward pass."""
    global_batch_size: Sequences = 8
    """Sequences per step."""
    seq_length: Length = 4096
    """Tokens per sequence."""
    steps: Steps = 3
    """Steps to run; the last one is reported."""


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the steps, print the table, and return the exit status."""
    config = parse(MemoryRun, argv, prog=PROG, description=(__doc__ or "").splitlines()[0])
    shape, target = read_shape(config.shape, flag="--shape"), None
    if config.target_shape in PRESETS:
        extents = (*EXTENTS, "head_dim")
        preset = PRESETS[config.target_shape]
        target = dataclasses.replace(shape, **{name: getattr(preset, name) for name in extents})
    elif config.target_shape is not None:
        target = read_shape(config.target_shape, flag="--target-shape")
    with distributed(config.parallel, config.model) as groups:
        work = Work(
            shape=shape,
            parallel=config.parallel,
            model=config.model,
            seq_length=config.seq_length,
            micro_batch_size=config.micro_batch_size,
            num_microbatches=config.global_batch_size
            // (config.micro_batch_size * groups.data_size),
            data_size=groups.data_size,
            masks=frozenset(whole_parts(shape, target)) if target else frozenset(),
        )
        found = allocated(config, work, target, groups)
        everyone = gather_objects((groups.pipeline_rank, found), groups.world)
    if is_first_rank():
        for stage in range(work.pipeline):
            print_stage(work, stage, [held for of, held in everyone if of == stage])
    return 0


def allocated(
    config: MemoryRun, work: Work, target: ModelShape | None, groups: ParallelGroups
) -> dict[str, int]:
    """Return the bytes that a rank's allocator has at the moments that the plan knows."""
    chunks = build_llama(
        work.shape,
        groups,
        work.parallel,
        work.model,
        variant="local",
    )
    optimizer = build_optimizer(
        chunks,
        OptimizerConfig(),
        bf16=work.model.bf16,
        sharded=work.parallel.use_distributed_optimizer,
    )
    objective: Objective = LanguageModelling(chunks)
    if target is not None:
        objective = StructuredPruning(
            chunks,
            groups,
            source=work.shape,
            target=target,
            config=MaskConfig(),
            seed=1,
            global_batch_size=config.global_batch_size,
            sequence_parallel=work.parallel.sequence_parallel,
        )
    train_step = TrainStep(
        chunks=chunks,
        objective=objective,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, OptimizerConfig(), config.steps),
        peak_lr=OptimizerConfig().lr,
        groups=groups,
        guard=StepGuard(TrainConfig()),
    )
    batches = [random_batch(work, number) for number in range(work.num_microbatches)]
    found: dict[str, int] = {}
    for step in range(config.steps):
        mark = _Marks(found)
        mark("lasting")
        losses = train_step.gradients(batches, step)
        mark("lasting and the passes", peak=True)
        train_step.apply(losses, step)
        mark("lasting, in Adam's step", peak=True)
    return found


class _Marks:
    """Notes of allocated bytes: now, or the most since the last note."""

    def __init__(self, found: dict[str, int]) -> None:
        self._found = found

    def __call__(self, name: str, *, peak: bool = False) -> None:
        if not device.has_cuda():
            return
        torch.cuda.synchronize()
        at = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        self._found[name] = at
        self._found["reserved by the allocator"] = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()


def random_batch(work: Work, position: int) -> MicroBatch:
    """Return a microbatch of random tokens."""
    size, length = work.micro_batch_size, work.seq_length
    text = torch.randint(work.shape.vocab_size, (size, length + 1))
    return MicroBatch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        loss_mask=torch.ones(size, length),
        domains=torch.zeros(size, dtype=torch.int64),
        positions=torch.full((size,), position),
    )


def print_stage(work: Work, stage: int, ranks: Sequence[dict[str, Any]]) -> None:
    """Print the plan of a stage, and the most that any of its ranks has allocated."""
    memory = rank_memory(work, stage)
    moment = memory.masks + memory.activations + memory.buffers
    planned = {
        "lasting": memory.lasting,
        "lasting and the passes": memory.lasting + moment,
        "lasting, in Adam's step": memory.lasting,
    }
    print(f"stage {stage}: GiB planned, and of the fullest of {len(ranks)} ranks allocated")
    for name, size in planned.items():
        held = [rank[name] for rank in ranks if name in rank]
        there = f"{max(held) / GIB:9.3f} ({max(held) / size - 1:+.1%})" if held else "not measured"
        print(f"  {name:26} {size / GIB:9.3f}  {there}")
    reserved = [rank["reserved by the allocator"] for rank in ranks if rank]
    if reserved:
        print(f"  {'reserved by the allocator':26} {'':9}  {max(reserved) / GIB:9.3f}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
