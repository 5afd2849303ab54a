"""A fused function has one graph, whatever a run does with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megashear.config import ModelConfig
from megashear.models import fold, llama
from megashear.models.core import RMSNorm
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from tests.compiled import graphs_counted
from tests.ranks import run_ranks
from tests.tiny import layout

BEFORE = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=32,
    ffn_hidden_size=96,
    vocab_size=64,
    max_position_embeddings=64,
)
AFTER = replace(
    BEFORE, hidden_size=48, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=80
)
SHAPES = {
    "grouped": BEFORE,
    "grouped, cut": AFTER,
    "one group": replace(BEFORE, num_query_groups=1),
    "multi-head": replace(BEFORE, num_query_groups=8),
    "multi-head, cut": replace(AFTER, num_query_groups=6),
}
BATCHES = ((16, 1), (16, 4), (7, 3))
"""Tokens of a sequence and sequences of a microbatch."""
ALWAYS = {
    "_norm",
    "_norm_gradients",
    "_turn_rows",
    "_activate",
    "_activation_gradient",
    "_fold_matrix",
    "_unfold_matrix",
}
LOSSES = {False: {"_exponentials_over"}, True: {"_exponentials", "_gradient_over"}}


def use(shape: ModelShape, groups: ParallelGroups, model: ModelConfig) -> None:
    """Train on a microbatch of each kind and evaluate on it, with all dimensions open and some."""
    [chunk] = llama.build_llama(shape, groups, layout(), model, variant="local")
    norms = [module for module in chunk.modules() if isinstance(module, RMSNorm)]
    for length, sequences in BATCHES:
        tokens = torch.randint(shape.vocab_size, (sequences, length))
        places = torch.arange(length).expand(sequences, -1)
        for num_open in (None, torch.tensor(7.0), torch.tensor(9.0)):
            for norm in norms:
                norm.num_open = num_open
            with torch.set_grad_enabled(num_open is not None):
                loss = chunk(tokens, places, None, labels=tokens)
            if num_open is not None:
                loss.sum().backward()
    for weight in chunk.parameters():
        if weight.dim() == 2:
            factors = [torch.rand(size) for size in weight.shape]
            fold.fold(weight, factors)
            sums = [torch.zeros(size) for size in weight.shape]
            fold.unfold(weight.main_grad, weight, factors, sums)


@pytest.mark.sampled(1)
@pytest.mark.timeout(240)  # alone it takes 10 s, for torch traces slowly
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_everything_that_a_run_does_has_one_graph_a_function(bf16: bool) -> None:
    """Before the cut and after it, forward, backward, evaluation, recompute, any microbatch."""

    def body(rank: int) -> Counter[str]:
        groups = ParallelGroups.create(layout())
        with graphs_counted() as graphs:
            for shape in SHAPES.values():
                use(shape, groups, ModelConfig(bf16=bf16))
            use(BEFORE, groups, ModelConfig(bf16=bf16, recompute_granularity="full"))
            return graphs

    [graphs] = run_ranks(1, body, timeout_s=240.0)
    assert graphs == dict.fromkeys(ALWAYS | LOSSES[bf16], 1)
