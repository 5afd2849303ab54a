"""Arithmetic of a step against published runs, and a step's time against formulas by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megashear.config import ModelConfig
from megashear.planning.activations import schedule
from megashear.planning.hardware import GB, GPUS, find_gpu, gpu_of_device
from megashear.planning.time import LINK_EFFICIENCY, Cluster, forward_seconds, step_time
from megashear.planning.work import Work
from megashear.shape import PRESETS, ModelShape
from tests.tiny import layout

A100, H100 = GPUS["A100-80G"], GPUS["H100-80G"]

# Tokens a second and GPU of LLM-Shearing on A100, with the MFU its authors' trainer printed.
# Source: docs/algorithm.md section 6, after the repository of Xia et al. 2023 (arXiv:2310.06694).
LLM_SHEARING = {"llama2-7b": (1844, 28), "llama2-2.7b": (4957, 32), "llama2-1.3b": (8684, 29)}

# Megatron-LM on A100, sequences of 2,048 and a vocabulary of 51,200: layers, hidden size, GPUs,
# sequences a step, seconds a step, MFU in percent as printed.
# Source: Korthikanti et al. 2022 (arXiv:2205.05198), tables 3 and 5.
MEGATRON = {
    "22B": (48, 6144, 8, 4, 1.10, 41.5),
    "175B": (96, 12288, 64, 64, 13.75, 51.4),
    "530B": (105, 20480, 280, 280, 37.83, 56.0),
    "1T": (128, 25600, 512, 512, 71.49, 56.3),
}


@pytest.mark.parametrize("preset", LLM_SHEARING)
def test_published_throughput_gives_the_published_utilisation(preset: str) -> None:
    shape, (tokens_per_second, percent) = PRESETS[preset], LLM_SHEARING[preset]
    # its trainer counts six operations for the embedding's parameters too
    flops = shape.training_flops(4096) + 6 * shape.vocab_size * shape.hidden_size
    assert round(100 * flops * tokens_per_second / A100.peak_flops) == percent


def test_without_attention_the_published_utilisation_is_missed() -> None:
    shape = PRESETS["llama2-7b"]
    assert round(100 * 6 * shape.num_params() * 1844 / A100.peak_flops) == 24  # not 28


@pytest.mark.parametrize("size", MEGATRON)
def test_megatrons_step_times_give_megatrons_utilisation(size: str) -> None:
    layers, hidden, gpus, batch, seconds, percent = MEGATRON[size]
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 128,
        num_query_groups=hidden // 128,
        head_dim=128,
        # a GPT's MLP has two matrices of 4 h, ours three
        ffn_hidden_size=8 * hidden // 3,
        vocab_size=51200,
    )
    flops = shape.training_flops(2048) * batch * 2048
    found = 100 * flops / (seconds * gpus * A100.peak_flops)
    # the time is printed to a hundredth of a second
    assert abs(found - percent) < 0.05 + 0.005 / seconds * percent


def work(**changed) -> Work:
    given = {
        "shape": PRESETS["llama2-7b"],
        "parallel": layout(),
        "model": ModelConfig(bf16=True),
        "seq_length": 4096,
        "micro_batch_size": 1,
        "num_microbatches": 8,
    }
    return Work(**(given | changed))


def cluster(gpus: int, per_node: int = 8) -> Cluster:
    return Cluster(gpu=H100, num_gpus=gpus, gpus_per_node=per_node, network=H100.network)


def test_one_gpu_does_nothing_but_compute() -> None:
    found = step_time(work(), cluster(1), mfu=0.5)
    shape = PRESETS["llama2-7b"]
    flops = 6 * (shape.num_params() - 65 * 4096 - 32000 * 4096) + 12 * 32 * 4096 * 4096
    assert found.total == pytest.approx(8 * 4096 * flops / (0.5 * 989e12))
    assert found.bubble == found.tensor.exposed == found.data.exposed == found.pipeline.sent == 0


def test_recompute_runs_the_layers_a_third_longer() -> None:
    plain = step_time(work(), cluster(1), mfu=0.5).compute
    whole = ModelConfig(bf16=True, recompute_granularity="full")
    head = 6 * 32000 * 4096 * 8 * 4096 / (0.5 * 989e12)
    again = step_time(work(model=whole), cluster(1), mfu=0.5).compute
    assert again - head == pytest.approx((plain - head) * 4 / 3)
    half = replace(whole, recompute_method="block", recompute_num_layers=16)
    assert step_time(work(model=half), cluster(1), mfu=0.5).compute - head == pytest.approx(
        (plain - head) * 7 / 6
    )


@pytest.mark.parametrize(("student", "longer"), [("llama2-2.7b", 1.83), ("llama2-1.3b", 2.7)])
def test_a_teacher_costs_its_forward_pass(student: str, longer: float) -> None:
    """2 N of the teacher beside 6 N of the student, where N has embeddings and no attention."""
    shape = PRESETS[student]
    plain = step_time(work(shape=shape), cluster(1), mfu=0.5)
    taught = step_time(work(shape=shape, teacher=PRESETS["llama2-7b"]), cluster(1), mfu=0.5)
    assert taught.total - plain.total == pytest.approx(taught.teacher)
    seven = PRESETS["llama2-7b"].training_flops(4096) / 3
    assert taught.teacher == pytest.approx(8 * 4096 * seven / (0.5 * 989e12))
    assert taught.total / plain.total == pytest.approx(longer, rel=0.07)


def test_a_teacher_passes_the_pipeline_too() -> None:
    split = work(parallel=layout(pp=4), teacher=PRESETS["llama2-7b"], shape=PRESETS["llama2-2.7b"])
    found = step_time(split, cluster(4), mfu=0.5)
    alone = step_time(replace(split, shape=PRESETS["llama2-7b"], teacher=None), cluster(4), mfu=0.5)
    assert found.teacher == pytest.approx(
        (alone.compute + alone.bubble + alone.pipeline.exposed) / 3
    )


def test_the_bubble_is_stages_less_one_over_chunks() -> None:
    plain = step_time(work(parallel=layout(pp=4)), cluster(4), mfu=0.5)
    pace = (plain.compute + plain.pipeline.exposed) / 8
    assert plain.bubble == pytest.approx(3 * pace)
    chunked = step_time(work(parallel=layout(pp=4, vpp=2)), cluster(4), mfu=0.5)
    assert chunked.bubble == pytest.approx(3 * (chunked.compute + chunked.pipeline.exposed) / 8 / 2)


def test_the_last_stage_sets_the_pace() -> None:
    found = step_time(work(parallel=layout(pp=4)), cluster(4), mfu=0.5)
    even = step_time(work(), cluster(1), mfu=0.5).compute / 4
    head = 6 * 32000 * 4096 * 8 * 4096 / (0.5 * 989e12)
    assert found.compute == pytest.approx(even + head * 3 / 4)


def test_gradients_go_over_the_network_when_replicas_do_not_share_a_node() -> None:
    inside = step_time(work(data_size=8), cluster(8), mfu=0.5).data
    outside = step_time(work(data_size=8), cluster(8, per_node=4), mfu=0.5).data
    assert (inside.link, outside.link) == ("node", "network")
    assert inside.sent == outside.sent == round(2 * 7 / 8 * 4 * PRESETS["llama2-7b"].num_params())
    assert inside.exposed == pytest.approx(inside.sent / (450 * GB * LINK_EFFICIENCY))
    # four ranks on each node, four adapters
    assert outside.exposed == pytest.approx(outside.sent / (4 * 50 * GB * LINK_EFFICIENCY))


@pytest.mark.parametrize(
    ("gpus", "size", "apart", "link", "speed"),
    [
        (8, 8, 1, "node", 450),
        (16, 8, 1, "node", 450),
        (16, 2, 4, "node", 450),
        (16, 16, 1, "network", 400),  # eight adapters of 50
        (16, 8, 2, "network", 200),
        (16, 4, 4, "network", 100),
        (16, 2, 8, "network", 50),
        (32, 2, 16, "network", 50),
        # spans that no node holds whole: ranks 6, 7 | 8 of the third group of three
        (24, 3, 1, "network", 50),
        (24, 6, 1, "network", 2 * 50),
        (24, 3, 2, "network", 50),
        (12, 12, 1, "network", 4 * 50),  # four ranks on the second node
        (6, 3, 1, "node", 450),  # all on one
    ],
)
def test_a_ring_crosses_nodes_through_the_adapters_of_all_its_ranks(
    gpus: int, size: int, apart: int, link: str, speed: float
) -> None:
    found = cluster(gpus).ring(size, apart=apart)
    assert found == (link, pytest.approx(speed * GB * LINK_EFFICIENCY))
    # the same by counting: ranks of each group on each node, the fewest where a group crosses
    groups = [
        [start + offset + apart * n for n in range(size)]
        for start in range(0, gpus, size * apart)
        for offset in range(apart)
    ]
    nodes = [[rank // 8 for rank in group] for group in groups]
    crossing = [group for group in nodes if len(set(group)) > 1]
    assert (link == "network") == bool(crossing)
    if crossing:
        fewest = min(group.count(node) for group in crossing for node in set(group))
        assert speed == 50 * fewest


def test_a_ring_is_no_faster_than_the_link_in_the_node() -> None:
    l40s = GPUS["L40S-48G"]
    many = Cluster(gpu=l40s, num_gpus=16, gpus_per_node=8, network=l40s.network)
    assert many.ring(16) == ("network", 32 * GB * LINK_EFFICIENCY)  # not 8 * 12.5


def test_stages_send_through_one_adapter() -> None:
    assert cluster(16).hop() == ("network", 50 * GB * LINK_EFFICIENCY)
    assert cluster(8).hop() == ("node", 450 * GB * LINK_EFFICIENCY)


def test_an_evaluations_sequence_is_a_third_and_never_run_again() -> None:
    plain = step_time(work(), cluster(1), mfu=0.5)
    assert forward_seconds(work(), plain) == pytest.approx(plain.total / 8 / 3)
    whole = work(model=ModelConfig(bf16=True, recompute_granularity="full"))
    again = step_time(whole, cluster(1), mfu=0.5)
    assert forward_seconds(whole, again) == pytest.approx(again.total / 8 / 4)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_schedule_runs_every_pass_once_and_forward_first(stages: int, chunks: int) -> None:
    if stages == 1 and chunks > 1:
        pytest.skip("no stages, no chunks")
    for stage in range(stages):
        done = list(schedule(work(parallel=layout(pp=stages, vpp=chunks)), stage))
        for chunk in range(chunks):
            passes = [way for way, of in done if of == chunk]
            assert passes.count("forward") == passes.count("backward") == 8
            open_ = 0
            for way in passes:
                open_ += 1 if way == "forward" else -1
                assert open_ >= 0
    if chunks == 1:
        first = list(schedule(work(parallel=layout(pp=stages)), 0))
        assert first.index(("backward", 0)) == stages  # as many in flight as there are stages


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("H100-96G", "H100-80G"), ("h20o", "H200-141G"), ("A100_80G", "A100-80G"), ("V100", "")],
)
def test_an_unknown_gpu_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"--gpu {name} is not known; nearest: {nearest}.*L40S"):
        find_gpu(name)


def test_a_kind_is_named_by_its_beginning_where_one_fits() -> None:
    for name, wanted in {"a100-40g": "A100-40G", "H100": "H100-80G", "h2": "H200-141G"}.items():
        assert find_gpu(name).name == wanted
    for name in ("A100", "h"):
        with pytest.raises(ValueError, match=rf"--gpu {name} may be \w+-\d+G or .*; say which$"):
            find_gpu(name)
    with pytest.raises(ValueError, match=r"--gpu  is not known"):
        find_gpu("")


def test_overlap_leaves_the_last_bucket_and_what_is_longer_than_a_pass() -> None:
    sharded = {"use_distributed_optimizer": True}
    plain = step_time(work(parallel=layout(**sharded), data_size=8), cluster(8), mfu=0.5)
    both = layout(**sharded, overlap_grad_reduce=True, overlap_param_gather=True)
    beside = step_time(work(parallel=both, data_size=8), cluster(8), mfu=0.5)
    assert beside.data.sent == plain.data.sent
    # passes last longer than the communication beside them: one bucket of 40 million is left
    bucket = 40e6 / PRESETS["llama2-7b"].num_params()
    assert beside.data.exposed == pytest.approx(bucket * plain.data.exposed)
    slow = Cluster(gpu=H100, num_gpus=8, gpus_per_node=1, network=GB)
    late = step_time(work(parallel=both, data_size=8), slow, mfu=0.5)
    whole = step_time(work(parallel=layout(**sharded), data_size=8), slow, mfu=0.5)
    # one microbatch's backward and forward pass, and not more
    assert whole.data.exposed - late.data.exposed == pytest.approx(late.compute / 8)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_device_is_known_by_its_drivers_name(name: str, kind: str | None) -> None:
    gpu = gpu_of_device(name)
    assert (None if gpu is None else gpu.name.partition("-")[0]) == kind
