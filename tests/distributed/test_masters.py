"""Float32 masters of bfloat16 weights come from what was stored, before it was rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.description import Description
from megashear.checkpoint.store import load_weights
from megashear.checkpoint.weights import MASTERS, CheckpointWeights, write_weights
from megashear.config import ModelConfig, OptimizerConfig
from megashear.conversion import hf
from megashear.conversion.sharded_hf import load_hf
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.planning.memory import checkpoint_bytes
from megashear.train.optim import build_optimizer
from tests.conversions import megatron_to_hf
from tests.distributed.test_resume import finished_tensors
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.saving import save_run
from tests.tiny import SOURCE, layout

BF16 = ModelConfig(bf16=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 weights in a folder, as Hugging Face and as Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("stored")
    weights = random_weights(SOURCE)
    hf.write_directory(folder / "hf", weights.items(), SOURCE)
    description = Description(shape=SOURCE, iteration=0, stage="converted")
    run_ranks(1, lambda rank: write_weights(folder / "checkpoint", weights, description))
    return folder


def saved_again(
    stored: Path, output: Path, source: str, *, sharded: bool, only_weights: bool = False
) -> dict[str, Tensor]:
    """Tensors of a checkpoint that a bfloat16 run would save before its first step."""
    parallel = layout(tp=2, use_distributed_optimizer=sharded)

    def body(rank: int) -> None:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, BF16, variant="local", seed=9)
        optimizer = build_optimizer(chunks, OptimizerConfig(), bf16=True, sharded=sharded)
        if source == "hf":
            load_hf(stored / "hf", chunks, groups, optimizer)
        elif only_weights:
            load_weights(stored / source, chunks)
            optimizer.reload_model_params()
        else:
            load_weights(stored / source, chunks, optimizer)
        description = Description(shape=SOURCE, iteration=0, stage="pretrain")
        save_run(output, description, chunks, optimizer, groups)

    run_ranks(4 if sharded else 2, body)
    return finished_tensors(output, 0)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
@pytest.mark.parametrize("source", ["hf", "checkpoint"])
def test_masters_are_what_was_stored(
    stored: Path, tmp_path: Path, source: str, sharded: bool
) -> None:
    wanted = finished_tensors(stored / "checkpoint", 0)
    found = saved_again(stored, tmp_path, source, sharded=sharded)
    # as `megashear plan` counts them; scalars and rows of padding are the rest
    planned = checkpoint_bytes(SOURCE, frozenset())
    assert sum(tensor.nbytes for tensor in found.values()) == pytest.approx(planned, rel=0.01)
    for name, weight in wanted.items():
        assert torch.equal(found[MASTERS + name], weight), name
        assert torch.equal(found[name], weight.bfloat16()), name


def test_masters_that_come_from_the_weights_are_noticed(stored: Path, tmp_path: Path) -> None:
    wanted = finished_tensors(stored / "checkpoint", 0)
    found = saved_again(stored, tmp_path, "checkpoint", sharded=False, only_weights=True)
    name = "output_layer.weight"
    assert not torch.equal(found[MASTERS + name], wanted[name])
    assert torch.equal(found[MASTERS + name].bfloat16(), wanted[name].bfloat16())


def test_a_bfloat16_run_is_read_by_its_masters(stored: Path, tmp_path: Path) -> None:
    saved_again(stored, tmp_path / "run", "checkpoint", sharded=True)
    exact = random_weights(SOURCE)
    found = CheckpointWeights(tmp_path / "run")
    assert set(found.dtypes.values()) == {torch.float32}
    for name, weight in exact.items():
        assert torch.equal(found[name], weight), name
    # by a run that takes its weights, and by conversion in the format that is asked for
    again = saved_again(tmp_path, tmp_path / "again", "run", sharded=False)
    assert torch.equal(again[MASTERS + "output_layer.weight"], exact["lm_head.weight"])
    pytest.importorskip("transformers")
    run_ranks(1, lambda rank: megatron_to_hf(tmp_path / "run", tmp_path / "hf", verify=()))
    converted = hf.HfWeights(tmp_path / "hf")
    for name, weight in exact.items():
        assert torch.equal(converted[name], weight.bfloat16()), name
    # and both sides of a comparison read the masters that several ranks wrote
    run_ranks(
        1,
        lambda rank: megatron_to_hf(
            tmp_path / "run", tmp_path / "exact", dtype="float32", verify=()
        ),
    )
