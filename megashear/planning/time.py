"""How long one step takes, and what crosses which link in it: an estimate, and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megashear.planning.hardware import Gpu
from megashear.planning.memory import stage_parameters
from megashear.planning.work import FLOAT32, Work

LINK_EFFICIENCY = 0.75
"""Share of a link's nominal speed that collectives reach. An assumption: NVIDIA's nccl-tests report
all-reduces of large messages at about 230 of 300 GB/s on eight A100."""

FORWARD_SHARE = 1 / 3
"""Share of a forward pass in a training pass without recompute: the backward pass takes twice as
much (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""

BUCKET = 40_000_000
"""Parameters of a bucket, at least. Source: megatron-core 0.16.1, DistributedDataParallel."""
BUCKET_PER_REPLICA = 1_000_000
"""And so many for each replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """How many GPUs of which kind, and how they hang together."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    network: float
    """Between nodes, bytes a second and GPU in each direction."""

    def ring(self, size: int, *, apart: int = 1) -> tuple[str, float]:
        """What a collective's rank sends over: the name of the link, bytes a second.

        Of a group that crosses nodes NCCL makes as many rings as it has ranks on a node, each
        through another's adapter, so that a rank sees their sum, up to what the node's own link
        carries. (NVIDIA/nccl, issue 812: 192 GB/s a GPU on two DGX A100 with eight adapters of 25.)

        Args:
            size: ranks of the group.
            apart: from one of its ranks to the next; groups lie side by side in ``size * apart``.
        """
        span, node = size * apart, self.gpus_per_node
        if self.num_gpus <= node or node % span == 0:
            return "node", self.gpu.node_link * LINK_EFFICIENCY
        # the least of its ranks on any node: groups begin at multiples of the span
        rings = max(1, math.gcd(span, node) // apart)
        return "network", min(self.gpu.node_link, rings * self.network) * LINK_EFFICIENCY

    def hop(self) -> tuple[str, float]:
        """The slowest link between two stages, which send through one adapter."""
        inside = self.num_gpus <= self.gpus_per_node
        speed = self.gpu.node_link if inside else self.network
        return ("node" if inside else "network"), speed * LINK_EFFICIENCY


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What a GPU sends in one step for one kind of parallelism."""

    sent: int
    """Bytes."""
    link: str
    """node or network."""
    exposed: float
    """Seconds that nothing is computed meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One optimizer step, seconds by what takes them; they follow each other."""

    compute: float
    """Arithmetic of all microbatches on the slowest stage."""
    bubble: float
    """Stages waiting for the first and the last microbatch."""
    tensor: Traffic
    pipeline: Traffic
    data: Traffic

    @property
    def total(self) -> float:
        """Seconds a step."""
        exposed = self.tensor.exposed + self.pipeline.exposed + self.data.exposed
        return self.compute + self.bubble + exposed


def step_time(work: Work, cluster: Cluster, *, mfu: float) -> StepTime:
    """Estimate a step.

    A microbatch takes a stage its arithmetic over the peak times ``mfu``, and the communication
    that no arithmetic hides. The slowest stage sets the pace of m microbatches; (p - 1) / v more
    go by while the pipeline fills and drains (p stages of v chunks). Gradients are reduced, and
    weights gathered, after the last one; where they overlap, the last backward and the first
    forward pass hide as much as they last.

    Args:
        work: the step.
        cluster: what runs it.
        mfu: share of the peak that is reached while computing; recomputed layers, bubble and
            communication are counted beside it.
    """
    speed = cluster.gpu.peak_flops * mfu
    compute = max(_stage_flops(work, stage) for stage in _ends(work)) / speed
    tensor_exposed, tensor_sent = _tensor_bytes(work)
    tensor_link, tensor_speed = cluster.ring(work.tensor)
    hop = work.element * work.own_tokens * work.shape.hidden_size if work.pipeline > 1 else 0
    pipeline_link, pipeline_speed = cluster.hop()  # stages are the farthest apart of all ranks
    tensor_time = tensor_exposed / tensor_speed
    pipeline_time = 2 * work.virtual * hop / pipeline_speed
    pace = compute + tensor_time + pipeline_time
    count = work.num_microbatches
    reduced, gathered = _data_bytes(work)
    data_link, data_speed = cluster.ring(work.data_size, apart=work.tensor)
    overlap = work.parallel.overlap_grad_reduce, work.parallel.overlap_param_gather
    reducing = _beside(work, reduced / data_speed, pace * 2 / 3, overlaps=overlap[0])
    gathering = _beside(work, gathered / data_speed, pace / 3, overlaps=overlap[1])
    tied = _tied_bytes(work)
    return StepTime(
        compute=count * compute,
        bubble=(work.pipeline - 1) / work.virtual * pace,
        tensor=Traffic(
            sent=round(count * tensor_sent), link=tensor_link, exposed=count * tensor_time
        ),
        pipeline=Traffic(
            # of two stages each is an end, which sends a chunk's microbatch in one direction only
            sent=count * (2 * work.virtual - (work.pipeline == 2)) * hop + tied,
            link=pipeline_link,
            exposed=count * pipeline_time + tied / pipeline_speed,
        ),
        data=Traffic(
            sent=reduced + gathered,
            link=data_link,
            exposed=reducing + gathering,
        ),
    )


def forward_seconds(work: Work, time: StepTime) -> float:
    """Seconds that a sequence takes forward only, at the pace of a step: nothing is run again."""
    sequences = work.num_microbatches * work.micro_batch_size * work.data_size
    whole = 1 + FORWARD_SHARE * _run_again(work)
    return time.total / sequences * FORWARD_SHARE / whole


def _ends(work: Work) -> set[int]:
    """First and last stage: no other has more to do."""
    return {0, work.pipeline - 1}


def _stage_flops(work: Work, stage: int) -> float:
    """Operations of a microbatch, forward and backward, on a rank of a stage."""
    shape, seq = work.shape, work.seq_length
    head = 6 * shape.vocab_size * shape.hidden_size
    layers = shape.training_flops(seq) - head
    share = 1 / work.pipeline
    per_token = layers * share * (1 + _run_again(work) * FORWARD_SHARE)
    if stage == work.pipeline - 1:
        per_token += head
    return per_token * work.tokens / work.tensor


def _run_again(work: Work) -> float:
    """Share of the layers whose forward pass, a third of a training pass, is run again."""
    if work.model.recompute_granularity is None:
        return 0.0
    if work.model.recompute_method == "uniform":
        return 1.0
    return min(work.model.recompute_num_layers, work.chunk_layers) / work.chunk_layers


def _tensor_bytes(work: Work) -> tuple[float, float]:
    """Bytes that a tensor rank sends for a microbatch by ring: those nothing hides, and all.

    In units of a reduce-scatter or all-gather of [s, b, h]; an all-reduce is two. Forward a layer
    takes four: what goes into and comes out of attention and MLP. Backward the gradients that go
    into the column-parallel linears take four, hidden behind the product that gives the weights'
    gradients; sequence parallelism adds two that nothing hides, where gradients enter the
    row-parallel linears, and two hidden ones that gather the linears' inputs again.
    """
    size = work.tensor
    if size == 1:
        return 0.0, 0.0
    unit = work.element * work.tokens * work.shape.hidden_size * (size - 1) / size
    sequence, alone = work.parallel.sequence_parallel, work.pipeline == 1
    exposed = 4 + 4 * _run_again(work) + (2 if sequence else 0)
    layers = work.chunk_layers * work.virtual
    # The embedding takes two that nothing hides. The output layer takes two that are hidden, and
    # with sequence parallelism one that is not. Only a stage that is alone has both.
    ends_exposed, ends = (3, 5) if sequence else (2, 4)
    if not alone:
        ends_exposed, ends = 2, ends - 2
    return unit * (layers * exposed + ends_exposed), unit * (layers * (exposed + 4) + ends)


def _own_parameters(work: Work) -> int:
    return max(sum(stage_parameters(work, stage)) for stage in _ends(work))


def _data_bytes(work: Work) -> tuple[int, int]:
    """Bytes of gradients and of weights that a replica's rank sends in a step, by ring."""
    ring = (work.data_size - 1) / work.data_size
    count = _own_parameters(work)
    if work.parallel.use_distributed_optimizer:
        return round(ring * count * FLOAT32), round(ring * count * work.element)
    return round(ring * count * 2 * FLOAT32), 0


def _beside(work: Work, seconds: float, computing: float, *, overlaps: bool) -> float:
    """Seconds of communication that ``computing`` seconds of one microbatch's pass leave over.

    What belongs to the last bucket cannot begin before the pass has ended.
    """
    if not overlaps:
        return seconds
    bucket = work.parallel.ddp_bucket_size or max(BUCKET, BUCKET_PER_REPLICA * work.data_size)
    last = min(1.0, bucket / _own_parameters(work))
    return max(last * seconds, seconds - computing)


def _tied_bytes(work: Work) -> int:
    """Bytes of the gradient of tied embeddings, which first and last stage add."""
    if not work.shape.tied_embeddings or work.pipeline == 1:
        return 0
    return FLOAT32 * work.own_vocab * work.shape.hidden_size
