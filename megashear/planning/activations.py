"""Bytes that passes keep or need for a moment, in the order of the pipeline's schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from megashear.planning.work import FLOAT32, Work

Direction = Literal["forward", "backward"]

# What a forward pass keeps. A microbatch has t tokens, an element e bytes. q, k and i are widths of
# this rank's queries, keys and neurons. Masks add nothing: they are folded into weights.


def _residual(work: Work) -> int:
    """Return the bytes of the residual stream at one place of the model."""
    return work.element * work.own_tokens * work.shape.hidden_size


def _norm(work: Work) -> int:
    """Return the bytes that one norm keeps: its input, and the inverse root mean square."""
    return _residual(work) + FLOAT32 * work.own_tokens


def attention_kept(work: Work) -> int:
    """Return the bytes that one layer's attention and the norm before it keep."""
    shape, e, t = work.shape, work.element, work.tokens
    q, k = work.own_query, work.own_key
    kept = _norm(work) + _residual(work)  # the norm's output is the input of the projection
    kept += e * t * (q + 2 * k)  # turned queries and keys, and a copy of the values
    # context, and the logarithm of the softmax's sum, of the flash kernel
    kept += e * t * q + FLOAT32 * t * shape.num_attention_heads // work.tensor
    if shape.qk_norm:
        kept += FLOAT32 * t * (shape.num_attention_heads + shape.num_query_groups) // work.tensor
        # the projection's output, whole, because keys are a view of it
        kept += e * t * (q + 2 * k)
        # with several query heads a group, a copy of the queries
        kept += e * t * q if shape.heads_per_group > 1 else 0
    return kept


def mlp_kept(work: Work) -> int:
    """Return the bytes that one layer's MLP and the norm before it keep."""
    gate_up_and_product = 3 * work.element * work.tokens * work.own_ffn
    return _norm(work) + _residual(work) + gate_up_and_product


def loss_kept(work: Work) -> int:
    """Return the bytes that final norm, output layer and cross entropy keep."""
    # a token has largest logit, factor, loss and weight; its label, and whether it is this rank's
    logits = work.element * work.tokens * work.own_vocab
    kept = 1 if work.teacher is None else 1 + work.has_entropy  # the divergence has its own
    return _norm(work) + _residual(work) + kept * logits + (4 * FLOAT32 + 8 + 1) * work.tokens


def _layers_kept(work: Work) -> int:
    """Return the bytes that the layers of one chunk keep."""
    layer, layers = attention_kept(work) + mlp_kept(work), work.chunk_layers
    if work.model.recompute_granularity is None:
        return layers * layer
    each = work.model.recompute_num_layers
    if work.model.recompute_method == "uniform":
        return -(-layers // each) * _residual(work)
    again = min(each, layers)
    return again * _residual(work) + (layers - again) * layer


def _chunk_kept(work: Work, *, first: bool, last: bool) -> int:
    kept = _layers_kept(work)
    token_ids = 8 * work.tokens
    return kept + (token_ids if first else 0) + (loss_kept(work) if last else 0)


def _run_again(work: Work, *, last: bool) -> int:
    """Return the bytes kept, over those of the forward pass, when layers begin to go backward.

    The loss no longer keeps its bytes, and the first layers that are run again keep theirs.
    """
    extra = -loss_kept(work) if last else 0
    model = work.model
    if model.recompute_granularity is not None:
        again = min(model.recompute_num_layers, work.chunk_layers)
        if model.recompute_method == "block":
            again = int(again == work.chunk_layers)  # one at a time, after layers that are kept
        # the input of the first of them is kept already
        extra += again * (attention_kept(work) + mlp_kept(work)) - bool(again) * _residual(work)
    return extra


# What a pass needs for a moment, besides what it keeps.


def _layer_backward(work: Work) -> int:
    """Return the most bytes that the backward pass of a layer needs at once."""
    e, t, i, hidden = work.element, work.tokens, work.own_ffn, work.shape.hidden_size
    # The activation, with torch's single operators: gradient of its input, sigmoid and silu of the
    # gate; under bfloat16 float32 copies of its input and of its output's gradient. The projection
    # after it has gone backward.
    each = 2 * e + 8 + (12 if work.model.bf16 else 0)
    activation = t * i * each + _residual(work)
    gathered = e * t * hidden if work.parallel.sequence_parallel else 0
    # The projection: gradient of its input, and of its weight twice.
    projection = e * t * i + 2 * e * i * hidden + gathered + 2 * _residual(work)
    return max(activation, projection)


def _chunk_moment(work: Work, *, first: bool, last: bool) -> int:
    """Return the most bytes that passes of a chunk need besides what one microbatch keeps."""
    e, hidden, vocab = work.element, work.shape.hidden_size, work.own_vocab
    moments = [_layer_backward(work) + _run_again(work, last=last)]
    if last:
        # Gradient of the output layer. That of the logits is written over them, and little of it
        # is float32 at a time (models/cross_entropy.py). Where a hook closes padding, autograd
        # copies it.
        padded = work.tensor * vocab != work.shape.vocab_size
        copied = work.element * work.tokens * vocab if padded else 0
        moments.append(e * vocab * hidden + _residual(work) + copied)
        moments.append(_beside_divergence(work))
    if first:
        # a dense gradient of the whole embedding, when the rest of the microbatch is free
        moments.append(e * vocab * hidden - _chunk_kept(work, first=first, last=last))
    return max(0, *moments)


def _beside_divergence(work: Work) -> int:
    """Return the bytes of logits that the divergence needs besides those that are kept.

    They are the model's, and where a microbatch has several sequences the teacher's before they are
    turned to [b, s, v].
    """
    if work.teacher is None:
        return 0
    return (1 + (work.micro_batch_size > 1)) * work.element * work.tokens * work.own_vocab


def taught_bytes(work: Work, stage: int) -> int:
    """Return the bytes of the teacher's hidden states that wait for a step's microbatches."""
    if work.teacher is None or stage != work.pipeline - 1:
        return 0
    return work.num_microbatches * _residual(work.of_teacher)


def in_flight(work: Work, stage: int) -> tuple[int, int]:
    """Return the bytes kept when most microbatches are in flight, and at the fullest moment."""
    # bytes of each chunk
    kept, again, moment = [], [], []
    for chunk in range(work.virtual):
        place = {
            "first": stage == 0 and chunk == 0,
            "last": stage == work.pipeline - 1 and chunk == work.virtual - 1,
        }
        kept.append(_chunk_kept(work, **place))
        again.append(max(0, _run_again(work, last=place["last"])))
        moment.append(_chunk_moment(work, **place))
    # run the schedule; more microbatches than these add no more in flight
    live = most = peak = 0
    enough = replace(work, num_microbatches=min(work.num_microbatches, 4 * work.pipeline))
    for direction, chunk in schedule(enough, stage):
        if direction == "forward":
            live += kept[chunk]
        most = max(most, live + (again[chunk] if direction == "backward" else 0))
        peak = max(peak, live + moment[chunk])
        if direction == "backward":
            live -= kept[chunk]
    assert live == 0
    return most + _rotary_table(work), peak + _throughout(work)


def streams_under_way(work: Work, stage: int) -> list[int]:
    """Return for each chunk the most noise streams between their first pass and their last."""
    most = [1] * work.virtual
    if work.own_streams == 1:
        return most
    each = work.num_microbatches * work.data_size // work.noise_streams  # microbatches of a stream
    # microbatches of its stream that come before a replica's first one
    for begin in {replica * work.num_microbatches % each for replica in range(work.data_size)}:
        newest, oldest = [begin - 1] * work.virtual, [begin] * work.virtual
        for direction, chunk in schedule(work, stage):
            (newest if direction == "forward" else oldest)[chunk] += 1
            most[chunk] = max(most[chunk], newest[chunk] // each - oldest[chunk] // each + 1)
    return most


def _rotary_table(work: Work) -> int:
    """Return the bytes of cosines and sines of all positions, which layers share."""
    return FLOAT32 * work.seq_length * work.shape.head_dim


def _throughout(work: Work) -> int:
    """Return the bytes that last while a schedule runs."""
    lasting = _rotary_table(work)
    if work.parallel.sequence_parallel:
        lasting += work.element * work.tokens * work.shape.hidden_size  # gathered inputs, reused
    if work.pipeline > 1:
        lasting += 2 * _residual(work)  # received, sent
    return lasting


def forward_only(work: Work, stage: int, *, with_logits: bool = True) -> int:
    """Return the bytes at the fullest moment of a forward pass without a backward pass.

    Args:
        work: the step.
        stage: pipeline stage, from 0.
        with_logits: whether the last stage makes logits.
    """
    # only bfloat16 is copied to float32 and back
    copy, back = (FLOAT32, work.element) if work.model.bf16 else (0, 0)
    # gate and up with their copies, and their product
    activation = (2 * (work.element + copy) + FLOAT32 + back) * work.own_ffn
    is_last = stage == work.pipeline - 1
    logits = work.element * work.own_vocab if is_last and with_logits else 0
    # and a layer's input, its norm's output, and the chunk's input, which its caller holds
    return work.tokens * max(activation, logits) + 3 * _residual(work) + _throughout(work)


def schedule(work: Work, stage: int) -> Iterator[tuple[Direction, int]]:
    """Yield the passes of a stage's chunks in the order of 1F1B, plain or interleaved.

    Source: megatron-core 0.16.1, `pipeline_parallel.schedules`: `get_pp_rank_microbatches` and
    `get_schedule_table`.
    """
    pipeline, virtual = work.pipeline, work.virtual
    total = work.num_microbatches * virtual
    # forward passes before the first backward pass
    later = pipeline - stage - 1
    ahead = later if virtual == 1 else 2 * later + (virtual - 1) * pipeline
    ahead = min(total, ahead if pipeline > 1 else 0)
    # microbatches pass a chunk in groups, each as many as there are stages
    forward = [number // pipeline % virtual for number in range(total)]
    for chunk in forward[:ahead]:
        yield "forward", chunk
    for number in range(total):
        if ahead + number < total:
            yield "forward", forward[ahead + number]
        yield "backward", virtual - 1 - forward[number]
