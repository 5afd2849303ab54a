"""Bytes that one rank of a run holds at its fullest, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megashear.masks.kinds import KINDS
from megashear.models import weight_table
from megashear.planning.activations import (
    forward_only,
    in_flight,
    streams_under_way,
    taught_bytes,
)
from megashear.planning.work import BFLOAT16, FLOAT32, Work
from megashear.shape import ModelShape

MOMENTS = 2
"""Tensors of float32 that Adam keeps for a parameter."""
BUFFER_ALIGNMENT = 64
"""Elements that each parameter's place in a buffer is rounded up to under the distributed
optimizer. Source: megatron-core 0.16.1, param_and_grad_buffer."""
BUCKET_ALIGNMENT = 128
"""Elements, for each replica, that the whole buffer is rounded up to: replicas share it equally."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank, by what holds them."""

    weights: int
    gradients: int
    """Gradients, float32 under bf16 as well."""
    masters: int
    """Float32 copies of bfloat16 weights."""
    moments: int
    folded: int
    """Folded copies of weights, one for each noise stream that is under way at once; and where a
    replica has several streams, the gradient of one of them, float32."""
    masks: int
    """Gates on the device and their gradients; log_alpha and its optimizer are on the host."""
    teacher: int
    """Weights of the teacher, and its hidden states of a step's microbatches."""
    activations: int
    """Tensors kept for backward passes when most microbatches are in flight."""
    buffers: int
    """Tensors that a forward or backward pass needs for a moment besides these."""

    @property
    def lasting(self) -> int:
        """Return the bytes held between steps."""
        return self.weights + self.gradients + self.masters + self.moments + self.folded

    @property
    def total(self) -> int:
        """Return the bytes at the fullest moment of a step."""
        passes = self.masks + self.teacher + self.activations + self.buffers
        return self.lasting + passes

    def parts(self) -> dict[str, int]:
        """Return the bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rank_memory(work: Work, stage: int) -> Memory:
    """Return what a rank of a stage holds in its passes; no optimizer step needs more.

    Args:
        work: the step.
        stage: pipeline stage, from 0.
    """
    sizes = list(stage_parameters(work, stage))
    count = sum(sizes)
    sharded = work.parallel.use_distributed_optimizer
    held = _in_buffer(sizes, work.data_size) if sharded else count
    stepped = -(-held // work.data_size) if sharded else count
    activations, peak = in_flight(work, stage)
    teacher = taught = 0
    if work.teacher is not None:
        # its pass precedes all others
        peak = max(peak, forward_only(work.of_teacher, stage, with_logits=False))
        teacher = work.element * sum(stage_parameters(work.of_teacher, stage))
        taught = taught_bytes(work, stage)
    return Memory(
        weights=work.element * held,
        gradients=FLOAT32 * held,
        masters=FLOAT32 * stepped if work.model.bf16 else 0,
        moments=MOMENTS * FLOAT32 * stepped,
        folded=folded_bytes(work, stage),
        masks=2 * FLOAT32 * _gates(work) * work.own_streams,
        teacher=teacher + taught,
        activations=activations,
        buffers=peak - activations,
    )


def fullest_stage(work: Work) -> tuple[int, Memory]:
    """Return the stage whose ranks hold most, and what they hold."""
    stages = ((stage, rank_memory(work, stage)) for stage in range(work.pipeline))
    return max(stages, key=lambda found: found[1].total)


def evaluation_memory(work: Work, stage: int, *, micro_batch_size: int) -> Memory:
    """Return what a rank of ``stage`` holds in an evaluation with microbatches of this size."""
    passes = replace(work, micro_batch_size=micro_batch_size)
    memory = rank_memory(work, stage)
    return replace(
        memory,
        teacher=memory.teacher - taught_bytes(work, stage),
        activations=0,
        buffers=forward_only(passes, stage),
    )


def checkpoint_bytes(shape: ModelShape, masks: frozenset[str]) -> int:
    """Return the size on disk of a checkpoint of a bfloat16 run.

    It has weights, masters and both moments, and log_alpha with both moments for every gate.

    Args:
        shape: the model.
        masks: kinds of mask that are learned.
    """
    states = (1 + MOMENTS) * FLOAT32
    gates = sum(KINDS[kind].num_gates(shape) for kind in masks)
    return shape.num_params() * (BFLOAT16 + states) + gates * states


def stage_parameters(work: Work, stage: int) -> Iterator[int]:
    """Yield the elements of every parameter of a rank of ``stage``."""
    for _, _, size in _parameters(work, stage):
        yield size


def folded_bytes(work: Work, stage: int) -> int:
    """Return the bytes that `models.folded` keeps for the weights that masks act on."""
    # the factor of a head is its own gate times that of its group
    acting = {name for name, kind in KINDS.items() if {name, kind.within} & work.masks}
    copies = streams_under_way(work, stage)
    apart = FLOAT32 if work.own_streams > 1 else 0
    return sum(
        size * (copies[chunk] * work.element + apart)
        for chunk, row, size in _parameters(work, stage)
        if any(acting.intersection(kinds) for part in row.parts for kinds in part.folds)
    )


def _parameters(work: Work, stage: int) -> Iterator[tuple[int, weight_table.MegatronTensor, int]]:
    """Yield each parameter of a rank of ``stage``: chunk, row of the weight table, elements."""
    rows = weight_table.table(work.shape)
    of_layer = [row for row in rows if row.per_layer]
    before = [*rows[: rows.index(of_layer[0])]]
    after = [*rows[len(before) + len(of_layer) :]]
    if work.shape.tied_embeddings and work.pipeline > 1:
        after += before  # the last stage has a copy of the embedding
    shard = replace(weight_table.shape_of_shard(work.shape, work.tensor), vocab_size=work.own_vocab)
    for chunk in range(work.virtual):
        first = stage == 0 and chunk == 0
        last = stage == work.pipeline - 1 and chunk == work.virtual - 1
        for row in (*before * first, *of_layer * work.chunk_layers, *after * last):
            yield chunk, row, math.prod(row.extents(shard))


def _in_buffer(sizes: list[int], replicas: int) -> int:
    """Return the elements of the buffer in which the distributed optimizer has parameters."""
    end = 0
    for size in sizes:
        end = -(-end // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT + size
    whole = BUCKET_ALIGNMENT * replicas
    return -(-end // whole) * whole


def _gates(work: Work) -> int:
    """Return the number of gates of one noise stream on a rank."""
    own_layers = replace(work.shape, num_layers=work.chunk_layers * work.virtual)
    kinds = (KINDS[name] for name in work.masks)
    return sum(
        kind.num_gates(own_layers) // (work.tensor if kind.split_over_tensor else 1)
        for kind in kinds
    )
