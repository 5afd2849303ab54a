"""A LLaMA small enough for every layout, and its weights, whole or split over ranks by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megashear.config import ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.models.llama import unwrap
from megashear.models.weight_table import fuse, tensors
from megashear.shape import ModelShape
from tests.reference_llama import random_weights

# unequal sizes, so that swapped axes cannot hide; all divide by 4
SOURCE = ModelShape(
    num_layers=4,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=64,
    max_position_embeddings=32,
)
TARGET = ModelShape(
    num_layers=3,
    hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=56,
    vocab_size=64,
    max_position_embeddings=32,
)
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Matrices whose rows are tokens."""
PAIRS = {
    # the commands' usual case, both kinds of attention masks: 8 groups of 4 to 4 of 3
    "8-groups-of-4": (
        replace(SOURCE, num_attention_heads=32, num_query_groups=8, head_dim=4),
        replace(TARGET, num_attention_heads=12, num_query_groups=4, head_dim=4),
    ),
    "groups-alone": (SOURCE, TARGET),
    "multi-head": (
        replace(SOURCE, num_query_groups=SOURCE.num_attention_heads),
        replace(TARGET, num_query_groups=TARGET.num_attention_heads),
    ),
    "one-group": (
        replace(SOURCE, num_query_groups=1),
        replace(TARGET, num_query_groups=1),
    ),
}
"""Source and target of every way in which attention is pruned."""
SEQUENCE = 16
BATCH = 8


def layout(tp: int = 1, pp: int = 1, vpp: int = 1, sp: bool = False, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=vpp,
        sequence_parallel=sp,
        **more,
    )


def megatron_weights(shape: ModelShape = SOURCE, seed: int = 0) -> dict[str, Tensor]:
    """Whole weights by Megatron name, global layer numbers."""
    hf = random_weights(shape, seed)
    return {
        row.name.format(layer=layer): fuse(
            row, [hf[part.hf_name.format(layer=layer)] for part in row.parts], shape
        )
        for row, layer in tensors(shape)
    }


def shard(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """What tensor rank ``rank`` of ``size`` holds of a weight."""
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if name in VOCABULARY:  # padded until tensor ranks divide it
        whole = torch.cat([whole, whole.new_zeros(-len(whole) % size, whole.size(1))])
    if name in VOCABULARY or name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        return whole.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    return whole


def unshard(name: str, pieces: Sequence[Tensor]) -> Tensor:
    """The whole weight from what the tensor ranks hold."""
    if name.endswith("linear_fc1.weight"):
        halves = [piece.chunk(2) for piece in pieces]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if name in VOCABULARY or name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        return torch.cat(list(pieces))
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(list(pieces), dim=1)
    for piece in pieces[1:]:
        assert torch.equal(piece, pieces[0]), f"copies of {name} differ between tensor ranks"
    return pieces[0]


def named_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by Megatron name, global layer numbers."""
    named = {}
    for chunk in chunks:
        gpt = unwrap(chunk)
        for name, parameter in gpt.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                number = gpt.decoder.layers[int(local)].layer_number - 1
                name = f"decoder.layers.{number}.{rest}"
            if name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"  # the last stage's copy
            named[name] = parameter
    return named


def set_weights(
    chunks: Sequence[torch.nn.Module], whole: Mapping[str, Tensor], rank: int, size: int
) -> None:
    """Overwrite this rank's parameters with its shards of whole weights."""
    with torch.no_grad():
        for name, parameter in named_parameters(chunks).items():
            parameter.copy_(shard(name, whole[name], rank, size))


def assemble(ranks: Sequence[Mapping[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """Whole tensors from what all ranks of one replica hold.

    Args:
        ranks: tensors by name, of each rank.
        order: tensor rank of each.
    """
    names = sorted({name for held in ranks for name in held})
    whole = {}
    for name in names:
        pieces: dict[int, Tensor] = {}
        for rank, held in zip(order, ranks):
            if name in held:
                known = pieces.setdefault(rank, held[name])
                assert torch.equal(known, held[name]), f"copies of {name} differ between stages"
        whole[name] = unshard(name, [pieces[rank] for rank in sorted(pieces)])
    return whole


def microbatches(
    step: int, *, data_rank: int = 0, data_size: int = 1, size: int = 1, vocab: int = 64
) -> list[MicroBatch]:
    """A replica's share of a global batch of random text that depends on the step alone."""
    text = torch.randint(
        vocab, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(100 + step)
    )
    share = BATCH // data_size
    return [
        MicroBatch(
            tokens=text[at : at + size, :-1],
            labels=text[at : at + size, 1:],
            loss_mask=torch.ones(size, SEQUENCE),
            domains=torch.zeros(size, dtype=torch.int64),
            positions=torch.arange(at, at + size),
        )
        for at in range(data_rank * share, (data_rank + 1) * share, size)
    ]


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; what must be exactly zero is exactly zero."""
    if not b.any():
        return float("inf") if a.any() else 0.0
    return float((a.double() - b.double()).norm() / b.double().norm())
