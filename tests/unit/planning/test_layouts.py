"""The layouts that a plan lists, their order, and its messages where there are none."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from megashear.config import PlanConfig
from megashear.planning import search
from megashear.planning.hardware import GPUS
from megashear.planning.jobs import make_plans
from megashear.planning.layouts import Choices, Job
from megashear.planning.memory import fullest_stage, rank_memory
from megashear.planning.search import NothingFitsError, fitting_layouts
from megashear.planning.time import Cluster
from megashear.planning.work import GIB
from megashear.shape import PRESETS

SEVEN, SMALL = PRESETS["llama2-7b"], PRESETS["llama2-2.7b"]
KINDS = frozenset({"hidden", "head", "intermediate"})


OPEN = Choices()


def job(**changed: Any) -> Job:
    given = {
        "name": "pruning",
        "batch_flag": "--pruning-global-batch-size",
        "shape": SEVEN,
        "masks": KINDS,
        "target": SMALL,
        "tokens": 3200 * 32 * 4096,
        "global_batch_size": 32,
        "seq_length": 4096,
        "noise_streams": 8,
        "mfu": 0.28,
    }
    return Job(**(given | changed))


def cluster(gpus: int, gpu: str = "A100-80G") -> Cluster:
    kind = GPUS[gpu]
    return Cluster(gpu=kind, num_gpus=gpus, gpus_per_node=min(8, gpus), network=kind.network)


def found(gpus: int = 8, gpu: str = "A100-80G", chosen: Choices = OPEN, **changed: Any):
    return fitting_layouts(job(**changed), cluster(gpus, gpu), chosen, reserve_gib=5)


def test_layouts_fit_divide_and_are_sorted_by_time() -> None:
    listed = found()
    assert len(listed) > 10
    for candidate in listed:
        work = candidate.work
        assert work.tensor * work.pipeline * work.data_size == 8
        assert work.num_microbatches * work.micro_batch_size * work.data_size == 32
        assert work.tokens % 4096 == 0
        assert candidate.needed_gib <= 79.1 - 5
        assert fullest_stage(work)[1] == candidate.memory
    for faster, slower in pairwise(listed):
        assert faster.time.total <= slower.time.total * 1.01  # ties go to larger microbatches


def test_more_microbatches_than_are_looked_at_add_no_memory() -> None:
    for candidate in found()[:6]:
        for stage in range(candidate.work.pipeline):
            # one stream, because the number under way depends on their length
            work = replace(candidate.work, noise_streams=1)
            many = replace(work, num_microbatches=16 * work.pipeline)
            few = replace(many, num_microbatches=4 * candidate.work.pipeline)
            assert rank_memory(many, stage) == rank_memory(few, stage)


def test_recompute_is_taken_where_nothing_fits_without() -> None:
    roomy = found(chosen=Choices(tensor=8, pipeline=1, virtual=1))
    assert {c.work.model.recompute_granularity for c in roomy} == {None}
    chosen = Choices(tensor=4, pipeline=1, virtual=1, micro_batch_size=2)
    (tight,) = found(4, "A100-40G", chosen, noise_streams=1)
    model = tight.work.model
    assert (model.recompute_granularity, model.recompute_method) == ("full", "block")
    # with recompute of one layer less it does not fit
    less = replace(model, recompute_num_layers=model.recompute_num_layers - 1)
    assert rank_memory(replace(tight.work, model=less), 0).total / GIB > 39.3 - 5


def test_flags_are_those_of_the_run() -> None:
    (one,) = found(chosen=Choices(tensor=2, pipeline=2, virtual=2, micro_batch_size=1))
    assert one.flags(job()) == (
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--num-virtual-stages-per-pipeline-rank 2 --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather --micro-batch-size 1 "
        "--mask-noise-streams 8 --bf16"
    )
    (wide,) = found(chosen=Choices(tensor=8, pipeline=1, virtual=1))
    # 4 ranks divide 20 heads, 8 do not
    assert "--target-tensor-model-parallel-size 4" in wide.flags(job())
    continued = wide.flags(job(target=None, masks=frozenset()))
    assert "--target" not in continued
    assert "--mask-noise-streams" not in continued


@pytest.mark.parametrize(
    ("gpus", "chosen", "message"),
    [
        (
            7,
            Choices(),
            "pruning: no layout of 7 GPUs divides .* --pruning-global-batch-size 32: "
            "--pruning-global-batch-size 32 is not a multiple of .* = 1 \\* 7.*; a way out: "
            "--gpus 4 or 8",
        ),
        (
            8,
            Choices(tensor=3),
            "num_query_groups 32 is not a multiple of --tensor-model-parallel-size 3|world size 8",
        ),
        (8, Choices(pipeline=3), "world size 8 is not a multiple of .* = 1 \\* 3"),
        (
            6,
            Choices(tensor=6),
            "num_query_groups 32 is not a multiple of --tensor-model-parallel-size 6; the model "
            "divides by 1, 2, 4",
        ),
        (
            8,
            Choices(pipeline=8, virtual=3),
            "model num_layers 32 is not a multiple of .* = 8 \\* 3; their product may be 1, 2, 4",
        ),
        (
            8,
            Choices(micro_batch_size=3),
            "--pruning-global-batch-size 32 is not a multiple of --micro-batch-size \\* "
            "data-parallel size = 3 \\* 8",
        ),
        # with eight tensor ranks, microbatches of 8 divide 32 but not the streams
        (
            8,
            Choices(micro_batch_size=8),
            "32: --mask-noise-streams 8 does not divide --pruning-global-batch-size 32 into "
            "whole microbatches of 8; possible: 1, 2, 4$",
        ),
    ],
)
def test_what_does_not_divide_is_said_as_the_run_says_it(
    gpus: int, chosen: Choices, message: str
) -> None:
    with pytest.raises(NothingFitsError, match=message) as refused:
        found(gpus, chosen=chosen)
    assert " --global-batch-size" not in str(refused.value)  # which the plan does not have


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    with pytest.raises(NothingFitsError) as refused:
        found(2, "A100-40G")
    message = str(refused.value)
    assert message.startswith("pruning: no layout fits. The nearest, --tensor-model-parallel-size")
    numbers = re.search(
        r"needs ([\d.]+) GiB a GPU and has ([\d.]+) \(A100-40G: 39.3, less "
        r"--memory-reserve-gib 5\): ([\d.]+) GiB too much",
        message,
    )
    assert numbers is not None
    needed, there, over = map(float, numbers.groups())
    assert needed - there == pytest.approx(over, abs=0.11)
    more = re.search(r"ways out: --gpus (\d+), or --gpu ([\w-]+)$", message)
    assert more is not None
    assert found(int(more[1]), "A100-40G")
    assert found(2, more[2])
    with pytest.raises(NothingFitsError):
        found(int(more[1]) // 2, "A100-40G")


def test_a_layout_that_was_chosen_may_be_left_open() -> None:
    with pytest.raises(NothingFitsError, match="ways out: leaving the layout open"):
        found(8, "A100-40G", Choices(tensor=1, pipeline=1, micro_batch_size=1), noise_streams=1)


def test_nothing_that_was_tried_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_GPUS", 8)
    huge = replace(SEVEN, ffn_hidden_size=2**23, num_layers=1)
    with pytest.raises(NothingFitsError, match="nothing that was tried, up to 8 GPUs"):
        found(8, "A100-80G", shape=huge, target=None)


def test_pruning_asks_for_masks_that_lead_to_the_target() -> None:
    config = PlanConfig(model="llama2-7b", gpus=8)
    both = make_plans(config, SEVEN, SMALL)
    assert [plan.job.name for plan in both] == ["pruning", "continued pretraining"]
    assert both[0].job.masks == KINDS
    assert both[0].job.steps == 3200
    assert both[1].job.steps == 48000
    assert both[0].job.noise_streams == 8
    (alone,) = make_plans(config, SEVEN, None)
    assert alone.job.shape == SEVEN
    with pytest.raises(ValueError, match=r"is a sparsity of .* the nearest --target-hidden-size"):
        make_plans(config, SEVEN, replace(SEVEN, hidden_size=64))
    with pytest.raises(ValueError, match="sliding_window"):
        make_plans(replace(config, seq_length=8192), PRESETS["mistral-7b-v0.1"], None)


def test_hours_include_the_evaluations_of_the_recipe() -> None:
    recipes = Path(__file__).parents[3] / "examples/llama2_7b_to_2.7b"
    config = PlanConfig(model="llama2-7b", gpus=8)
    pruning, continued = make_plans(config, SEVEN, SMALL)
    for plan, recipe, modes in ((pruning, "prune", 2), (continued, "pretrain", 1)):
        run = yaml.safe_load((recipes / f"{recipe}.yaml").read_text())
        domains, batch = len(run["domain_weights"]), run["global_batch_size"]
        trained = run["eval_interval"] * batch  # sequences, between two evaluations
        share = domains * run["eval_sequences"] * modes / 3 / trained
        assert share == pytest.approx({"prune": 0.0933, "pretrain": 0.0114}[recipe], rel=0.01)
        best = plan.candidates[0]
        assert best.work.model.recompute_granularity is None
        alone = run["train_iters"] * best.time.total / 3600
        assert plan.hours(best) == pytest.approx(alone * (1 + share))
    never = replace(config, pruning_eval_interval=0, pretraining_eval_interval=0)
    for plan in make_plans(never, SEVEN, SMALL):
        best = plan.candidates[0]
        assert plan.hours(best) == plan.job.steps * best.time.total / 3600


def test_the_published_runs_take_about_as_long_as_planned() -> None:
    config = PlanConfig(model="llama2-7b", gpus=8, gpu="A100-80G")
    # tokens a second and GPU of LLM-Shearing, docs/algorithm.md section 6
    for plan, published in zip(make_plans(config, SEVEN, SMALL), (1844, 4957)):
        best = plan.candidates[0]
        assert plan.tokens_per_second(best) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pruning_eval_interval", -1, "--pruning-eval-interval is -1; wanted 0 to 1000000000"),
        ("eval_domains", 0, "--eval-domains is 0; wanted 1 to 1048576"),
        ("gpus", 0, "--gpus is 0; wanted 1 to 1048576"),
        ("pruning_tokens", 0.5, "--pruning-tokens is 0.5; wanted 1 to 1e18"),
        ("pretraining_tokens", float("inf"), "--pretraining-tokens is inf; wanted 1 to 1e18"),
        ("micro_batch_size", 0, "--micro-batch-size is 0; wanted 1 to 1048576"),
        ("mfu", 40.0, "--mfu is 40.0; wanted 1e-9 to 1"),
        ("pruning_mfu", 0.0, "--pruning-mfu is 0.0; wanted 1e-9 to 1"),
        ("network_gbit", -1.0, "--network-gbit is -1.0; wanted 0.001 to 1e6"),
        ("memory_reserve_gib", -1.0, "--memory-reserve-gib is -1.0; wanted 0 to 10000"),
    ],
)
def test_settings_that_mean_nothing_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig(**({"model": "llama2-7b", "gpus": 8} | {field: value}))
