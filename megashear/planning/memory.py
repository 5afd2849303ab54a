"""Bytes that one rank of a run holds at its fullest, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megashear.masks.kinds import KINDS
from megashear.planning.activations import forward_only, in_flight
from megashear.planning.work import BFLOAT16, FLOAT32, Work
from megashear.shape import ModelShape

MOMENTS = 2
"""Tensors of float32 that Adam keeps for a parameter."""
BUFFER_ALIGNMENT = 64
"""Elements that each parameter's place in a buffer is rounded up to under the distributed
optimizer. Source: megatron-core 0.16.1, param_and_grad_buffer."""
BUCKET_ALIGNMENT = 128
"""The same for the whole buffer, of which each replica takes an equal share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank, by what holds them."""

    weights: int
    gradients: int
    """Float32 under bf16 as well."""
    masters: int
    """Float32 copies of bfloat16 weights."""
    moments: int
    masks: int
    """Gates on the device and their gradients; log_alpha and its optimizer lie on the host."""
    activations: int
    """Kept for backward passes, at the moment when most microbatches are in flight."""
    buffers: int
    """What a forward or backward pass needs beside them for a moment."""

    @property
    def lasting(self) -> int:
        """What is there between steps."""
        return self.weights + self.gradients + self.masters + self.moments

    @property
    def total(self) -> int:
        """At the fullest moment of a step."""
        return self.lasting + self.masks + self.activations + self.buffers

    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rank_memory(work: Work, stage: int) -> Memory:
    """What a rank of pipeline stage ``stage`` holds; no optimizer step needs more.

    Args:
        work: the step.
        stage: from 0.
    """
    sizes = list(stage_parameters(work, stage))
    count = sum(sizes)
    sharded = work.parallel.use_distributed_optimizer
    held = _in_buffer(sizes, work.data_size) if sharded else count
    stepped = -(-held // work.data_size) if sharded else count
    activations, peak = in_flight(work, stage)
    return Memory(
        weights=work.element * held,
        gradients=FLOAT32 * held,
        masters=FLOAT32 * stepped if work.model.bf16 else 0,
        moments=MOMENTS * FLOAT32 * stepped,
        masks=2 * FLOAT32 * _gates(work) * work.noise_streams,
        activations=activations,
        buffers=peak - activations,
    )


def fullest(work: Work) -> tuple[int, Memory]:
    """The stage whose ranks hold most, and what they hold."""
    stages = ((stage, rank_memory(work, stage)) for stage in range(work.pipeline))
    return max(stages, key=lambda found: found[1].total)


def evaluating(work: Work, stage: int, *, micro_batch_size: int) -> Memory:
    """What a rank of ``stage`` holds in an evaluation of so many sequences a forward pass."""
    passes = replace(work, micro_batch_size=micro_batch_size)
    return replace(rank_memory(work, stage), activations=0, buffers=forward_only(passes, stage))


def checkpoint_bytes(shape: ModelShape, masks: frozenset[str]) -> int:
    """Return the size on disk of a checkpoint of a bfloat16 run: weights, masters, both moments,
    and of every gate log_alpha with its moments.

    Args:
        shape: the model.
        masks: kinds of mask that are learned.
    """
    states = (1 + MOMENTS) * FLOAT32
    gates = sum(KINDS[kind].num_gates(shape) for kind in masks)
    return shape.num_params() * (BFLOAT16 + states) + gates * states


def stage_parameters(work: Work, stage: int) -> Iterator[int]:
    """Elements of every parameter of a rank of ``stage``, in no order."""
    shape, hidden = work.shape, work.shape.hidden_size
    first, last = stage == 0, stage == work.pipeline - 1
    if first:
        yield work.own_vocab * hidden
    for _ in range(work.chunk_layers * work.virtual):
        yield hidden
        yield (work.own_query + 2 * work.own_key) * hidden
        if shape.qkv_bias:
            yield work.own_query + 2 * work.own_key
        if shape.qk_norm:
            yield shape.head_dim
            yield shape.head_dim
        yield work.own_query * hidden
        yield hidden
        yield 2 * work.own_ffn * hidden
        yield work.own_ffn * hidden
    if last:
        yield hidden
        # tied: the last stage has a copy, unless the embedding is its own
        if not (shape.tied_embeddings and first):
            yield work.own_vocab * hidden


def _in_buffer(sizes: list[int], replicas: int) -> int:
    """Elements of the buffer that the distributed optimizer lays parameters out in."""
    end = 0
    for size in sizes:
        end = -(-end // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT + size
    whole = BUCKET_ALIGNMENT * replicas
    return -(-end // whole) * whole


def _gates(work: Work) -> int:
    """Gates of one noise stream on a rank."""
    own_layers = replace(work.shape, num_layers=work.chunk_layers * work.virtual)
    kinds = (KINDS[name] for name in work.masks)
    return sum(
        kind.num_gates(own_layers) // (work.tensor if kind.split_over_tensor else 1)
        for kind in kinds
    )
