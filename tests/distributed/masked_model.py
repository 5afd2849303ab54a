"""The masked Megatron model at any layout, run once under given gates and brought home whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megashear.config import ModelConfig, ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.masks.mask_set import MaskSet
from megashear.masks.targets import whole_parts
from megashear.models.binding import MaskBinding
from megashear.models.llama import build_llama, own_layers
from megashear.models.parts import own_parts
from megashear.models.weight_table import fuse, tensors
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.schedule import run_chunk, run_schedule
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, assemble, named_parameters, set_weights

Sampler = Callable[[MaskSet], Mapping[int, Mapping[str, Tensor]]]
"""Gates of this rank by stream and kind, from its masks."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward and backward pass gave, whole."""

    logits: Tensor
    """[sequences, s, v], in the order of the microbatches."""
    loss: float
    """Mean over microbatches of their mean over counted tokens."""
    weight_grads: dict[str, Tensor]
    """By Megatron name, global layer numbers."""
    gate_grads: dict[tuple[int, str], Tensor]
    """By stream and kind, whole rows."""
    mask_grads: dict[str, Tensor]
    """Of log_alpha by kind, whole rows; of the loss alone."""


def by_megatron_name(hf: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Tensors by Hugging Face name, fused as Megatron has them."""
    return {
        row.name.format(layer=layer): fuse(
            row, [hf[part.hf_name.format(layer=layer)] for part in row.parts], shape
        )
        for row, layer in tensors(shape)
    }


def run_pass(
    parallel: ParallelConfig,
    *,
    source: ModelShape,
    target: ModelShape,
    weights: Mapping[str, Tensor],
    log_alpha: Mapping[str, Tensor],
    sample: Sampler,
    batches: Sequence[MicroBatch],
    streams: Sequence[int],
    broken: Callable[[], None] | None = None,
    model: ModelConfig | None = None,
) -> Pass:
    """Run the model of one replica at a layout; forward only where no gate wants a gradient.

    Args:
        parallel: the layout.
        source: shape of the model.
        target: decides which masks there are.
        weights: whole, by Hugging Face name.
        log_alpha: whole masks by kind.
        sample: makes this rank's gates.
        batches: microbatches.
        streams: noise stream of each.
        broken: run first on every rank, to show that a comparison notices.
        model: how it computes; the defaults unless given.
    """
    whole = by_megatron_name(weights, source)

    def body(rank: int) -> dict[str, Any]:
        if broken is not None:
            broken()
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(source, groups, parallel, model or ModelConfig(), variant="local")
        set_weights(chunks, whole, groups.tensor_rank, groups.tensor_size)
        masks = MaskSet(own_parts(whole_parts(source, target), own_layers(chunks), groups))
        binding = MaskBinding(
            chunks, masks, source, groups, sequence_parallel=parallel.sequence_parallel
        )
        fill(masks.state_dict(), binding.slice_gates(log_alpha))
        sampled = sample(masks)
        is_trained = any(z.requires_grad for gates in sampled.values() for z in gates.values())
        binding.bind(sampled, streams if is_trained else ())
        held: dict[str, Any] = {
            "tensor_rank": groups.tensor_rank,
            "parts": masks.parts,
            "logits": own_logits(chunks, batches, streams=streams, select=binding.select),
            "losses": [float("nan")] if groups.is_last_stage else [],
            "weight_grads": {},
            "gate_grads": {},
            "mask_grads": {},
        }
        if not is_trained:
            return held
        for chunk in chunks:
            chunk.zero_grad_buffer()
        losses = run_schedule(
            chunks, batches, forward_only=False, streams=streams, select=binding.select
        )
        gate_grads = binding.whole_gradients()
        binding.backward()
        return held | {
            "losses": [float(loss.sums.sum() / loss.counts.sum()) for loss in losses],
            "weight_grads": {
                name: parameter.main_grad.clone()  # type: ignore[attr-defined]
                for name, parameter in named_parameters(chunks).items()
            },
            "gate_grads": {
                (stream, kind): grad
                for stream, of_kind in gate_grads.items()
                for kind, grad in of_kind.items()
            },
            "mask_grads": {kind: mask.grad for kind, mask in masks.log_alpha.items()},
        }

    return _whole(run_ranks(parallel.model_parallel_size, body), source.vocab_size)


def own_logits(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    *,
    streams: Sequence[int] | None = None,
    select: Callable[[torch.nn.Module, int], Tensor] | None = None,
) -> list[Tensor]:
    """Logits of each microbatch, [b, s, v/tp], on the last stage; none on others.

    Collective over the replica's model group.
    """

    def forward_step(
        pending: Iterator[tuple[MicroBatch, int]], chunk: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch, stream = next(pending)
        logits = run_chunk(chunk, batch, stream=stream, select=select, with_labels=False)
        return logits, lambda output, non_loss_data: output

    pairs = list(zip(batches, streams if streams is not None else [0] * len(batches)))
    size, length = batches[0].tokens.shape
    with torch.no_grad():
        found: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(pairs) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(pairs),
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return [logits.detach().clone() for logits in found]


def whole_logits(ranks: Sequence[Mapping[str, Any]]) -> Tensor:
    """[sequences, s, v] from the ``logits`` and ``tensor_rank`` of every rank of a replica."""
    pieces = {rank["tensor_rank"]: torch.cat(rank["logits"]) for rank in ranks if rank["logits"]}
    return torch.cat([pieces[rank] for rank in sorted(pieces)], dim=-1)


def whole_rows(kind: str, ranks: Sequence[Mapping[str, Any]], held: str, key: Any) -> Tensor:
    """A mask's tensor from the rows and slices that ranks hold; copies must agree."""
    part = ranks[0]["parts"][kind]
    whole = torch.full((part.num_rows, part.num_units), float("nan"))
    for rank in ranks:
        own = rank["parts"][kind]
        index = (torch.tensor(own.rows)[:, None], torch.tensor(list(own.units))[None, :])
        known, values = whole[index], rank[held][key]
        same = known.isnan() | torch.isclose(known, values, rtol=1e-5, atol=1e-9)
        assert bool(same.all()), f"copies of {key} differ between ranks"
        whole[index] = values
    assert not whole.isnan().any(), kind
    return whole


def _whole(ranks: Sequence[Mapping[str, Any]], vocab_size: int) -> Pass:
    losses = [loss for rank in ranks if rank["tensor_rank"] == 0 for loss in rank["losses"]]
    weight_grads = assemble(
        [rank["weight_grads"] for rank in ranks], [rank["tensor_rank"] for rank in ranks]
    )
    for name in VOCABULARY:
        if name in weight_grads:
            assert not weight_grads[name][vocab_size:].any(), f"the padding of {name} learns"
            weight_grads[name] = weight_grads[name][:vocab_size]
    return Pass(
        logits=whole_logits(ranks)[..., :vocab_size],
        loss=sum(losses) / len(losses),
        weight_grads=weight_grads,
        gate_grads={
            (stream, kind): whole_rows(kind, ranks, "gate_grads", (stream, kind))
            for stream, kind in ranks[0]["gate_grads"]
        },
        mask_grads={
            kind: whole_rows(kind, ranks, "mask_grads", kind) for kind in ranks[0]["mask_grads"]
        },
    )
