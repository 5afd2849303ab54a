"""Bytes that one rank of a run holds at its fullest, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from megashear.config import ModelConfig, ParallelConfig
from megashear.shape import ModelShape

FLOAT32 = 4
"""Bytes of a float32."""
BFLOAT16 = 2
"""Bytes of a bfloat16."""
MOMENTS = 2
"""Tensors of float32 that Adam keeps for a parameter."""
BUFFER_ALIGNMENT = 64
"""Elements that each parameter's place in a buffer is rounded up to under the distributed
optimizer. Source: megatron-core 0.16.1, param_and_grad_buffer."""
BUCKET_ALIGNMENT = 128
"""The same for the whole buffer, of which each replica takes an equal share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One training step of a model, and how a layout divides it."""

    shape: ModelShape
    parallel: ParallelConfig
    model: ModelConfig
    seq_length: int
    """Tokens per sequence."""
    micro_batch_size: int
    """Sequences per replica and forward pass."""
    num_microbatches: int
    """Microbatches of a replica in one step."""
    data_size: int = 1
    """Replicas."""
    masks: frozenset[str] = frozenset()
    """Kinds of mask, of `masks.targets.KINDS`; none in continued pretraining."""
    noise_streams: int = 1
    """Mask draws that a replica holds in one step."""
    fused_norm: bool = True
    """Whether torch has one kernel for an RMSNorm, as on CUDA: it keeps the norm's input. Without,
    as on a CPU, the normed input is kept as well, both in float32."""

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def virtual(self) -> int:
        """Model chunks of a stage."""
        return self.parallel.num_virtual_stages_per_pipeline_rank

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return BFLOAT16 if self.model.bf16 else FLOAT32

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.seq_length * self.micro_batch_size

    @property
    def own_tokens(self) -> int:
        """Tokens of a microbatch that this rank holds outside attention and MLP."""
        return self.tokens // (self.tensor if self.parallel.sequence_parallel else 1)

    @property
    def chunk_layers(self) -> int:
        """Layers of a model chunk."""
        return self.shape.num_layers // (self.pipeline * self.virtual)

    @property
    def own_vocab(self) -> int:
        """Rows of the embedding on a tensor rank, with the padding that makes all equal."""
        return -(-self.shape.vocab_size // self.tensor)

    @property
    def own_query(self) -> int:
        """Width of a tensor rank's queries."""
        return self.shape.num_attention_heads * self.shape.head_dim // self.tensor

    @property
    def own_key(self) -> int:
        """Width of a tensor rank's keys, and of its values."""
        return self.shape.num_query_groups * self.shape.head_dim // self.tensor

    @property
    def own_ffn(self) -> int:
        """Neurons of a tensor rank."""
        return self.shape.ffn_hidden_size // self.tensor

    @property
    def gates_outputs(self) -> bool:
        """Whether masks multiply the outputs of attention and MLP."""
        return bool(self.masks & {"hidden", "layer"})


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
    optimizer_step: int = 0
    """What Adam needs for a moment, when activations and buffers are free again."""

    @property
    def lasting(self) -> int:
        """What is there between steps."""
        return self.weights + self.gradients + self.masters + self.moments

    @property
    def total(self) -> int:
        """At the fullest moment of a step."""
        step = self.masks + self.activations + self.buffers
        return self.lasting + max(step, self.optimizer_step)

    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rank_memory(work: Work, stage: int, *, fused_adam: bool = False) -> Memory:
    """What a rank of pipeline stage ``stage`` holds.

    Args:
        work: the step.
        stage: from 0.
        fused_adam: whether Transformer Engine or NVIDIA Apex brings Adam; torch's own on CUDA makes
            a float32 copy of what it steps.
    """
    sizes = list(stage_parameters(work, stage))
    count = sum(sizes)
    sharded = work.parallel.use_distributed_optimizer
    held = _in_buffer(sizes, work.data_size) if sharded else count
    stepped = -(-held // work.data_size) if sharded else count
    activations, peak = _in_flight(work, stage)
    return Memory(
        weights=work.element * held,
        gradients=FLOAT32 * held,
        masters=FLOAT32 * stepped if work.model.bf16 else 0,
        moments=MOMENTS * FLOAT32 * stepped,
        masks=2 * FLOAT32 * _gates(work) * work.noise_streams,
        activations=activations,
        buffers=peak - activations,
        optimizer_step=0 if fused_adam else FLOAT32 * stepped,
    )


def fullest(work: Work, *, fused_adam: bool = False) -> tuple[int, Memory]:
    """The stage whose ranks hold most, and what they hold."""
    stages = (
        (stage, rank_memory(work, stage, fused_adam=fused_adam)) for stage in range(work.pipeline)
    )
    return max(stages, key=lambda found: found[1].total)


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
    shape, layers = work.shape, work.chunk_layers * work.virtual
    each = {
        "hidden": shape.hidden_size,
        "head": layers * shape.num_attention_heads // work.tensor,
        "group": layers * shape.num_query_groups // work.tensor,
        "intermediate": layers * work.own_ffn,
        "layer": layers,
    }
    return sum(each[kind] for kind in work.masks)


# What a forward pass keeps. Tokens t of a microbatch, t' of them on this rank outside attention
# and MLP; e bytes an element; widths q, k, i of this rank's queries, keys and neurons; h hidden.


def _norm(work: Work) -> int:
    """Kept by one norm, on t' tokens: its input, and the inverse root mean square."""
    hidden = work.shape.hidden_size
    if not work.fused_norm:
        return work.own_tokens * FLOAT32 * (2 * hidden + 1)
    # a masked norm computes on a float32 copy of the stream
    element = FLOAT32 if "hidden" in work.masks else work.element
    return work.own_tokens * (element * hidden + FLOAT32)


def _keeps_the_stream(work: Work) -> bool:
    """Whether a norm's input is the residual stream itself, not a copy in float32."""
    return not work.model.bf16 or (work.fused_norm and "hidden" not in work.masks)


def _stream(work: Work) -> int:
    """The residual stream once."""
    return work.element * work.own_tokens * work.shape.hidden_size


def attention_kept(work: Work) -> int:
    """Bytes that one layer's attention keeps for its backward pass, with the norm before it."""
    shape, e, t = work.shape, work.element, work.tokens
    q, k = work.own_query, work.own_key
    kept = _norm(work) + _stream(work)  # the norm's output is the input of the projection
    kept += 4 * e * work.seq_length * shape.head_dim  # cosines and sines, of queries and of keys
    kept += e * t * (q + 2 * k)  # what the projection gave, whole, because values are a view of it
    kept += e * t * (q + k)  # turned queries and keys
    kept += e * t * q + FLOAT32 * t * shape.num_attention_heads // work.tensor  # flash: out, lse
    if shape.qk_norm:
        heads = (shape.num_attention_heads + shape.num_query_groups) // work.tensor
        kept += FLOAT32 * t * heads + e * t * q
        if not work.fused_norm:
            kept += FLOAT32 * t * (q + k) * (2 if work.model.bf16 else 1)
            kept -= e * t * q if work.model.bf16 else 0
    if work.masks & {"head", "group"}:
        kept += e * t * q  # the gated context, which the output projection multiplies
    return kept + (_stream(work) if work.gates_outputs else 0)


def mlp_kept(work: Work) -> int:
    """Bytes that one layer's MLP keeps for its backward pass, with the norm before it."""
    kept = _norm(work) + _stream(work)
    # gate and up; silu(gate); up + 0, which megatron-core adds; their product
    kept += 5 * work.element * work.tokens * work.own_ffn
    if "intermediate" in work.masks:
        kept += work.element * work.tokens * work.own_ffn
    return kept + (_stream(work) if work.gates_outputs else 0)


def embedding_kept(work: Work) -> int:
    """Bytes that the embedding keeps: token ids, and its output where a gate multiplies it."""
    return 8 * work.tokens + ("hidden" in work.masks) * _stream(work)


def loss_kept(work: Work) -> int:
    """Bytes that final norm, output layer and cross entropy keep: the softmax is in float32."""
    softmax = FLOAT32 * work.tokens * work.own_vocab
    target, is_other, counted = 8 * work.tokens, work.tokens, FLOAT32 * work.tokens
    return _norm(work) + _stream(work) + softmax + target + is_other + counted


def _layers_kept(work: Work) -> int:
    """Kept by the layers of one chunk."""
    layer, layers = attention_kept(work) + mlp_kept(work), work.chunk_layers
    if work.model.recompute_granularity is None:
        return layers * layer
    each = work.model.recompute_num_layers
    if work.model.recompute_method == "uniform":
        return -(-layers // each) * _stream(work)
    again = min(each, layers)
    return again * _stream(work) + (layers - again) * layer


def _chunk_kept(work: Work, *, first: bool, last: bool) -> int:
    kept = _layers_kept(work)
    if first:
        kept += embedding_kept(work)
    elif work.model.recompute_granularity is None and not _keeps_the_stream(work):
        kept += _stream(work)  # what came from the stage before; the schedule holds it
    return kept + (loss_kept(work) if last else 0)


def _run_again(work: Work, *, last: bool) -> int:
    """Kept beside the rest when a chunk's layers go backward: less the loss, which is through, and
    with what the first of them keep that are run again."""
    extra = -loss_kept(work) if last else 0
    model = work.model
    if model.recompute_granularity is not None:
        again = min(model.recompute_num_layers, work.chunk_layers)
        if model.recompute_method == "block":
            again = int(again == work.chunk_layers)  # one at a time, after those kept whole
        extra += again * (attention_kept(work) + mlp_kept(work))
    return extra


# What a pass needs for a moment beside what it keeps.


def _layer_backward(work: Work) -> int:
    """Most that the backward pass of the layer at the end of a chunk needs at once."""
    e, t, i, hidden = work.element, work.tokens, work.own_ffn, work.shape.hidden_size
    if "intermediate" in work.masks:
        # float32: gradient of the gated neurons, times the gates, times the neurons; under bf16
        # and its rounded sum; the output projection's input is free by then
        products = (3 * FLOAT32 + (BFLOAT16 if work.model.bf16 else 0)) * t * i - e * t * i
    else:
        products = max(2 * e * t * i, e * t * i + e * i * hidden)
    gathered = e * t * hidden if work.parallel.sequence_parallel else 0
    return products + 2 * _stream(work) + gathered


def _chunk_moment(work: Work, *, first: bool, last: bool) -> int:
    """Most that passes of a chunk need beside what one microbatch keeps."""
    e, t, hidden, vocab = work.element, work.tokens, work.shape.hidden_size, work.own_vocab
    moments = []
    moments.append(_layer_backward(work) + _run_again(work, last=last))
    if last:
        # logits beside their float32 copy, in either direction; then the output layer's gradients
        moments.append(e * t * vocab if work.model.bf16 else 0)
        freed = FLOAT32 * t * vocab if work.model.bf16 else 0
        moments.append((e * t * vocab if work.model.bf16 else 0) - freed + e * vocab * hidden)
    if first:
        # a dense gradient of the whole embedding, when all else of the microbatch is free
        moments.append(e * vocab * hidden - _chunk_kept(work, first=first, last=last))
    return max(0, *moments)


def _in_flight(work: Work, stage: int) -> tuple[int, int]:
    """Bytes kept when most microbatches are in flight, and bytes at the fullest moment."""
    kept, again, moment = [], [], []
    for chunk in range(work.virtual):
        place = {
            "first": stage == 0 and chunk == 0,
            "last": stage == work.pipeline - 1 and chunk == work.virtual - 1,
        }
        kept.append(_chunk_kept(work, **place))
        again.append(max(0, _run_again(work, last=place["last"])))
        moment.append(_chunk_moment(work, **place))
    live = most = peak = 0
    for direction, chunk in schedule(work, stage):
        if direction == "forward":
            live += kept[chunk]
        most = max(most, live + (again[chunk] if direction == "backward" else 0))
        peak = max(peak, live + moment[chunk])
        if direction == "backward":
            live -= kept[chunk]
    assert live == 0
    lasting = 0
    if work.parallel.sequence_parallel:
        lasting += work.element * work.tokens * work.shape.hidden_size  # gathered inputs, reused
    if work.pipeline > 1:
        lasting += 2 * _stream(work)  # received, sent
    return most, peak + lasting


Direction = Literal["forward", "backward"]


def schedule(work: Work, stage: int) -> Iterator[tuple[Direction, int]]:
    """Passes of a stage's chunks in the order of 1F1B, plain or interleaved.

    Source: megatron-core 0.16.1, `pipeline_parallel.schedules`: `get_pp_rank_microbatches` and
    `get_schedule_table`.
    """
    pipeline, virtual = work.pipeline, work.virtual
    total = work.num_microbatches * virtual
    behind = pipeline - stage - 1
    ahead = behind if virtual == 1 else 2 * behind + (virtual - 1) * pipeline
    ahead = min(total, ahead if pipeline > 1 else 0)
    # microbatches go through a chunk in groups of as many as there are stages
    forward = [number // pipeline % virtual for number in range(total)]
    for chunk in forward[:ahead]:
        yield "forward", chunk
    for number in range(total):
        if ahead + number < total:
            yield "forward", forward[ahead + number]
        yield "backward", virtual - 1 - forward[number]
