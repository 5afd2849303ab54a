"""Estimates of the time of one step, and of the bytes that cross each link in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megashear.planning.hardware import Gpu
from megashear.planning.memory import stage_parameters
from megashear.planning.work import FLOAT32, Work

LINK_EFFICIENCY = 0.75
"""Share of a link's nominal speed that collectives are assumed to reach. NVIDIA's nccl-tests report
all-reduces of large messages at about 230 of 300 GB/s on eight A100."""

FORWARD_SHARE = 1 / 3
"""Share of a forward pass in a training pass without recompute: the backward pass takes twice as
much (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""

BUCKET = 40_000_000
"""Least parameters of a bucket. Source: megatron-core 0.16.1, DistributedDataParallel."""
BUCKET_PER_REPLICA = 1_000_000
"""Least parameters of a bucket for each replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A number of GPUs of one kind, and the links between them."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    network: float
    """Speed between nodes, bytes a second and GPU in each direction."""

    def ring(self, size: int, *, apart: int = 1) -> tuple[str, float]:
        """Return the link over which a rank of a collective sends, and its bytes a second.

        For a group that crosses nodes NCCL makes as many rings as the group has ranks on a node.
        Each ring uses another adapter, so that a rank sees the sum of them, up to the speed of the
        node's own link. (NVIDIA/nccl, issue 812: 192 GB/s a GPU on two DGX A100 with eight adapters
        of 25 GB/s.)

        Args:
            size: ranks of the group.
            apart: distance from one rank of the group to the next; groups alternate within
                ``size * apart`` ranks.
        """
        span, node = size * apart, self.gpus_per_node
        if self.num_gpus <= node or node % span == 0:
            return "node", self.gpu.node_link * LINK_EFFICIENCY
        # least ranks of the group on any node: groups begin at multiples of the span
        rings = max(1, math.gcd(span, node) // apart)
        return "network", min(self.gpu.node_link, rings * self.network) * LINK_EFFICIENCY

    def hop(self) -> tuple[str, float]:
        """Return the slowest link between two stages, which send through one adapter."""
        inside = self.num_gpus <= self.gpus_per_node
        speed = self.gpu.node_link if inside else self.network
        return ("node" if inside else "network"), speed * LINK_EFFICIENCY


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Traffic of a GPU in one step for one kind of parallelism."""

    sent: int
    """Bytes that it sends."""
    link: str
    """Slowest link on the way: node or network."""
    exposed: float
    """Seconds in which nothing is computed meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step by what takes them, one after the other."""

    compute: float
    """Seconds of all microbatches' arithmetic on the slowest stage."""
    bubble: float
    """Seconds in which stages wait for the first and the last microbatch."""
    teacher: float
    """Seconds of the teacher's pass, with its communication and bubble."""
    tensor: Traffic
    pipeline: Traffic
    data: Traffic

    @property
    def total(self) -> float:
        """Return the seconds of a step."""
        exposed = self.tensor.exposed + self.pipeline.exposed + self.data.exposed
        return self.compute + self.bubble + self.teacher + exposed


def step_time(work: Work, cluster: Cluster, *, mfu: float) -> StepTime:
    """Return an estimate of the time of a step.

    The time of a microbatch on a stage is its arithmetic over ``mfu`` times the peak, plus the
    communication that no arithmetic hides. The slowest stage sets the pace of m microbatches.
    (p - 1) / v more pass while the pipeline fills and drains (p stages of v chunks). Gradients are
    reduced, and weights gathered, after the last microbatch. Where they overlap, the last backward
    pass and the first forward pass hide them as long as these passes last.

    Args:
        work: the step.
        cluster: the GPUs.
        mfu: share of the peak that is reached while computing; recomputed layers, bubble and
            communication are counted separately.
    """
    # arithmetic and communication of a microbatch
    speed = cluster.gpu.peak_flops * mfu
    compute = max(_stage_flops(work, stage) for stage in _ends(work)) / speed
    tensor_exposed, tensor_sent = _tensor_bytes(work)
    tensor_link, tensor_speed = cluster.ring(work.tensor)
    hop = work.element * work.own_tokens * work.shape.hidden_size if work.pipeline > 1 else 0
    pipeline_link, pipeline_speed = cluster.hop()  # stages are the farthest apart of all ranks
    tensor_time = tensor_exposed / tensor_speed
    pipeline_time = 2 * work.virtual * hop / pipeline_speed
    pace = compute + tensor_time + pipeline_time
    # gradients and weights of replicas
    count = work.num_microbatches
    reduced, gathered = _data_bytes(work)
    data_link, data_speed = cluster.ring(work.data_size, apart=work.tensor)
    overlap = work.parallel.overlap_grad_reduce, work.parallel.overlap_param_gather
    reducing = _beside(work, reduced / data_speed, pace * 2 / 3, overlaps=overlap[0])
    gathering = _beside(work, gathered / data_speed, pace / 3, overlaps=overlap[1])
    # the whole step
    tied = _tied_bytes(work)
    return StepTime(
        compute=count * compute,
        bubble=(work.pipeline - 1) / work.virtual * pace,
        teacher=_teacher_seconds(work, cluster, mfu=mfu),
        tensor=Traffic(
            sent=round(count * tensor_sent), link=tensor_link, exposed=count * tensor_time
        ),
        pipeline=Traffic(
            # one of two stages is an end, which sends microbatches of a chunk in one direction
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


def _teacher_seconds(work: Work, cluster: Cluster, *, mfu: float) -> float:
    """Return the seconds of the teacher's forward passes of a step."""
    if work.teacher is None:
        return 0.0
    whole = step_time(work.of_teacher, cluster, mfu=mfu)
    passes = whole.compute + whole.bubble + whole.tensor.exposed + whole.pipeline.exposed
    return FORWARD_SHARE * passes


def forward_seconds(work: Work, time: StepTime) -> float:
    """Return the seconds of a sequence's forward pass, at the pace of a step without recompute."""
    sequences = work.num_microbatches * work.micro_batch_size * work.data_size
    whole = 1 + FORWARD_SHARE * _run_again(work)
    return (time.total - time.teacher) / sequences * FORWARD_SHARE / whole


def _ends(work: Work) -> set[int]:
    """Return the first and the last stage: no other has more to do."""
    return {0, work.pipeline - 1}


def _stage_flops(work: Work, stage: int) -> float:
    """Return the operations of a microbatch, forward and backward, on a rank of a stage."""
    shape, seq = work.shape, work.seq_length
    head = 6 * shape.vocab_size * shape.hidden_size
    layers = shape.training_flops(seq) - head
    share = 1 / work.pipeline
    per_token = layers * share * (1 + _run_again(work) * FORWARD_SHARE)
    if stage == work.pipeline - 1:
        per_token += head
    return per_token * work.tokens / work.tensor


def _run_again(work: Work) -> float:
    """Return the share of layers that recompute runs again, a third of a training pass each."""
    if work.model.recompute_granularity is None:
        return 0.0
    if work.model.recompute_method == "uniform":
        return 1.0
    return min(work.model.recompute_num_layers, work.chunk_layers) / work.chunk_layers


def _tensor_bytes(work: Work) -> tuple[float, float]:
    """Return the bytes that a tensor rank sends for a microbatch: those nothing hides, and all.

    They are counted in units of a reduce-scatter or all-gather of [s, b, h] by ring; an all-reduce
    is two units. In the forward pass a layer takes four: inputs and outputs of attention and MLP.
    In the backward pass the gradients of the inputs of column-parallel linears take four, which the
    products for the weights' gradients hide. Sequence parallelism adds two exposed units, where
    gradients enter the row-parallel linears, and two hidden units, which gather the inputs of
    linears again.
    """
    size = work.tensor
    if size == 1:
        return 0.0, 0.0
    unit = work.element * work.tokens * work.shape.hidden_size * (size - 1) / size
    sequence, alone = work.parallel.sequence_parallel, work.pipeline == 1
    exposed = 4 + 4 * _run_again(work) + (2 if sequence else 0)
    layers = work.chunk_layers * work.virtual
    # The embedding takes two exposed units. The output layer takes two hidden ones, and with
    # sequence parallelism one exposed. Only a stage that is alone has both matrices.
    ends_exposed, ends = (3, 5) if sequence else (2, 4)
    if not alone:
        ends_exposed, ends = 2, ends - 2
    return unit * (layers * exposed + ends_exposed), unit * (layers * (exposed + 4) + ends)


def _own_parameters(work: Work) -> int:
    return max(sum(stage_parameters(work, stage)) for stage in _ends(work))


def _data_bytes(work: Work) -> tuple[int, int]:
    """Return the bytes of gradients and of weights that a rank sends to replicas in a step."""
    ring = (work.data_size - 1) / work.data_size
    count = _own_parameters(work)
    if work.parallel.use_distributed_optimizer:
        return round(ring * count * FLOAT32), round(ring * count * work.element)
    return round(ring * count * 2 * FLOAT32), 0


def _beside(work: Work, seconds: float, computing: float, *, overlaps: bool) -> float:
    """Return the seconds of communication that ``computing`` seconds of a pass do not hide.

    The communication of the last bucket cannot begin before the pass has ended.
    """
    if not overlaps:
        return seconds
    bucket = work.parallel.ddp_bucket_size or max(BUCKET, BUCKET_PER_REPLICA * work.data_size)
    last = min(1.0, bucket / _own_parameters(work))
    return max(last * seconds, seconds - computing)


def _tied_bytes(work: Work) -> int:
    """Return the bytes of the gradient of tied embeddings, which first and last stage add."""
    if not work.shape.tied_embeddings or work.pipeline == 1:
        return 0
    return FLOAT32 * work.own_vocab * work.shape.hidden_size
