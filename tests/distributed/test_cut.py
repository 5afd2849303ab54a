"""Law 2 on Megatron: a run saved at one layout, cut, computes the masked model at another."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.cut import cut
from megashear.checkpoint.description import Description
from megashear.checkpoint.shear import cut_checkpoint
from megashear.checkpoint.store import load_weights
from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import MaskConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megashear.masks.mask_set import exact_gates
from megashear.masks.targets import target_units, whole_parts
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.optim import build_optimizer
from megashear.train.pruning import EXACT, StructuredPruning
from tests import reference_llama
from tests.conversions import megatron_to_hf
from tests.distributed.masked_model import by_megatron_name, own_logits, whole_logits
from tests.families import FAMILIES
from tests.families import pruned as pruned_shape
from tests.live import fill
from tests.ranks import run_ranks
from tests.saving import save_run
from tests.tiny import BATCH, PAIRS, layout, microbatches, relative_error, set_weights

OTHER_ORDER = 1e-5
"""Relative (law 2); folding rounds every weight once, in float32."""
BROKEN = 0.01
"""Relative; a weight folded wrongly is off by more."""

# 65 tokens are padded to 66 where the run is split in two
TIED, BIASED = (replace(FAMILIES[name], vocab_size=65) for name in ("qwen3-tied", "qwen2"))
SHAPES = {
    **PAIRS,
    "tied": (TIED, pruned_shape(TIED)),
    "biased": (BIASED, pruned_shape(BIASED)),
}
PRUNED_AT = layout(tp=2, pp=2)
ONE_GROUP_AT = layout(pp=2)  # one key/value head cannot be divided
ITERATION = 40


class Pruned(NamedTuple):
    """A run in the middle of pruning, saved, and what was cut from it."""

    source: ModelShape
    target: ModelShape
    saved: Path
    cut: Path
    logits: Tensor
    """Of the masked model under exactly the target's gates."""


@pytest.fixture(scope="module", params=SHAPES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    source, target = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    saved, output = folder / "pruned", folder / "cut"
    at = PRUNED_AT if source.num_query_groups > 1 else ONE_GROUP_AT
    ranks = run_ranks(
        at.model_parallel_size, lambda rank: prune_half_way(saved, source, target, at)
    )
    run_ranks(1, lambda rank: cut_checkpoint(saved, output, exact_target=True))
    return Pruned(source, target, saved, output, whole_logits(ranks)[..., : source.vocab_size])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "parallel", [layout(), layout(tp=2), layout(pp=3)], ids=["whole", "tp2", "pp3"]
)
def test_cut_equals_masked_model_at_another_layout(
    pruned: Pruned, parallel: ParallelConfig
) -> None:
    if pruned.target.num_query_groups % parallel.tensor_model_parallel_size:
        pytest.skip("one key/value head cannot be divided")
    logits = logits_at(parallel, pruned.cut, pruned.target)
    assert relative_error(logits, pruned.logits) < OTHER_ORDER


def test_export_of_the_cut_in_transformers_equals_masked_model(
    pruned: Pruned, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    assert pruned.target.head_dim * pruned.target.num_attention_heads != pruned.target.hidden_size
    megatron_to_hf(pruned.cut, tmp_path / "hf", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens()).logits
    assert relative_error(logits, pruned.logits) < OTHER_ORDER


def test_a_folded_output_layer_is_noticed(pruned: Pruned) -> None:
    weights = dict(CheckpointWeights(pruned.cut))
    assert relative_error(plain_logits(weights, pruned.target), pruned.logits) < OTHER_ORDER
    hidden = exact(pruned.source, pruned.target)["hidden"][0]
    # what the law leaves alone: with a tied matrix, which has the gates already, the norm
    name = "model.norm.weight" if pruned.target.tied_embeddings else "lm_head.weight"
    weights[name] = weights[name] * hidden[hidden != 0]
    assert relative_error(plain_logits(weights, pruned.target), pruned.logits) > BROKEN


@pytest.mark.parametrize("kind", ["hidden", "head", "group", "intermediate", "layer"])
def test_one_gate_moved_is_noticed(pruned: Pruned, kind: str) -> None:
    gates = exact(pruned.source, pruned.target)
    if kind not in gates:
        pytest.skip(f"{kind} is not pruned here")
    row = gates[kind][0]
    if kind == "head" and "group" in gates:
        # of an open group of a layer that stays
        layer = int(gates["layer"][0].nonzero()[0])
        group = int(gates["group"][layer].nonzero()[0])
        row = gates[kind][layer * pruned.source.num_query_groups + group]
    opened, closed = int(row.nonzero()[0]), int((row == 0).nonzero()[0])
    row[[opened, closed]] = row[[closed, opened]]
    weights = dict(cut(CheckpointWeights(pruned.saved), gates, pruned.source, pruned.target))
    # one neuron of 56 moves the logits less than a head does, and far more than rounding
    assert relative_error(plain_logits(weights, pruned.target), pruned.logits) > 100 * OTHER_ORDER


def test_masks_that_keep_another_count_are_refused(
    pruned: Pruned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"target wants .* cut with --exact-target"):
        cut_checkpoint(pruned.saved, tmp_path / "cut")
    assert not list(tmp_path.iterdir())
    # a runtime that may not load the target is named before anything is written
    is_narrow = pruned.target.family == "qwen2"  # heads times head_dim is not its hidden size
    assert ("target head_dim 8 is not hidden_size" in caplog.text) is is_narrow


def half_open(source: ModelShape, target: ModelShape) -> dict[str, Tensor]:
    """Whole log_alpha in the middle of pruning, away from the clamps."""
    generator = torch.Generator().manual_seed(3)
    return {
        kind: torch.randn(part.num_rows, part.num_units, generator=generator) + 1
        for kind, part in whole_parts(source, target).items()
    }


def exact(source: ModelShape, target: ModelShape) -> dict[str, Tensor]:
    return exact_gates(half_open(source, target), target_units(source, target))


def prune_half_way(
    saved: Path, source: ModelShape, target: ModelShape, parallel: ParallelConfig
) -> dict[str, Any]:
    """Save a run on this rank's part, and give the logits of its exact evaluation mode."""
    groups = ParallelGroups.create(parallel)
    chunks = build_llama(source, groups, parallel, ModelConfig(), variant="local")
    whole = by_megatron_name(reference_llama.random_weights(source), source)
    set_weights(chunks, whole, groups.tensor_rank, groups.tensor_size)
    objective = StructuredPruning(
        chunks,
        groups,
        source=source,
        target=target,
        config=MaskConfig(),
        seed=7,
        global_batch_size=BATCH,
        sequence_parallel=False,
    )
    fill(objective.masks.state_dict(), objective.binding.slice_gates(half_open(source, target)))
    details = {"target_shape": target.to_dict(), **objective.details()}
    save_run(
        saved,
        Description(shape=source, iteration=ITERATION, stage=objective.stage, details=details),
        chunks,
        build_optimizer(chunks, OptimizerConfig(), bf16=False),
        groups,
        masks=objective.state(),
    )
    with objective.evaluating(EXACT):
        logits = own_logits(chunks, microbatches(0), select=objective.binding.select)
    return {"tensor_rank": groups.tensor_rank, "logits": logits}


def logits_at(parallel: ParallelConfig, checkpoint: Path, shape: ModelShape) -> Tensor:
    """Logits of a checkpoint's plain model at a layout."""

    def body(rank: int) -> dict[str, Any]:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(shape, groups, parallel, ModelConfig(), variant="local")
        load_weights(checkpoint, chunks)
        return {"tensor_rank": groups.tensor_rank, "logits": own_logits(chunks, microbatches(0))}

    return whole_logits(run_ranks(parallel.model_parallel_size, body))[..., : shape.vocab_size]


def plain_logits(weights: dict[str, Tensor], shape: ModelShape) -> Tensor:
    return reference_llama.forward(weights, shape, tokens())


@functools.cache
def tokens() -> Tensor:
    return torch.cat([batch.tokens for batch in microbatches(0)])
