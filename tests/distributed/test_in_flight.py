"""Cutting in flight: the offline path's weights bit for bit, moments that fit, and exact resume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.cut import cut
from megashear.checkpoint.description import Description, find_iteration, read_description
from megashear.checkpoint.history import runs_of
from megashear.checkpoint.shear import cut_checkpoint
from megashear.checkpoint.store import read_log_alpha
from megashear.config import (
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
)
from megashear.masks.mask_set import exact_gates
from megashear.masks.targets import target_units
from megashear.models import weight_table
from megashear.shape import ModelShape
from megashear.train import handover, in_flight, run
from tests import text_run
from tests.distributed.test_resume import finished_tensors
from tests.ranks import run_ranks
from tests.saving import save_run
from tests.text_run import TextRun, scalars
from tests.tiny import layout, relative_error

PRUNED, RECOVERED = 6, 4
"""Steps of either part."""
REDUCTION_ORDER = 1e-5
"""Relative; float32 sums over other shards in another order (law 1 b)."""
WHOLE, SPLIT, REPLICAS = (layout(), 1), (layout(tp=2, pp=2), 1), (layout(), 2)
INTERLEAVED = (layout(pp=2, vpp=2), 1)
SHARDED = (layout(use_distributed_optimizer=True), 2)


def jobs(
    text: TextRun,
    folder: Path,
    parallel: ParallelConfig,
    *,
    behind: ParallelConfig | None = None,
    bf16: bool = False,
    **train: Any,
) -> tuple[PruneRun, PretrainRun]:
    common: dict[str, Any] = {
        "parallel": parallel,
        "model": ModelConfig(bf16=bf16),
        "optimizer": OptimizerConfig(lr=1e-3, lr_warmup_iters=2),
        "data": DataConfig(data_path=str(text.data), reference_loss=str(text.reference)),
    }
    steps: dict[str, Any] = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "seq_length": text_run.SEQUENCE,
        "log_interval": 1,
        "eval_interval": 2,
        "eval_sequences": 4,
        "text_samples": 1,
    }
    # interleaved stages want a layer each
    layers = 4 if parallel.num_virtual_stages_per_pipeline_rank > 1 else 2
    target = text_run.TARGET | {"target_num_layers": layers}
    prune = PruneRun(
        **common,
        masks=MaskConfig(sparsity_warmup_iters=4, mask_noise_streams=2, **target),
        train=TrainConfig(
            **steps,
            train_iters=PRUNED,
            load=str(text.checkpoint),
            save=str(folder / "pruned"),
            resume=bool(train.get("resume")),
        ),
        then_pretrain="then.yaml",
    )
    then = PretrainRun(
        **common | {"parallel": behind or parallel},
        train=TrainConfig(
            **steps,
            train_iters=RECOVERED,
            save=str(folder / "recovered"),
            tensorboard_dir=str(folder / "events"),
            exit_interval=train.get("exit_interval", 0),
        ),
    )
    return prune, then


class Sheared(NamedTuple):
    """One job that pruned and recovered."""

    folder: Path
    cut: Path
    """Checkpoint of the cut model before its first step."""
    target: ModelShape


def shear(
    text: TextRun,
    folder: Path,
    at: tuple[ParallelConfig, int],
    broken: Callable[[], None] | None = None,
    **more: Any,
) -> Sheared:
    """Run both parts on forked ranks as torchrun would; keep the model that was cut."""
    parallel, replicas = at
    prune, then = jobs(text, folder, parallel, **more)
    world_size = parallel.model_parallel_size * replicas

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        cut_in_flight = handover.cut_in_flight

        def keep(old: Any, new: Any, gates: Any) -> None:
            cut_in_flight(old, new, gates)
            description = Description(shape=new.shape, iteration=0, stage="pretrain")
            save_run(folder / "handover", description, new.chunks, new.optimizer, new.groups)

        handover.cut_in_flight = keep
        if broken is not None:
            broken()
        run.prune(prune, then)

    run_ranks(world_size, body)
    details = read_description(folder / "pruned" / f"iter_{PRUNED:07d}").details
    return Sheared(folder, folder / "handover", ModelShape(**details["target_shape"]))


@pytest.fixture(scope="module")
def sheared(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Sheared:
    return shear(text, tmp_path_factory.mktemp("sheared"), SPLIT)


def weights_offline(pruned: Path, output: Path) -> dict[str, Tensor]:
    run_ranks(1, lambda rank: cut_checkpoint(pruned, output, exact_target=True))
    return finished_tensors(output, 0)


def same_weights(sheared: Sheared, offline: dict[str, Tensor]) -> list[str]:
    """Names of the weights that are not bit-equal."""
    just_cut = finished_tensors(sheared.cut, 0)
    assert set(offline) <= set(just_cut)
    return [name for name, weight in offline.items() if not torch.equal(just_cut[name], weight)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "at", [WHOLE, SHARDED, INTERLEAVED], ids=["whole", "sharded-dp2", "pp2-vpp2"]
)
def test_weights_equal_the_offline_path_s(
    text: TextRun, tmp_path: Path, at: tuple[ParallelConfig, int]
) -> None:
    job = shear(text, tmp_path, at)
    assert same_weights(job, weights_offline(tmp_path / "pruned", tmp_path / "cut")) == []
    if at == SHARDED:
        check_moments(job)


def test_weights_equal_the_offline_path_s_at_tp2_pp2(sheared: Sheared, tmp_path: Path) -> None:
    offline = weights_offline(sheared.folder / "pruned", tmp_path / "cut")
    assert same_weights(sheared, offline) == []


def test_the_second_run_knows_what_the_first_one_did(sheared: Sheared) -> None:
    first, second = runs_of(read_description(find_iteration(sheared.folder / "recovered")))
    assert (first.stage, first.steps, first.samples) == ("prune", PRUNED, 8 * PRUNED)
    assert (second.stage, second.steps) == ("pretrain", RECOVERED)
    assert sum(first.drawn.values()) == 8 * PRUNED
    assert second.held_out_loss["loss"].keys() == first.drawn.keys()


def in_hf_names(tensors: dict[str, Tensor], prefix: str, shape: ModelShape) -> dict[str, Tensor]:
    """Tensors of a checkpoint, layers stacked, by Hugging Face name."""
    found = {}
    for row, layer in weight_table.tensors(shape):
        whole = tensors[prefix + row.key]
        parts = weight_table.split(row, whole if layer is None else whole[layer], shape)
        for part, tensor in zip(row.parts, parts):
            found[part.hf_name.format(layer=layer)] = tensor
    return found


def test_moments_are_those_of_the_cut_weights(sheared: Sheared) -> None:
    check_moments(sheared)


def check_moments(sheared: Sheared) -> None:
    pruned = finished_tensors(sheared.folder / "pruned", PRUNED)
    just_cut = finished_tensors(sheared.cut, 0)
    source = text_run.SHAPE
    targets = target_units(source, sheared.target)
    run_dir = sheared.folder / "pruned"
    (log_alpha,) = run_ranks(1, lambda rank: read_log_alpha(run_dir))
    gates = exact_gates(log_alpha, targets)
    opened = {kind: (rows != 0).float() for kind, rows in gates.items()}
    ones = {name: torch.ones(extents) for name, extents in weight_table.hf_shapes(source).items()}
    folded = dict(cut(ones, gates, source, sheared.target))  # what multiplies each kept weight
    for moment, power in (("exp_avg", -1), ("exp_avg_sq", -2)):
        prefix = f"optimizer.state.{moment}."
        kept = dict(cut(in_hf_names(pruned, prefix, source), opened, source, sheared.target))
        found = in_hf_names(just_cut, prefix, sheared.target)
        assert kept.keys() == found.keys()
        for name, before in kept.items():
            assert relative_error(found[name], before * folded[name] ** power) < 1e-6, name
            assert before.abs().sum() > 0, name
        # the twin: moments cut like weights are not these
        wrong = [relative_error(found[n], kept[n] * folded[n]) for n in kept]
        assert max(wrong) > 0.1


def test_a_wrong_order_of_shards_is_noticed(text: TextRun, tmp_path: Path) -> None:
    def broken() -> None:
        gather = in_flight.gather_tensors
        in_flight.gather_tensors = lambda tensor, group: gather(tensor, group)[::-1]

    with pytest.raises(AssertionError, match=r"the cut model is not the one that was trained"):
        shear(text, tmp_path, SPLIT, broken)
    offline = weights_offline(tmp_path / "pruned", tmp_path / "cut")
    found = finished_tensors(tmp_path / "handover", 0)
    assert any(not torch.equal(found[name], weight) for name, weight in offline.items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("at", "behind"), [(WHOLE, None), (SPLIT, layout(pp=2))], ids=["whole", "tp2-pp2-to-pp2-dp2"]
)
def test_layouts_recover_alike(
    sheared: Sheared,
    text: TextRun,
    tmp_path: Path,
    at: tuple[ParallelConfig, int],
    behind: ParallelConfig | None,
) -> None:
    shear(text, tmp_path, at, behind=behind)
    here, there = scalars(tmp_path / "events"), scalars(sheared.folder / "events")
    for tag in ("train/lm-loss", "eval/mean-loss"):
        assert here[tag] == pytest.approx(there[tag], rel=REDUCTION_ORDER), tag


def test_a_job_is_resumed_on_either_side_of_the_handover(
    sheared: Sheared, text: TextRun, tmp_path: Path
) -> None:
    wanted = finished_tensors(sheared.folder / "recovered", RECOVERED)
    # stopped between pruning's last checkpoint and the first of what follows
    shutil.copytree(sheared.folder / "pruned", tmp_path / "handover" / "pruned")
    shear(text, tmp_path / "handover", SPLIT, resume=True)
    # stopped while it recovers
    half = tmp_path / "half"
    shutil.copytree(sheared.folder / "pruned", half / "pruned")
    shear(text, half, SPLIT, resume=True, exit_interval=RECOVERED // 2)
    prune, then = jobs(text, half, SPLIT[0], resume=True)
    assert [path.name for path in (half / "recovered").glob("iter_*")] == ["iter_0000002"]

    def go_on(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4"}
        run.prune(prune, then)

    run_ranks(4, go_on)
    for folder in (tmp_path / "handover", half):
        found = finished_tensors(folder / "recovered", RECOVERED)
        assert found.keys() == wanted.keys()
        different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        assert different == []
        lineage = read_description(folder / "recovered" / f"iter_{RECOVERED:07d}").lineage
        assert lineage["source_shape"] == text_run.SHAPE.to_dict()
        assert lineage["pruned_for"] == PRUNED
        assert lineage["rounding"].keys() == {"group", "head", "intermediate", "hidden", "layer"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("at", [(layout(tp=2), 1), SHARDED], ids=["tp2", "sharded-dp2"])
def test_float32_masters_are_cut_under_bf16(
    text: TextRun, tmp_path: Path, at: tuple[ParallelConfig, int]
) -> None:
    job = shear(text, tmp_path, at, bf16=True)
    found = finished_tensors(job.cut, 0)
    masters = {
        name.removeprefix("optimizer.state.fp32_param."): tensor
        for name, tensor in found.items()
        if ".fp32_param." in name
    }
    assert masters
    for name, master in masters.items():
        assert torch.equal(found[name], master.bfloat16()), name
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
    # offline too it is the masters that are cut
    offline = weights_offline(tmp_path / "pruned", tmp_path / "cut")
    assert offline.keys() == masters.keys()
    assert [name for name in offline if not torch.equal(offline[name], masters[name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda prune, then: (prune, replace(then, parallel=layout(tp=2))),
            r"world size 1 is not a multiple of --tensor-model-parallel-size",
        ),
        (
            lambda prune, then: (prune, replace(then, model=ModelConfig(bf16=True))),
            r"bf16 is True, pruning has False",
        ),
        (
            lambda prune, then: (prune, replace(then, init_shape="llama2-1.3b")),
            r"init_shape is llama2-1.3b, but it begins with the model that was pruned",
        ),
        (
            lambda prune, then: (prune, replace(then, train=replace(then.train, load="x"))),
            r"load is x, but it begins with the model that was pruned",
        ),
        (
            lambda prune, then: (
                replace(prune, train=replace(prune.train, tensorboard_dir="same")),
                replace(then, train=replace(then.train, tensorboard_dir="./same")),
            ),
            r"tensorboard_dir is ./same, that of pruning",
        ),
        (
            lambda prune, then: (
                replace(prune, train=replace(prune.train, jsonl_log="run.jsonl")),
                replace(then, train=replace(then.train, jsonl_log="./run.jsonl")),
            ),
            r"jsonl_log is ./run.jsonl, that of pruning, whose lines begin at the same steps",
        ),
        (
            lambda prune, then: (replace(prune, train=replace(prune.train, save=None)), then),
            r"needs --save",
        ),
        (
            lambda prune, then: (
                prune,
                replace(then, train=replace(then.train, save=prune.train.save)),
            ),
            r"the directory of pruning; choose another",
        ),
        (
            lambda prune, then: (
                prune,
                replace(then, model=ModelConfig(transformer_impl="transformer_engine")),
            ),
            r"the model is cut into local layers",
        ),
    ],
)
def test_what_cannot_follow_is_refused_before_pruning(
    text: TextRun, tmp_path: Path, change: Any, message: str
) -> None:
    prune, then = change(*jobs(text, tmp_path, layout()))
    with pytest.raises(ValueError, match=message):
        run.prune(prune, then)
    assert list(tmp_path.iterdir()) == []
