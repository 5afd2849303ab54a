"""ParallelGroups: ranks and groups of this process; only this reads megatron-core's state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from megatron.core import parallel_state

from megashear.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Ranks, sizes and process groups of one process, constant over a run."""

    rank: int
    """Number of this process in the world."""
    world_size: int
    """Number of processes."""
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    """Model chunks of a stage; 1 without interleaving."""
    data_rank: int
    """Number of this process's replica."""
    data_size: int
    """Number of replicas."""
    world: dist.ProcessGroup = field(repr=False)
    """All processes."""
    tensor: dist.ProcessGroup = field(repr=False)
    pipeline: dist.ProcessGroup = field(repr=False)
    model: dist.ProcessGroup = field(repr=False)
    """All processes of this replica, tensor ranks of all stages."""
    data: dist.ProcessGroup = field(repr=False)

    @classmethod
    def create(cls, parallel: ParallelConfig) -> ParallelGroups:
        """Divide the processes of an open torch.distributed. Collective over the world.

        Raises:
            ValueError: the world size does not fit the layout.
        """
        parallel.data_parallel_size(dist.get_world_size())
        virtual = parallel.num_virtual_stages_per_pipeline_rank
        world = dist.group.WORLD
        assert world is not None, "torch.distributed is open"
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            create_gloo_process_groups=False,
        )
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
            virtual_size=virtual,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            world=world,
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            model=parallel_state.get_model_parallel_group(),
            data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def destroy(self) -> None:
        """Destroy the groups, so that this process can create others."""
        parallel_state.destroy_model_parallel()

    @property
    def is_first_stage(self) -> bool:
        """Return whether this process is in the first stage, which holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this process is in the last stage, which computes losses."""
        return self.pipeline_rank == self.pipeline_size - 1
