"""What a plan says a rank holds, against the tensors that a real run allocates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megashear.config import MaskConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megashear.data.batch import MicroBatch
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.planning.memory import Memory, Work, rank_memory
from megashear.shape import ModelShape
from megashear.train.objectives import LanguageModelling, StructuredPruning
from megashear.train.optim import build_optimizer, ready_gradients, step_with_norm
from tests.live_bytes import LiveBytes, SavedBytes
from tests.ranks import run_ranks
from tests.tiny import layout

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=160,
    num_attention_heads=12,
    num_query_groups=4,
    head_dim=16,
    ffn_hidden_size=448,
    vocab_size=1000,
)
"""Extents in proportions of a real model, so that no part drowns in another."""
TARGET = dataclasses.replace(
    SHAPE, hidden_size=80, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=192
)
SEQUENCE = 128

CLOSE = 0.10
"""Relative; what is not counted: token ids, loss masks, log_alpha's own graph, the rotary table."""
SAVED = 0.02
"""Relative, of what autograd keeps, which is known tensor by tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    parallel: ParallelConfig
    masked: bool = False
    bf16: bool = True
    replicas: int = 1
    microbatches: int = 4
    micro_batch_size: int = 2
    shape: ModelShape = SHAPE
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    def work(self) -> Work:
        return Work(
            shape=self.shape,
            parallel=self.parallel,
            model=ModelConfig(bf16=self.bf16, **self.model),
            seq_length=SEQUENCE,
            micro_batch_size=self.micro_batch_size,
            num_microbatches=self.microbatches,
            data_size=self.replicas,
            masks=frozenset({"hidden", "head", "group", "intermediate"} if self.masked else ()),
            fused_norm=False,
        )


CASES = {
    "plain": Case(parallel=layout()),
    "plain-float32": Case(parallel=layout(), bf16=False),
    "masked": Case(parallel=layout(), masked=True),
    "masked-float32": Case(parallel=layout(), masked=True, bf16=False),
    "tp2": Case(parallel=layout(tp=2)),
    "tp2-sp-masked": Case(parallel=layout(tp=2, sp=True), masked=True),
    "pp2": Case(parallel=layout(pp=2)),
    "pp2-masked": Case(parallel=layout(pp=2), masked=True),
    "pp4-masked": Case(parallel=layout(pp=4), masked=True, microbatches=6),
    "pp2-vpp2": Case(parallel=layout(pp=2, vpp=2)),
    "recompute": Case(parallel=layout(), model={"recompute_granularity": "full"}),
    "recompute-pp2-masked": Case(
        parallel=layout(pp=2),
        masked=True,
        model={"recompute_granularity": "full", "recompute_num_layers": 2},
    ),
    "recompute-block": Case(
        parallel=layout(),
        model={
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 2,
        },
    ),
    "dp2-sharded": Case(parallel=layout(use_distributed_optimizer=True), replicas=2),
    "dp2-sharded-float32": Case(
        parallel=layout(use_distributed_optimizer=True), replicas=2, bf16=False
    ),
    "tp2-pp2-sp": Case(parallel=layout(tp=2, pp=2, sp=True)),
    "biases-norms-tied": Case(
        parallel=layout(tp=2, pp=2),
        shape=dataclasses.replace(
            SHAPE, qkv_bias=True, qk_norm=True, tied_embeddings=True, vocab_size=999
        ),
    ),
}


def batch(case: Case, position: int) -> MicroBatch:
    text = torch.randint(999, (case.micro_batch_size, SEQUENCE + 1))
    return MicroBatch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        loss_mask=torch.ones(case.micro_batch_size, SEQUENCE),
        domains=torch.zeros(case.micro_batch_size, dtype=torch.int64),
        positions=torch.full((case.micro_batch_size,), position),
    )


def measured(case: Case) -> list[dict[str, int]]:
    """Bytes by part that each rank holds, counted on its tensors."""

    def body(rank: int) -> dict[str, int]:
        groups = ParallelGroups.create(case.parallel)
        model = case.work().model
        chunks = build_llama(
            case.shape,
            groups,
            case.parallel,
            model,
            variant="masked" if case.masked else "local",
        )
        sharded = case.parallel.use_distributed_optimizer
        optimizer = build_optimizer(chunks, OptimizerConfig(), bf16=case.bf16, sharded=sharded)
        if case.masked:
            objective: LanguageModelling = StructuredPruning(
                chunks,
                groups,
                source=case.shape,
                target=TARGET,
                config=MaskConfig(),
                seed=1,
                global_batch_size=case.microbatches * case.micro_batch_size,
                sequence_parallel=case.parallel.sequence_parallel,
            )
        else:
            objective = LanguageModelling(chunks)
        gates: list[int] = []
        if isinstance(objective, StructuredPruning):
            backward = objective.binding.backward

            def counting() -> None:
                leaves = objective.binding._leaves[0].values()  # type: ignore[attr-defined]
                gates.append(sum(bytes_of(leaf) + bytes_of(leaf.grad) for leaf in leaves))
                backward()

            objective.binding.backward = counting  # type: ignore[method-assign]
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        buffers = [b for chunk in chunks for b in chunk.buffers]
        gradients = [b.grad_data for b in buffers]
        known = [*parameters, *gradients]
        batches = [batch(case, number) for number in range(case.microbatches)]
        # the first step makes what lasts: masters' moments, cached tables, buffers that are reused
        for step in range(2):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            live, saved = LiveBytes(known), SavedBytes(known)
            with live if step == 0 else saved.hooks():
                objective.forward_backward(batches, 0)
            if step == 0:
                peak = live.peak
            step_with_norm(optimizer, ready_gradients(optimizer))
        return {
            "parameters": sum(p.numel() for p in parameters),
            "stage": groups.pipeline_rank,
            "weights": sum(bytes_of(b.param_data) for b in buffers)
            if sharded
            else sum(map(bytes_of, parameters)),
            "gradients": sum(map(bytes_of, gradients)),
            **optimizer_bytes(optimizer),
            "masks": gates[-1] if gates else 0,
            "activations": saved.peak,
            "moment": peak,
        }

    return run_ranks(case.parallel.model_parallel_size * case.replicas, body)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(optimizer: Any) -> dict[str, int]:
    masters = moments = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            moments += sum(bytes_of(state[name]) for name in ("exp_avg", "exp_avg_sq"))
        for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups"):
            for group in getattr(part, name, ()):
                masters += sum(bytes_of(tensor) for tensor in group if tensor is not None)
    return {"masters": masters, "moments": moments}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request: pytest.FixtureRequest) -> tuple[Case, list[dict[str, int]]]:
    case = CASES[request.param]
    return case, measured(case)


def planned(case: Case, rank: dict[str, int]) -> Memory:
    return rank_memory(case.work(), rank["stage"])


def test_all(pair) -> None:
    case, ranks = pair
    for rank in ranks:
        plan = planned(case, rank)
        print(rank["stage"], {n: (getattr(plan, n), rank[n], round(getattr(plan, n)/max(rank[n],1)-1, 4)) for n in ("weights", "gradients","masters","moments","masks","activations")}, "moment", (plan.activations+plan.buffers, rank["moment"], round((plan.activations+plan.buffers)/rank["moment"]-1,3)))
