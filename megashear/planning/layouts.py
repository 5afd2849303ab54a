"""Layouts of a job on a number of GPUs, with memory and time of each."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from megashear.config import (
    ModelConfig,
    ParallelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
    check_streams,
)
from megashear.planning.memory import Memory, rank_memory
from megashear.planning.time import Cluster, StepTime, step_time
from megashear.planning.work import GIB, Work
from megashear.shape import ModelShape

MOST_CHUNKS = 8
"""Most virtual stages tried; with each a microbatch passes the pipeline once more."""
MOST_SEQUENCES = 16
"""Largest microbatch tried, sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Pruning, or continued pretraining: the model, and the text to train it on."""

    name: str
    """Name for messages: pruning, continued pretraining."""
    batch_flag: str
    """Flag or key with which the user sets the global batch."""
    shape: ModelShape
    masks: frozenset[str]
    """Kinds of mask."""
    target: ModelShape | None = None
    """Model after pruning."""
    teacher: ModelShape | None = None
    """Model that is distilled from."""
    has_entropy: bool = True
    """Whether the cross entropy is in the loss beside the divergence from the teacher."""
    tokens: float
    """Tokens to train on."""
    global_batch_size: int
    """Sequences of a global batch."""
    seq_length: int
    """Tokens per sequence."""
    noise_streams: int
    mfu: float
    """Share of the peak that is reached while computing."""
    mfu_source: str = ""
    """Who measured that share, and on which GPU."""
    teacher_source: str = ""
    """Where the teacher's shape comes from."""
    held_out_per_step: float = 0.0
    """Sequences that evaluations read, forward only, per training step."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 0
    """Checkpoints to keep; 0 for all."""

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps."""
        return math.ceil(self.tokens / (self.global_batch_size * self.seq_length))

    @property
    def saves(self) -> int:
        """Return the number of checkpoints that the run writes."""
        return math.ceil(self.steps / self.save_interval) if self.save_interval else 1

    @property
    def saves_on_disk(self) -> int:
        """Return the most checkpoints at once: those kept, and the next while it is written."""
        return min(self.saves, self.keep + 1) if self.keep else self.saves


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Choices of the user; None leaves one open."""

    tensor: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    micro_batch_size: int | None = None
    parallel: ParallelConfig | None = None
    """A recipe's whole layout, with sequence parallelism, distributed optimizer and overlaps."""
    model: ModelConfig | None = None
    """Recompute settings; other fields do not count."""
    way_out: str = "leaving the layout open"
    """How the user opens the choices again, for messages."""

    @classmethod
    def of_run(cls, run: PruneRun | PretrainRun) -> Choices:
        """Return the layout of a run as it is configured."""
        return cls(
            tensor=run.parallel.tensor_model_parallel_size,
            pipeline=run.parallel.pipeline_model_parallel_size,
            virtual=run.parallel.num_virtual_stages_per_pipeline_rank,
            micro_batch_size=run.train.micro_batch_size,
            parallel=run.parallel,
            model=run.model,
            way_out="--any-layout",
        )

    @property
    def is_open(self) -> bool:
        """Return whether the user has chosen nothing."""
        return self == replace(Choices(), way_out=self.way_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout of a job, with the memory of its fullest ranks and the time of a step."""

    work: Work
    stage: int
    """Stage whose ranks hold most, from 0."""
    memory: Memory
    time: StepTime

    @property
    def needed_gib(self) -> float:
        """Return the memory of the fullest rank, GiB."""
        return self.memory.total / GIB

    def flags(self, job: Job) -> str:
        """Return the flags that `prune` or `pretrain` is started with."""
        parallel, model = self.work.parallel, self.work.model
        words = [f"--tensor-model-parallel-size {self.work.tensor}"]
        if parallel.sequence_parallel:
            words.append("--sequence-parallel")
        if self.work.pipeline > 1:
            words.append(f"--pipeline-model-parallel-size {self.work.pipeline}")
        if self.work.virtual > 1:
            words.append(f"--num-virtual-stages-per-pipeline-rank {self.work.virtual}")
        if parallel.use_distributed_optimizer:
            words.append("--use-distributed-optimizer")
        if parallel.overlap_grad_reduce:
            words.append("--overlap-grad-reduce")
        if parallel.overlap_param_gather:
            words.append("--overlap-param-gather")
        words.append(f"--micro-batch-size {self.work.micro_batch_size}")
        if model.recompute_granularity is not None:
            words.append(
                f"--recompute-granularity full --recompute-method {model.recompute_method} "
                f"--recompute-num-layers {model.recompute_num_layers}"
            )
        if job.target is not None and (fitting := _tensor_ranks(job.target, self.work.tensor)):
            words.append(f"--target-tensor-model-parallel-size {fitting}")
        if job.masks:
            words.append(f"--mask-noise-streams {job.noise_streams}")
        return " ".join([*words, "--bf16"])


class DivisionError(ValueError):
    """A division of GPUs that a run would refuse, with the message of the run."""

    def __init__(self, message: str, passed: int) -> None:
        super().__init__(message)
        self.passed = passed
        """Number of checks that this division passed before it failed one."""


def divisions(
    job: Job, cluster: Cluster, chosen: Choices, refused: list[DivisionError] | None = None
) -> Iterator[Work]:
    """Yield every division of the GPUs that the job's shape and batch allow, without recompute.

    Args:
        job: the job.
        cluster: the GPUs.
        chosen: choices of the user.
        refused: a list that collects the errors of divisions that are refused.
    """
    for tensor in _choices(chosen.tensor, _divisors(cluster.gpus_per_node)):
        for pipeline in _choices(chosen.pipeline, _divisors(job.shape.num_layers)):
            virtual_sizes = [n for n in _divisors(job.shape.num_layers) if n <= MOST_CHUNKS]
            for virtual in _choices(chosen.virtual, virtual_sizes if pipeline > 1 else [1]):
                sizes = [2**n for n in range(MOST_SEQUENCES.bit_length())]
                for size in _choices(chosen.micro_batch_size, sizes):
                    try:
                        yield division(
                            job,
                            cluster.num_gpus,
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual=virtual,
                            micro_batch_size=size,
                            chosen=chosen,
                        )
                    except DivisionError as error:
                        if refused is not None:
                            refused.append(error)


def division(
    job: Job,
    num_gpus: int,
    *,
    tensor: int,
    pipeline: int,
    virtual: int,
    micro_batch_size: int,
    chosen: Choices | None = None,
) -> Work:
    """Return one division of the GPUs.

    Unless the user has ``chosen`` otherwise, every division with tensor ranks has sequence
    parallelism, which also divides the work outside attention and MLP. Every division with replicas
    has the distributed optimizer and overlaps communication.

    Raises:
        DivisionError: a run would refuse it; with the run's message.
    """
    replicated = num_gpus > tensor * pipeline
    with _check(0, job):
        parallel = (chosen and chosen.parallel) or ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            num_virtual_stages_per_pipeline_rank=virtual,
            sequence_parallel=tensor > 1,
            use_distributed_optimizer=replicated,
            overlap_grad_reduce=replicated,
            overlap_param_gather=replicated,
        )
        replicas = parallel.data_parallel_size(num_gpus)
    with _check(1, job):
        job.shape.check_division(tensor=tensor, pipeline=pipeline, virtual=virtual)
        if job.teacher is not None:
            job.teacher.check_division(
                tensor=tensor, pipeline=pipeline, virtual=virtual, role="teacher"
            )
        if chosen is not None and chosen.model is not None:
            chosen.model.check_recompute(job.shape.num_layers // (pipeline * virtual))
    with _check(2, job):
        train = TrainConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=job.global_batch_size,
            seq_length=job.seq_length,
        )
        microbatches = train.num_microbatches(replicas)
    with _check(3, job):
        parallel.check_microbatches(microbatches)
        parallel.check_sequence(job.seq_length)
    with _check(4, job):
        if job.masks:
            check_streams(
                job.noise_streams,
                global_batch_size=job.global_batch_size,
                micro_batch_size=micro_batch_size,
            )
    return Work(
        shape=job.shape,
        parallel=parallel,
        model=ModelConfig(bf16=True),
        seq_length=job.seq_length,
        micro_batch_size=micro_batch_size,
        num_microbatches=microbatches,
        data_size=replicas,
        masks=job.masks,
        noise_streams=job.noise_streams,
        teacher=job.teacher,
        has_entropy=job.has_entropy,
    )


@contextlib.contextmanager
def _check(number: int, job: Job) -> Iterator[None]:
    """Turn the refusal of a run into that of a plan, with the plan's flag of the global batch."""
    try:
        yield
    except ValueError as error:
        message = str(error).replace("--global-batch-size", job.batch_flag)
        raise DivisionError(message, number) from None


def candidate(work: Work, job: Job, cluster: Cluster) -> Candidate:
    """Return a division with its memory and time."""
    # a later stage, up to the last, holds less than the second: fewer microbatches in flight
    stages = sorted({0, min(1, work.pipeline - 1), work.pipeline - 1})
    held = {stage: rank_memory(work, stage) for stage in stages}
    stage = max(held, key=lambda stage: held[stage].total)
    time = step_time(work, cluster, mfu=job.mfu)
    return Candidate(work=work, stage=stage, memory=held[stage], time=time)


def recompute_choices(work: Work, chosen: ModelConfig | None = None) -> Iterator[ModelConfig]:
    """Yield settings of recompute, cheapest first: no layer, some layers of a chunk, all layers.

    If the user has ``chosen`` a setting, yield only that.
    """
    if chosen is not None:
        yield chosen
        return
    yield work.model
    layers = work.chunk_layers
    for count in range(1, layers):
        yield dataclasses.replace(
            work.model,
            recompute_granularity="full",
            recompute_method="block",
            recompute_num_layers=count,
        )
    yield dataclasses.replace(work.model, recompute_granularity="full")


def _tensor_ranks(target: ModelShape, most: int) -> int | None:
    """Return the most tensor ranks, up to ``most``, that divide a target; None if ``most`` does."""
    fitting = []
    for tensor in range(1, most + 1):
        with contextlib.suppress(ValueError):
            target.check_division(tensor=tensor, pipeline=1)
            fitting.append(tensor)
    return None if fitting[-1] == most else fitting[-1]


def order(found: Candidate) -> tuple[float, int, int, int]:
    """Return a key that sorts the fastest first, of equals that with the largest products."""
    seconds = float(f"{found.time.total:.3g}")  # no estimate is finer than that
    return seconds, -found.work.micro_batch_size, found.work.virtual, found.work.pipeline


def _choices(chosen: int | None, others: Iterable[int]) -> list[int]:
    return list(others) if chosen is None else [chosen]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
