"""Law 4: n steps, a checkpoint and n more steps are 2n steps; bit-equal at the same layout."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megashear.checkpoint import store
from megashear.checkpoint.description import read_description
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
from megashear.files import integrity
from megashear.masks.kinds import KINDS
from megashear.masks.mask_set import expected_gates
from megashear.train import run
from megashear.train import state as run_state
from tests import text_run
from tests.iterations import copy_iteration
from tests.ranks import run_ranks
from tests.text_run import TextRun
from tests.tiny import layout

HALF = 3
"""Steps before the checkpoint, and after it."""
WHOLE = 2 * HALF
REDUCTION_ORDER = 1e-5
"""Relative; float32 sums over other shards in another order (law 1 b)."""
FREE_RUNNING = 1e-3
"""Absolute, on log_alpha: Adam at rate 1.0 turns rounding of nearly cancelled gradients into
steps (law 1 b)."""

ALONE, SPLIT, REPLICAS = (layout(), 1), (layout(tp=2, pp=2), 1), (layout(), 2)
INTERLEAVED, SEQUENCE_PARALLEL = (layout(pp=2, vpp=2), 1), (layout(tp=2, sp=True), 2)
"""Layouts: how a replica is divided, and how many replicas there are."""


class Finished(NamedTuple):
    """Everything a run left behind."""

    tensors: dict[str, Tensor]
    """All tensors of the last checkpoint: weights, moments, masks, multipliers."""
    counts: dict[str, Any]
    """Plain values of the last checkpoint: scheduler, mixture, steps, held-out losses."""
    adam_steps: list[int]
    """Steps that each optimizer of the weights has counted."""
    points: dict[str, dict[int, float]]
    """TensorBoard by tag and step, of the second half; measured speeds left out."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "parallel", "replicas"),
    [
        pytest.param("prune", *ALONE, id="prune-whole"),
        pytest.param("prune", *SPLIT, id="prune-tp2-pp2"),
        pytest.param("prune", *REPLICAS, id="prune-dp2"),
        pytest.param("lagrangian", *SPLIT, id="lagrangian-tp2-pp2"),
        pytest.param("pretrain", *SPLIT, id="pretrain-tp2-pp2"),
        pytest.param("pretrain", *REPLICAS, id="pretrain-dp2"),
    ],
)
def test_a_resumed_run_is_bit_equal(
    runs: Runs,
    tmp_path: Path,
    stage: str,
    parallel: ParallelConfig,
    replicas: int,
) -> None:
    whole = runs.uninterrupted(stage, parallel, replicas)
    resumed = go_on(runs.stopped(stage, parallel, replicas), tmp_path)
    assert differences(resumed, whole) == set()
    shares = whole.counts["loader"]["mixture"]["weights"]
    start = whole.points["mix/weight/numbers"][HALF + 1]
    assert abs(shares[-1] - start) > 0.01, "no evaluation moved the mixture in the second half"


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        pytest.param("prune", SPLIT, ALONE, id="prune-tp2-pp2-to-whole"),
        pytest.param("prune", REPLICAS, INTERLEAVED, id="prune-dp2-to-pp2-vpp2"),
        pytest.param("lagrangian", SPLIT, ALONE, id="lagrangian-tp2-pp2-to-whole"),
        pytest.param("pretrain", SPLIT, SEQUENCE_PARALLEL, id="pretrain-tp2-pp2-to-tp2-sp-dp2"),
    ],
)
def test_a_run_resumed_at_another_layout_stays_close(
    runs: Runs,
    tmp_path: Path,
    stage: str,
    before: tuple[ParallelConfig, int],
    after: tuple[ParallelConfig, int],
) -> None:
    whole = runs.uninterrupted(stage, *before)
    resumed = go_on(runs.stopped(stage, *before), tmp_path, at=after)
    for tag in ("train/lm-loss", "eval/mean-loss", "eval/loss/paths", "mix/weight/numbers"):
        assert resumed.points[tag] == pytest.approx(whole.points[tag], rel=REDUCTION_ORDER), tag
    assert resumed.counts["scheduler"] == whole.counts["scheduler"]
    assert (
        resumed.counts["loader"]["mixture"]["drawn"] == whole.counts["loader"]["mixture"]["drawn"]
    )
    multipliers = [name for name in whole.tensors if name.startswith("masks.lambda")]
    assert bool(multipliers) == (stage != "pretrain")
    for name in multipliers:
        assert resumed.tensors[name] == pytest.approx(
            whole.tensors[name], rel=REDUCTION_ORDER, abs=REDUCTION_ORDER
        ), name
    for name, log_alpha in whole.tensors.items():
        if name.endswith(".log_alpha"):
            found = resumed.tensors[name]
            assert (found - log_alpha).abs().max() < FREE_RUNNING, name
            rows = {"here": found.reshape(-1, found.shape[-1])}
            wanted = {"here": log_alpha.reshape(-1, log_alpha.shape[-1])}
            opened = [expected_gates(masks)["here"] > 0 for masks in (rows, wanted)]
            assert torch.equal(*opened), name


def test_flags_of_a_resumed_run_count(runs: Runs, tmp_path: Path) -> None:
    interrupted = runs.stopped("pretrain", *SPLIT)
    slower = interrupted._replace(
        config=lambda at, here: replace(
            interrupted.config(at, here), optimizer=OptimizerConfig(lr=1e-4, lr_warmup_iters=2)
        ),
    )
    here, whole = go_on(slower, tmp_path), runs.uninterrupted("pretrain", *SPLIT)
    logged = here.points["train/learning-rate"]
    wanted = whole.points["train/learning-rate"]
    assert logged == {step: pytest.approx(rate / 10) for step, rate in wanted.items()}
    # and used: weights that move a tenth as fast stay nearer to where they were
    start = finished_tensors(interrupted.saved, HALF)
    name = "output_layer.weight"
    moved = [(run.tensors[name] - start[name]).norm() for run in (here, whole)]
    assert moved[0] < moved[1] / 5


def disturb_generators() -> None:
    """Leave every global generator in a state that no run has saved."""
    load = store.load_run

    def disturbing(*args: Any, **more: Any) -> Any:
        description = load(*args, **more)
        torch.manual_seed(987)
        np.random.seed(987)
        random.seed(987)
        return description

    run_state.load_run = disturbing


def test_no_generator_needs_to_be_saved(runs: Runs, tmp_path: Path) -> None:
    whole = runs.uninterrupted("prune", *ALONE)
    resumed = go_on(runs.stopped("prune", *ALONE), tmp_path, broken=disturb_generators)
    assert differences(resumed, whole) == set()


def test_batch_and_sequence_may_change(runs: Runs, tmp_path: Path) -> None:
    interrupted = runs.stopped("pretrain", *SPLIT)

    def changed(at: ParallelConfig, here: Path) -> PruneRun | PretrainRun:
        config = interrupted.config(at, here)
        train = replace(config.train, global_batch_size=4, seq_length=text_run.SEQUENCE // 2)
        return replace(config, train=train)

    def listen() -> None:
        log = logging.FileHandler(tmp_path / f"log-{os.environ['RANK']}")
        logging.getLogger("megashear").addHandler(log)

    here = go_on(interrupted._replace(config=changed), tmp_path, broken=listen)
    assert here.counts["consumed_samples"] == HALF * 8 + HALF * 4
    assert here.adam_steps == [WHOLE]
    # steps are what the schedule counts
    whole = runs.uninterrupted("pretrain", *SPLIT)
    assert here.points["train/learning-rate"] == whole.points["train/learning-rate"]
    told = (tmp_path / "log-0").read_text()
    assert "--global-batch-size was 8 in the saved run and is 4 now" in told
    assert "the learning rate jumps" not in told  # its flags are the same
    assert f"resume from {HALF}; 24 samples are read, 12 more will be in the 3 steps" in told
    assert f"--seq-length was {text_run.SEQUENCE} in the saved run" in told


def test_a_rate_that_jumps_in_a_longer_run_is_told_with_both_rates(
    runs: Runs, tmp_path: Path
) -> None:
    interrupted = runs.stopped("prune", *ALONE)
    shutil.copytree(interrupted.saved, tmp_path / "saved")
    config = interrupted.config(ALONE[0], tmp_path)
    longer = replace(config, train=replace(config.train, train_iters=WHOLE + HALF))

    def listen() -> None:
        logging.getLogger("megashear").addHandler(logging.FileHandler(tmp_path / "log"))

    start(longer, 1, listen)
    whole = runs.uninterrupted("prune", *ALONE).points  # of the schedule that was given up
    resumed = text_run.scalars(tmp_path / "events")
    before, now = (points["train/learning-rate"][HALF + 1] for points in (whole, resumed))
    assert now > 1.1 * before
    assert (
        f"the learning rate jumps at step {HALF} from {before:.4g}, where the saved run left it, "
        f"to {now:.4g}: --train-iters was {WHOLE} and is {WHOLE + HALF}; --lr-decay-iters {WHOLE} "
        f"keeps the decay that the saved run had"
    ) in (tmp_path / "log").read_text()


def test_phases_that_count_tokens_want_one_sequence_length(runs: Runs, tmp_path: Path) -> None:
    interrupted = runs.stopped("pretrain", *SPLIT)
    phases = tmp_path / "phases.yaml"
    weights = {"words": 0.5, "paths": 0.25, "numbers": 0.25}
    phases.write_text(json.dumps([{"start_token": 0, "weights": weights}]))
    config = interrupted.config(SPLIT[0], tmp_path)
    shutil.copytree(interrupted.saved, tmp_path / "saved")
    data = DataConfig(
        data_path=config.data.data_path, domain_phases=str(phases), reweight="schedule"
    )
    train = replace(config.train, seq_length=text_run.SEQUENCE // 2)
    with pytest.raises(AssertionError, match=r"--domain-phases begin at tokens.*start_step or"):
        start(replace(config, data=data, train=train), SPLIT[1])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage", ["prune", "pretrain"])
def test_a_bfloat16_run_is_resumed_with_its_masters(
    text: TextRun, tmp_path: Path, stage: str
) -> None:
    def bf16(folder: Path, **train: Any) -> PruneRun | PretrainRun:
        config = configuration(text, stage, layout(tp=2), folder, **train)
        return replace(config, model=ModelConfig(bf16=True))

    start(bf16(tmp_path / "whole"), 1)
    start(bf16(tmp_path / "halves", exit_interval=HALF), 1)
    start(bf16(tmp_path / "halves", resume=True), 1)
    whole, halves = finished(tmp_path / "whole"), finished(tmp_path / "halves")
    assert differences(halves, whole) == set()
    masters = [tensor for name, tensor in whole.tensors.items() if ".fp32_param." in name]
    assert masters
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters)


def unnamed_constraint(details: dict[str, Any]) -> None:
    """As checkpoints of before, which had the Lagrangian alone."""
    del details["run"]["masks"]["constraint"]


@pytest.mark.parametrize(
    ("edit", "asked", "is_same"),
    [
        pytest.param(None, None, True, id="saved"),
        pytest.param(unnamed_constraint, None, True, id="of-before"),
        pytest.param(None, "projection", False, id="another"),
    ],
)
def test_a_resumed_run_keeps_its_constraint(
    runs: Runs, tmp_path: Path, edit: Any, asked: Any, is_same: bool
) -> None:
    interrupted = runs.stopped("lagrangian", *ALONE)

    def config(at: ParallelConfig, here: Path) -> PruneRun | PretrainRun:
        found = interrupted.config(at, here)
        assert isinstance(found, PruneRun)
        return replace(found, masks=replace(found.masks, constraint=asked))

    resumed = go_on(
        interrupted._replace(config=config), tmp_path, edit=edit and in_description(edit)
    )
    whole = runs.uninterrupted("lagrangian", *ALONE)
    differing = {name for name in whole.points if resumed.points.get(name) != whole.points[name]}
    assert (differing == set()) == is_same
    assert ("prune/penalty" in resumed.points) == is_same


def test_another_precision_is_not_gone_on_with(runs: Runs, tmp_path: Path) -> None:
    interrupted = runs.stopped("pretrain", *SPLIT)
    config = interrupted.config(SPLIT[0], tmp_path)
    shutil.copytree(interrupted.saved, tmp_path / "saved")
    with pytest.raises(AssertionError, match=r"was trained without --bf16, and its optimizer"):
        start(replace(config, model=ModelConfig(bf16=True)), SPLIT[1])


def test_a_save_that_was_never_named_does_not_stop_the_next(runs: Runs, tmp_path: Path) -> None:
    def killed_before_naming(saved: Path) -> None:
        copy_iteration(saved / f"iter_{HALF:07d}", WHOLE)

    whole = runs.uninterrupted("pretrain", *SPLIT)
    resumed = go_on(runs.stopped("pretrain", *SPLIT), tmp_path, edit=killed_before_naming)
    assert differences(resumed, whole) == set()
    assert (tmp_path / "saved" / f".iter_{WHOLE:07d}.unnamed").is_dir()


def in_description(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the plain values of a checkpoint."""

    def edit(saved: Path) -> None:
        (path,) = saved.glob("iter_*/megashear.json")
        values = json.loads(path.read_text())
        change(values["details"])
        path.write_text(json.dumps(values))
        integrity.write(path.parent)

    return edit


FORGOTTEN_VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mask steps": lambda details: details.update(mask_optimizer_steps=0),
    "owed": lambda details: details["loader"]["mixture"].update(owed=[0.0, 0.0, 0.0]),
    "mixture weights": lambda details: details["loader"]["mixture"].update(weights=[0.2, 0.3, 0.5]),
    "samples drawn": lambda details: details["loader"]["mixture"].update(drawn=[0, 0, 0]),
    "scheduler": lambda details: details["scheduler"].update(num_steps=0),
}


def forget_weight_moments() -> None:
    load = store.load_run

    def forgetful(checkpoint: Any, chunks: Any, optimizer: Any, groups: Any, *, masks: Any) -> Any:
        description = load(checkpoint, chunks, optimizer, groups, masks=masks)
        for _, state in optimizer.state.items():  # ChainedOptimizer has no values()
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        return description

    run_state.load_run = forgetful  # type: ignore[assignment]


def forget_masks(pick: Callable[[store.MaskState], dict[str, Tensor]]) -> Callable[[], None]:
    def forget() -> None:
        fill = store._fill_masks

        def forgetful(state: store.MaskState, loaded: dict[str, Tensor]) -> None:
            fill(state, loaded)
            for tensor in pick(state).values():
                tensor.zero_()

        store._fill_masks = forgetful

    return forget


FORGOTTEN_TENSORS = {
    "moments of the weights": forget_weight_moments,
    "moments of the masks": forget_masks(lambda state: state.optimizer.state_tensors()),
    "multipliers": forget_masks(lambda state: state.constraint.state_dict()),
    "log_alpha": forget_masks(lambda state: state.masks.state_dict()),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("forgotten", [*FORGOTTEN_VALUES, *FORGOTTEN_TENSORS])
def test_a_run_that_forgets_one_thing_is_noticed(
    runs: Runs, tmp_path: Path, forgotten: str
) -> None:
    stage = "lagrangian" if forgotten == "multipliers" else "prune"
    whole = runs.uninterrupted(stage, *ALONE)
    interrupted = runs.stopped(stage, *ALONE)
    if forgotten in FORGOTTEN_VALUES:
        edit = in_description(FORGOTTEN_VALUES[forgotten])
        resumed = go_on(interrupted, tmp_path, edit=edit)
    else:
        resumed = go_on(interrupted, tmp_path, broken=FORGOTTEN_TENSORS[forgotten])
    weights = {name for name in whole.tensors if name.startswith("decoder.")}
    assert differences(resumed, whole) & weights


def test_a_run_that_forgets_the_sides_of_its_gates_counts_other_churn(
    runs: Runs, tmp_path: Path
) -> None:
    forget = forget_masks(lambda state: state.sides.state_dict())
    resumed = go_on(runs.stopped("prune", *ALONE), tmp_path, broken=forget)
    found = differences(resumed, runs.uninterrupted("prune", *ALONE))
    assert found == {f"prune/churn/{kind}" for kind in KINDS}


class Interrupted(NamedTuple):
    """A run that stopped half way."""

    saved: Path
    """Its --save directory."""
    config: Callable[..., PruneRun | PretrainRun]
    """Makes its configuration with another layout, --save and --tensorboard-dir."""
    at: tuple[ParallelConfig, int]


def configuration(
    text: TextRun, stage: str, parallel: ParallelConfig, folder: Path, **train: Any
) -> PruneRun | PretrainRun:
    common: dict[str, Any] = {
        "parallel": parallel,
        "train": TrainConfig(
            train_iters=WHOLE,
            global_batch_size=8,
            micro_batch_size=2,
            seq_length=text_run.SEQUENCE,
            log_interval=1,
            eval_interval=2,
            eval_sequences=4,
            save=str(folder / "saved"),
            load=str(text.checkpoint),
            tensorboard_dir=str(folder / "events"),
            **{"text_samples": 0, **train},
        ),
        "optimizer": OptimizerConfig(lr=1e-3, lr_warmup_iters=2),
        "data": DataConfig(data_path=str(text.data), reference_loss=str(text.reference)),
    }
    if stage == "pretrain":
        return PretrainRun(**common)
    masks = MaskConfig(
        constraint="lagrangian" if stage == "lagrangian" else "projection",
        **{"sparsity_warmup_iters": 4, "mask_noise_streams": 2, **text_run.TARGET},
    )
    return PruneRun(**common, masks=masks)


def start(
    config: PruneRun | PretrainRun, replicas: int, broken: Callable[[], None] | None = None
) -> None:
    """Run the command's function on forked ranks as torchrun would."""
    world_size = config.parallel.model_parallel_size * replicas

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if broken is not None:
            broken()
        if isinstance(config, PruneRun):
            run.prune(config)
        else:
            run.pretrain(config)

    run_ranks(world_size, body)


class Runs:
    """Runs that several tests compare with, each made once."""

    def __init__(self, text: TextRun, factory: pytest.TempPathFactory) -> None:
        self.text, self.factory = text, factory
        self._uninterrupted: dict[Any, Finished] = {}
        self._stopped: dict[Any, Interrupted] = {}

    def uninterrupted(self, stage: str, parallel: ParallelConfig, replicas: int) -> Finished:
        key = (stage, parallel, replicas)
        if key not in self._uninterrupted:
            folder = self.factory.mktemp("uninterrupted")
            start(configuration(self.text, stage, parallel, folder), replicas)
            self._uninterrupted[key] = finished(folder)
        return self._uninterrupted[key]

    def stopped(self, stage: str, parallel: ParallelConfig, replicas: int) -> Interrupted:
        key = (stage, parallel, replicas)
        if key not in self._stopped:
            folder = self.factory.mktemp("stopped")
            start(configuration(self.text, stage, parallel, folder, exit_interval=HALF), replicas)
            saved = folder / "saved"
            assert [path.name for path in saved.glob("iter_*")] == [f"iter_{HALF:07d}"]
            self._stopped[key] = Interrupted(
                saved=saved,
                config=lambda at, here: configuration(self.text, stage, at, here, resume=True),
                at=(parallel, replicas),
            )
        return self._stopped[key]


@pytest.fixture(scope="module")
def runs(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(text, tmp_path_factory)


def go_on(
    interrupted: Interrupted,
    folder: Path,
    *,
    at: tuple[ParallelConfig, int] | None = None,
    edit: Callable[[Path], None] | None = None,
    broken: Callable[[], None] | None = None,
) -> Finished:
    """Resume a copy of a stopped run, at its own layout unless ``at`` gives another."""
    shutil.copytree(interrupted.saved, folder / "saved")
    if edit is not None:
        edit(folder / "saved")
    parallel, replicas = at or interrupted.at
    start(interrupted.config(parallel, folder), replicas, broken)
    return finished(folder)


def finished_tensors(saved: Path, step: int) -> dict[str, Tensor]:
    directory = saved / f"iter_{step:07d}"
    metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    distributed_checkpoint.load(tensors, checkpoint_id=directory, no_dist=True)
    return tensors


def finished(folder: Path) -> Finished:
    directory = folder / "saved" / f"iter_{WHOLE:07d}"
    tensors = finished_tensors(folder / "saved", WHOLE)
    details = dict(read_description(directory).details)
    del details["run"]  # says where things lie
    common = torch.load(directory / "common.pt", weights_only=False)
    points = {
        tag: {step: value for step, value in of_tag.items() if step > HALF}
        for tag, of_tag in text_run.scalars(folder / "events").items()
        if not tag.startswith("system/")
    }
    return Finished(tensors, details, adam_steps(common), points)


def adam_steps(common: Any) -> list[int]:
    """Every count of steps, in order."""
    if isinstance(common, dict):
        own = [int(common[key]) for key in ("step", "common_step") if key in common]
        return own + [step for value in common.values() for step in adam_steps(value)]
    if isinstance(common, list):
        return [step for value in common for step in adam_steps(value)]
    return []


def differences(here: Finished, there: Finished) -> set[str]:
    """Names of what is not bit-equal."""
    assert here.tensors.keys() == there.tensors.keys()
    found = {n for n, tensor in there.tensors.items() if not torch.equal(here.tensors[n], tensor)}
    for field in ("counts", "points"):
        ours, theirs = getattr(here, field), getattr(there, field)
        assert ours.keys() == theirs.keys()
        found |= {name for name in theirs if ours[name] != theirs[name]}
    return found | ({"Adam steps"} if here.adam_steps != there.adam_steps else set())
