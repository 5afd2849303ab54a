"""How processes are divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megashear.bounds import COMMON, Extent, Ranks, check_bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How processes are divided: data parallelism gets the processes that tensor and pipeline
    leave."""

    tensor_model_parallel_size: Annotated[Ranks, COMMON] = 1
    """Tensor-parallel ranks, which divide query groups, MLP neurons and vocabulary."""
    pipeline_model_parallel_size: Annotated[Ranks, COMMON] = 1
    """Pipeline stages, which divide the layers."""
    num_virtual_stages_per_pipeline_rank: Ranks = 1
    """Model chunks per pipeline rank, for the interleaved schedule; 1 is the plain 1F1B
    schedule."""
    context_parallel_size: Ranks = 1
    """Context-parallel ranks; only 1 is supported."""
    sequence_parallel: Annotated[bool, COMMON] = False
    """Split the sequence over tensor ranks outside attention and MLP. Needs tensor parallelism."""
    use_distributed_optimizer: Annotated[bool, COMMON] = False
    """Shard Adam's moments and float32 masters over data-parallel ranks, each of which steps its
    part. Checkpoints are the same with and without it."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks during the backward pass."""
    overlap_param_gather: bool = False
    """Gather the weights that other data-parallel ranks stepped during the forward pass. Needs
    --use-distributed-optimizer and --overlap-grad-reduce."""
    ddp_bucket_size: Extent | None = None
    """Number of weights whose gradients --overlap-grad-reduce reduces together. Unless given, the
    larger of 40 million and one million per data-parallel rank."""
    overlap_p2p_communication: bool = False
    """Send between pipeline stages while they compute; needs the interleaved schedule."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.context_parallel_size != 1:
            raise ValueError(
                f"--context-parallel-size {self.context_parallel_size} is not supported; use 1 and "
                f"--sequence-parallel or --recompute-granularity full to save activation memory"
            )
        if self.num_virtual_stages_per_pipeline_rank > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--num-virtual-stages-per-pipeline-rank "
                f"{self.num_virtual_stages_per_pipeline_rank} needs "
                f"--pipeline-model-parallel-size of at least 2, found 1"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "--sequence-parallel splits the sequence over tensor ranks and "
                "--tensor-model-parallel-size is 1; raise it to 2 or more, or drop the flag"
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            missing = (
                "overlap-grad-reduce"
                if self.use_distributed_optimizer
                else ("use-distributed-optimizer")
            )
            raise ValueError(
                f"--overlap-param-gather gathers what sharded optimizers stepped, and needs "
                f"gradients that are reduced early; give --{missing} too, or drop the flag"
            )
        if self.ddp_bucket_size is not None and not self.overlap_grad_reduce:
            raise ValueError(
                f"--ddp-bucket-size {self.ddp_bucket_size} divides gradients that are reduced "
                f"during the backward pass, and --overlap-grad-reduce is not given; give both or "
                f"neither"
            )
        if self.overlap_p2p_communication and self.num_virtual_stages_per_pipeline_rank == 1:
            raise ValueError(
                "--overlap-p2p-communication needs --num-virtual-stages-per-pipeline-rank of at "
                "least 2; the plain 1F1B schedule cannot overlap"
            )

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of model replicas among ``world_size`` processes.

        Raises:
            ValueError: the processes cannot be divided so.
        """
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"world size {world_size} is not a multiple of --tensor-model-parallel-size * "
                f"--pipeline-model-parallel-size = {self.tensor_model_parallel_size} * "
                f"{self.pipeline_model_parallel_size}; start a multiple of "
                f"{self.model_parallel_size} processes (torchrun --nproc-per-node) or lower one "
                f"of the two"
            )
        return world_size // self.model_parallel_size

    def check_microbatches(self, num_microbatches: int) -> None:
        """Refuse microbatches of a replica that the interleaved schedule cannot share out.

        Raises:
            ValueError: with both numbers.
        """
        stages = self.pipeline_model_parallel_size
        if self.num_virtual_stages_per_pipeline_rank > 1 and num_microbatches % stages:
            raise ValueError(
                f"the interleaved schedule wants a multiple of --pipeline-model-parallel-size "
                f"{stages} microbatches per replica, found {num_microbatches}; change "
                f"--global-batch-size or --micro-batch-size"
            )

    def check_sequence(self, seq_length: int) -> None:
        """Refuse a sequence that sequence parallelism cannot split.

        Raises:
            ValueError: with both numbers.
        """
        tensor = self.tensor_model_parallel_size
        if self.sequence_parallel and seq_length % tensor:
            raise ValueError(
                f"--seq-length {seq_length} is not a multiple of --tensor-model-parallel-size "
                f"{tensor}, over which --sequence-parallel splits it"
            )
