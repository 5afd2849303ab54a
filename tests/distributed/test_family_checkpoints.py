"""Law 4 for what families add: tied matrices and padded vocabularies leave no layout behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megashear.checkpoint.description import Description
from megashear.checkpoint.store import load_run, load_weights
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.config import ModelConfig, OptimizerConfig, ParallelConfig
from megashear.models import weight_table
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.optim import build_optimizer
from tests.families import FAMILIES
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.saving import save_run
from tests.tiny import layout

SHAPES = {
    # 17 rows a rank at TP 4, the last of which has 14 tokens
    "tied": replace(FAMILIES["qwen3-tied"], qkv_bias=True, vocab_size=65),
    # 2 rows a rank at TP 4, the last of which has nothing but padding
    "untied": replace(FAMILIES["qwen2"], vocab_size=6),
}


def build(
    shape: ModelShape, parallel: ParallelConfig, bf16: bool
) -> tuple[ParallelGroups, list, object]:
    groups = ParallelGroups.create(parallel)
    chunks = build_llama(shape, groups, parallel, ModelConfig(bf16=bf16), variant="local")
    optimizer = build_optimizer(chunks, OptimizerConfig(lr=0.1), bf16=bf16)
    return groups, list(chunks), optimizer


def describe(shape: ModelShape, iteration: int) -> Description:
    return Description(shape=shape, iteration=iteration, stage="pretrain")


def everything(directory: Path) -> dict[str, Tensor]:
    """All tensors of one iteration, weights and optimizer states."""
    metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(tensors, checkpoint_id=directory, no_dist=True)
    return tensors


@pytest.mark.parametrize(
    ("name", "bf16", "other"),
    [("tied", False, layout(tp=2, pp=2)), ("untied", True, layout())],
    ids=["tied-float32-tp2-pp2", "untied-bfloat16-whole"],
)
def test_a_run_saved_at_any_layout_is_the_same_checkpoint(
    tmp_path: Path, name: str, bf16: bool, other: ParallelConfig
) -> None:
    shape = SHAPES[name]
    weights = {n: w.bfloat16() if bf16 else w for n, w in random_weights(shape).items()}
    run_ranks(1, lambda rank: write_weights(tmp_path / "source", weights, describe(shape, 0)))
    parallel = layout(tp=4)

    def step(rank: int) -> None:
        groups, chunks, optimizer = build(shape, parallel, bf16)
        load_weights(tmp_path / "source", chunks)
        optimizer.reload_model_params()
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(parameter.detach())
        optimizer.step()
        save_run(tmp_path / "tp4", describe(shape, 1), chunks, optimizer, groups)

    run_ranks(4, step)
    first = everything(tmp_path / "tp4" / "iter_0000001")
    for key, extents in weight_table.checkpoint_shapes(shape).items():
        for of in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
            assert tuple(first[of + key].shape) == extents, of + key
            assert first[of + key].any(), of + key

    def resave(rank: int) -> None:
        groups, chunks, optimizer = build(shape, other, bf16)
        load_run(tmp_path / "tp4", chunks, optimizer, groups)
        save_run(tmp_path / "other", describe(shape, 1), chunks, optimizer, groups)

    run_ranks(other.model_parallel_size, resave)
    second = everything(tmp_path / "other" / "iter_0000001")
    assert second.keys() == first.keys()
    for key, tensor in first.items():
        assert torch.equal(second[key], tensor), key
    read = CheckpointWeights(tmp_path / "tp4")
    assert list(read) == list(weights)


def test_another_vocabulary_is_not_filled_up_with_zeros(tmp_path: Path) -> None:
    shape = SHAPES["untied"]
    run_ranks(
        1, lambda rank: write_weights(tmp_path / "a", random_weights(shape), describe(shape, 0))
    )

    def load(rank: int) -> None:
        _, chunks, _ = build(replace(shape, vocab_size=8), layout(), False)
        load_weights(tmp_path / "a", chunks)

    with pytest.raises(AssertionError, match=r"does not fit this run: [\s\S]*\[6, 40\].*\(8, 40\)"):
        run_ranks(1, load)
