"""What a plan says a rank holds and sends, against the tensors of a real run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch

from megashear.config import MaskConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megashear.data.batch import MicroBatch
from megashear.masks.targets import whole_parts
from megashear.models import cross_entropy
from megashear.models.llama import build_chunks, build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.planning.activations import taught_bytes
from megashear.planning.hardware import GPUS
from megashear.planning.memory import evaluation_memory, rank_memory, stage_parameters
from megashear.planning.time import Cluster, step_time
from megashear.planning.work import Work
from megashear.shape import ModelShape
from megashear.train.distillation import Distillation, Teacher
from megashear.train.guard import StepGuard
from megashear.train.objectives import LanguageModelling
from megashear.train.optim import build_optimizer, build_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.step import TrainStep
from megashear.train.terms import CrossEntropy
from tests.live_bytes import LiveBytes, SavedBytes, SentBytes
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
TEACHER = dataclasses.replace(SHAPE, num_layers=8, hidden_size=240, ffn_hidden_size=640)
SEQUENCE = 128

CLOSE = 0.10
"""Relative; what is not counted: token ids, loss masks, log_alpha's own graph, the rotary table."""
KEPT = 0.01
"""Relative, of what autograd keeps, which is known tensor by tensor."""
PADDING = 1e-3
"""Relative; which replica has the padding at a buffer's end is not told apart."""
EVALUATED = 8
"""Sequences that an evaluation takes through a forward pass; more than a training step does."""
PARTS = ("weights", "gradients", "masters", "moments", "folded", "masks", "activations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    parallel: ParallelConfig
    masked: bool = False
    target: ModelShape = TARGET
    bf16: bool = True
    replicas: int = 1
    streams: int = 1
    microbatches: int = 4
    micro_batch_size: int = 2
    shape: ModelShape = SHAPE
    teacher: ModelShape | None = None
    entropy: float = 1.0
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
            masks=frozenset(whole_parts(self.shape, self.target)) if self.masked else frozenset(),
            noise_streams=self.streams,
            teacher=self.teacher,
            has_entropy=self.entropy > 0,
        )

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step, over all replicas."""
        return self.microbatches * self.micro_batch_size * self.replicas


CASES = {
    "plain": Case(parallel=layout()),
    "plain-float32": Case(parallel=layout(), bf16=False),
    "masked": Case(parallel=layout(), masked=True),
    "masked-float32": Case(parallel=layout(), masked=True, bf16=False),
    "tp2": Case(parallel=layout(tp=2)),
    "tp2-sp-masked": Case(parallel=layout(tp=2, sp=True), masked=True),
    "tp2-sp": Case(parallel=layout(tp=2, sp=True)),
    "tp2-sp-recompute": Case(
        parallel=layout(tp=2, sp=True), model={"recompute_granularity": "full"}
    ),
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
    "recompute-block-all": Case(
        parallel=layout(),
        model={
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 4,
        },
    ),
    "dp2": Case(parallel=layout(), replicas=2),
    "dp2-sharded": Case(parallel=layout(use_distributed_optimizer=True), replicas=2),
    "dp2-overlap": Case(
        parallel=layout(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        ),
        replicas=2,
        masked=True,
    ),
    "streams": Case(parallel=layout(), masked=True, streams=2),
    "streams-float32": Case(parallel=layout(), masked=True, bf16=False, streams=4),
    # the first replica has a stream whole and half of the second
    "dp2-streams": Case(
        parallel=layout(use_distributed_optimizer=True),
        replicas=2,
        masked=True,
        microbatches=3,
        streams=3,
    ),
    "pp2-vpp2-streams": Case(parallel=layout(pp=2, vpp=2), masked=True, streams=2),
    "neurons": Case(
        parallel=layout(tp=2), masked=True, target=dataclasses.replace(SHAPE, ffn_hidden_size=192)
    ),
    "layers": Case(
        parallel=layout(pp=2), masked=True, target=dataclasses.replace(SHAPE, num_layers=2)
    ),
    "tp2-pp2-sp": Case(parallel=layout(tp=2, pp=2, sp=True)),
    "biases-norms-tied": Case(
        parallel=layout(tp=2, pp=2),
        shape=dataclasses.replace(
            SHAPE, qkv_bias=True, qk_norm=True, tied_embeddings=True, vocab_size=999
        ),
    ),
    "distilled": Case(parallel=layout(), teacher=TEACHER, entropy=0.0),
    "distilled-float32": Case(parallel=layout(), teacher=TEACHER, bf16=False, micro_batch_size=1),
    "distilled-entropy": Case(parallel=layout(tp=2, sp=True), teacher=TEACHER),
    "distilled-masked": Case(
        parallel=layout(tp=2, pp=2, sp=True), teacher=SHAPE, masked=True, entropy=0.0
    ),
    "distilled-many": Case(parallel=layout(pp=2), teacher=TEACHER, entropy=0.0, microbatches=10),
    "tied-masked": Case(
        parallel=layout(tp=2, pp=2),
        masked=True,
        streams=2,
        shape=dataclasses.replace(SHAPE, tied_embeddings=True),
        target=dataclasses.replace(TARGET, tied_embeddings=True),
    ),
}


def batch(case: Case, number: int, replica: int) -> MicroBatch:
    text = torch.randint(999, (case.micro_batch_size, SEQUENCE + 1))
    first = (replica * case.microbatches + number) * case.micro_batch_size
    return MicroBatch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        loss_mask=torch.ones(case.micro_batch_size, SEQUENCE),
        domains=torch.zeros(case.micro_batch_size, dtype=torch.int64),
        positions=first + torch.arange(case.micro_batch_size),
    )


@functools.cache
def measured(name: str) -> list[dict[str, Any]]:
    """Bytes by part that each rank holds, counted on its tensors; bytes sent, by collective."""
    case = CASES[name]

    def body(rank: int) -> dict[str, Any]:
        return measured_here(case, counts_sent=name in SENT)

    return run_ranks(case.parallel.model_parallel_size * case.replicas, body)


def measured_here(case: Case, *, counts_sent: bool) -> dict[str, Any]:
    # in proportion: at these sizes what goes through float32 at once would be all logits
    cross_entropy._AT_ONCE = {"cpu": 2**12}
    groups = ParallelGroups.create(case.parallel)
    chunks = build_llama(case.shape, groups, case.parallel, case.work().model, variant="local")
    sharded = case.parallel.use_distributed_optimizer
    optimizer = build_optimizer(chunks, OptimizerConfig(), bf16=case.bf16, sharded=sharded)
    terms, teachers = None, []
    if case.teacher is not None:
        alone = dataclasses.replace(case.work().model, recompute_granularity=None)
        teachers = build_chunks(case.teacher, groups, case.parallel, alone, variant="local")
        own = [CrossEntropy(weight=case.entropy)] if case.entropy else []
        terms = [*own, Distillation(Teacher(teachers, case.teacher), groups.tensor)]
    objective, gates = LanguageModelling(chunks, terms=terms), []
    if case.masked:
        objective = StructuredPruning(
            chunks,
            groups,
            source=case.shape,
            target=case.target,
            config=MaskConfig(mask_noise_streams=case.streams),
            seed=1,
            global_batch_size=case.global_batch_size,
            sequence_parallel=case.parallel.sequence_parallel,
            terms=terms,
        )
        binding, backward = objective.binding, objective.binding.backward

        def counting() -> None:
            found = [
                (*stream._leaves.values(), *stream.gate_gradients().values())
                for stream in binding._model._streams.values()
            ]
            gates.append(sum(bytes_of(tensor) for each in found for tensor in each))
            backward()

        binding.backward = counting  # type: ignore[method-assign]
    train_step = TrainStep(
        chunks=chunks,
        objective=objective,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, OptimizerConfig(), 40),
        peak_lr=OptimizerConfig().lr,
        groups=groups,
        guard=StepGuard(TrainConfig()),
    )
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    buffers = [b for chunk in chunks for b in chunk.buffers]
    gradients = [b.grad_data for b in buffers]
    taught = [p for chunk in teachers for p in chunk.parameters()]
    known = [*parameters, *gradients, *optimizer_state(optimizer), *taught]
    batches = [batch(case, number, groups.data_rank) for number in range(case.microbatches)]
    live, saved = LiveBytes(known), SavedBytes(known)
    sent = SentBytes(ring=max(case.parallel.tensor_model_parallel_size, case.replicas))
    # the first step makes what lasts: cached tables, buffers that are used again, folded weights
    counting_saved = saved.hooks()
    for way in (live, counting_saved, *([sent] if counts_sent else [])):
        for chunk in chunks:
            for module in chunk.modules():
                # a weight that went through hooks has lost what DDP knows it by
                if hasattr(module, "gradient_accumulation_fusion"):
                    module.gradient_accumulation_fusion = way is not counting_saved
        with way:
            losses = train_step.gradients(batches, 0)
        folded = folded_tensors(objective)
        saved.know(folded)
        with contextlib.ExitStack() as stack:
            if way is sent:
                stack.enter_context(sent)
            elif way is not live:  # Adam's state is there
                stepping = LiveBytes([*known, *optimizer_state(optimizer)])
                stack.enter_context(stepping)
            train_step.apply(losses, 0)
    wide = dataclasses.replace(case, micro_batch_size=EVALUATED)
    held_out = [batch(wide, number, 0) for number in range(case.microbatches)]
    mode = objective.modes()[0]
    peaks = []
    with objective.evaluating(mode) as measure:
        for _ in range(3):  # gloo's threads now and then let go of a tensor late
            with LiveBytes([*known, *folded]) as evaluation:
                measure(held_out)
            peaks.append(evaluation.peak)
    return {
        "evaluation": min(peaks),
        "parameters": sum(p.numel() for p in parameters),
        "stage": groups.pipeline_rank,
        "weights": sum(bytes_of(b.param_data) for b in buffers)
        if sharded
        else sum(map(bytes_of, parameters)),
        "gradients": sum(map(bytes_of, gradients)),
        **optimizer_bytes(optimizer),
        "folded": sum(map(bytes_of, folded)),
        "masks": gates[-1] if gates else 0,
        "taught": sum(map(bytes_of, taught)),
        "activations": saved.peak,
        "peak": live.peak,
        "step": stepping.peak,
        "sent": dict(sent.sent),
    }


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def folded_tensors(objective: LanguageModelling) -> list[torch.Tensor]:
    """What a model keeps for its folded weights, after a step."""
    if not isinstance(objective, StructuredPruning):
        return []
    weights = objective.binding._model._weights
    apart = [weight._apart for weight in weights if weight._apart is not None]
    return [*apart, *(folded for weight in weights for folded in weight._spare)]


def optimizer_state(optimizer: Any) -> list[torch.Tensor]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    state = [t for part in parts for of in part.optimizer.state.values() for t in of.values()]
    masters = [
        p for part in parts for group in part.optimizer.param_groups for p in group["params"]
    ]
    return [*masters, *(t for t in state if isinstance(t, torch.Tensor))]


def optimizer_bytes(optimizer: Any) -> dict[str, int]:
    masters = moments = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            moments += sum(bytes_of(state[name]) for name in ("exp_avg", "exp_avg_sq"))
        for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups"):
            for group in getattr(part, name, ()):
                masters += sum(bytes_of(tensor) for tensor in group if tensor is not None)
    return {"masters": masters, "moments": moments}


def errors(work: Work, rank: dict[str, Any]) -> dict[str, float]:
    """Relative error of every part of the plan, and of the fullest moment."""
    memory = rank_memory(work, rank["stage"])
    # the first step makes the folded weights
    passes = memory.folded + memory.masks + memory.activations + memory.buffers
    passes += taught_bytes(work, rank["stage"])
    planned = memory.parts() | {"peak": passes}
    return {part: abs(planned[part] - rank[part]) / max(rank[part], 1) for part in (*PARTS, "peak")}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_every_part_is_what_a_run_allocates(name: str) -> None:
    work = CASES[name].work()
    allowed = dict.fromkeys(PARTS, 0.0) | {"activations": KEPT, "peak": CLOSE}
    if work.parallel.use_distributed_optimizer:
        allowed |= {"masters": PADDING, "moments": PADDING}
    for rank in measured(name):
        found = errors(work, rank)
        assert {part: e for part, e in found.items() if e > allowed[part]} == {}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.teacher])
def test_weights_of_a_teacher_are_counted_exactly(name: str) -> None:
    work = CASES[name].work()
    for rank in measured(name):
        memory = rank_memory(work, rank["stage"])
        assert memory.teacher - taught_bytes(work, rank["stage"]) == rank["taught"]


def evaluation_error(work: Work, rank: dict[str, Any]) -> float:
    planned = evaluation_memory(work, rank["stage"], micro_batch_size=EVALUATED)
    return abs(planned.buffers - rank["evaluation"]) / rank["evaluation"]


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_needs_what_is_planned(name: str) -> None:
    for rank in measured(name):
        assert evaluation_error(CASES[name].work(), rank) < CLOSE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("plain", {"shape": dataclasses.replace(SHAPE, ffn_hidden_size=320)}),
        ("plain", {"model": ModelConfig()}),
        ("tp2", {"parallel": layout()}),
    ],
)
def test_a_wrong_plan_of_an_evaluation_is_noticed(name: str, change: dict[str, Any]) -> None:
    wrong = dataclasses.replace(CASES[name].work(), **change)
    assert evaluation_error(wrong, measured(name)[0]) > CLOSE


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_step_needs_the_memory_of_one_parameter(name: str) -> None:
    for rank in measured(name):
        largest = max(stage_parameters(CASES[name].work(), rank["stage"]))
        assert rank["step"] <= 4 * largest + 64  # for the norm; a few scalars
        assert rank["step"] < rank["peak"]


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted_exactly(name: str) -> None:
    for rank in measured(name):
        assert sum(stage_parameters(CASES[name].work(), rank["stage"])) == rank["parameters"]


def test_all_ranks_together_hold_the_model() -> None:
    work = CASES["tp2-pp2-sp"].work()
    norms = (2 * SHAPE.num_layers + 1) * SHAPE.hidden_size  # which both tensor ranks have
    held = 2 * sum(sum(stage_parameters(work, stage)) for stage in range(2))
    assert held - norms == SHAPE.num_params()


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("plain", "activations", {"model": ModelConfig()}),
        ("plain", "masters", {"model": ModelConfig()}),
        ("recompute", "activations", {"model": ModelConfig(bf16=True)}),
        ("tp2-sp-masked", "activations", {"parallel": layout(tp=2)}),
        ("pp2", "activations", {"num_microbatches": 1}),
        ("pp2", "peak", {"num_microbatches": 1}),
        ("pp2-vpp2", "activations", {"parallel": layout(pp=2)}),
        ("dp2-sharded", "moments", {"parallel": layout()}),
        ("masked", "masks", {"masks": frozenset({"hidden"})}),
        ("masked", "folded", {"masks": frozenset()}),
        ("masked", "peak", {"masks": frozenset()}),
        ("streams", "folded", {"noise_streams": 1}),
        ("streams", "peak", {"noise_streams": 1}),
        ("dp2-streams", "folded", {"data_size": 3}),
        ("neurons", "folded", {"masks": frozenset({"layer"})}),
        ("layers", "folded", {"masks": frozenset({"layer", "hidden"})}),
        ("tied-masked", "folded", {"shape": SHAPE}),
        ("distilled", "activations", {"teacher": None}),
        ("distilled", "peak", {"teacher": None}),
        ("distilled-entropy", "activations", {"has_entropy": False}),
        ("distilled-many", "peak", {"num_microbatches": 4}),
        ("plain", "peak", {"shape": dataclasses.replace(SHAPE, ffn_hidden_size=320)}),
        ("pp2", "peak", {"shape": dataclasses.replace(SHAPE, ffn_hidden_size=320)}),
    ],
)
def test_a_wrong_plan_is_noticed(name: str, part: str, change: dict[str, Any]) -> None:
    wrong = dataclasses.replace(CASES[name].work(), **change)
    assert max(errors(wrong, rank)[part] for rank in measured(name)) > CLOSE


SENT = {
    "tp2": ("tensor", ("allreduce_",)),
    "tp2-sp": ("tensor", ("_allgather_base_", "_reduce_scatter_base_")),
    "tp2-sp-recompute": ("tensor", ("_allgather_base_", "_reduce_scatter_base_")),
    "pp2": ("pipeline", ("send",)),
    "pp2-vpp2": ("pipeline", ("send",)),
    "dp2": ("data", ("allreduce_coalesced_",)),
    "dp2-sharded": (
        "data",
        (
            "reduce_scatter_tensor_coalesced_",
            "allgather_into_tensor_coalesced_",
            "_allgather_base_",
        ),
    ),
}
"""What a kind of parallelism is reduced and gathered with."""


def sent_error(work: Work, name: str) -> float:
    kind, collectives = SENT[name]
    cluster = Cluster(gpu=GPUS["H100-80G"], num_gpus=2, gpus_per_node=8, network=1.0)
    planned = getattr(step_time(work, cluster, mfu=0.4), kind).sent
    found = max(sum(rank["sent"].get(c, 0) for c in collectives) for rank in measured(name))
    return abs(planned - found) / found


@pytest.mark.parametrize("name", SENT)
def test_what_is_sent_is_what_a_run_sends(name: str) -> None:
    assert sent_error(CASES[name].work(), name) < CLOSE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tp2-sp", {"parallel": layout(tp=2)}),
        ("tp2-sp-recompute", {"model": ModelConfig(bf16=True)}),
        ("pp2-vpp2", {"parallel": layout(pp=2)}),
        ("dp2", {"parallel": layout(use_distributed_optimizer=True)}),
    ],
)
def test_wrong_traffic_is_noticed(name: str, change: dict[str, Any]) -> None:
    wrong = dataclasses.replace(CASES[name].work(), **change)
    assert sent_error(wrong, name) > CLOSE
