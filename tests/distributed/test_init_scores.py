"""--init-scores: masks begin from the scores at every layout, and a resumed run keeps its masks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.__main__ import main
from megashear.checkpoint.description import find_iteration, read_description
from megashear.checkpoint.scores import ImportanceScores, fingerprint
from megashear.checkpoint.shear import cut_checkpoint
from megashear.checkpoint.store import read_log_alpha
from megashear.config import ParallelConfig, PruneRun
from megashear.masks.kinds import KINDS
from megashear.masks.mask_set import MaskSet
from megashear.parallel.launch import distributed
from megashear.train.build import assemble
from megashear.train.prepare import prepare, settle
from megashear.train.pruning import StructuredPruning
from tests.distributed.test_resume import configuration, start
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.text_run import SHAPE, TARGET, TextRun
from tests.tiny import layout
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)


def random_scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.rand(kind.extents(SHAPE), generator=generator, dtype=torch.float64)
        for name, kind in KINDS.items()
    }


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    ImportanceScores(
        shape=SHAPE,
        values=random_scores(),
        fingerprint=fingerprint(random_weights(SHAPE, scale=0.1)),
        measured={"sequences": 5},
    ).write(path)
    return path


def configured(
    text: TextRun, folder: Path, scores: Path | None, parallel: ParallelConfig | None = None
) -> PruneRun:
    config = configuration(text, "prune", parallel or layout(), folder)
    assert isinstance(config, PruneRun)
    masks = replace(config.masks, init_scores=None if scores is None else str(scores))
    return replace(config, masks=masks, train=replace(config.train, train_iters=4, eval_interval=0))


def first_masks(
    config: PruneRun, replicas: int = 1, broken: Callable[[], None] | None = None
) -> list[dict[str, Tensor]]:
    """Whole log_alpha before the first step, of every rank."""
    world_size = config.parallel.model_parallel_size * replicas

    def body(rank: int) -> dict[str, Tensor]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if broken is not None:
            broken()
        prepared = prepare(config)
        with distributed(config.parallel, config.model) as groups:
            trainer = assemble(settle(prepared, groups), groups, command=[])
            assert isinstance(trainer.objective, StructuredPruning)
            return trainer.objective.binding.gather_log_alpha()

    return run_ranks(world_size, body)


def wanted_masks() -> dict[str, Tensor]:
    """log 100 for the best of a row, 1.5 less for the worst, even steps between; by hand."""
    shapes = {
        "hidden": (1, SHAPE.hidden_size),
        "head": (SHAPE.num_layers * 4, 2),
        "group": (SHAPE.num_layers, 4),
        "intermediate": (SHAPE.num_layers, SHAPE.ffn_hidden_size),
        "layer": (1, SHAPE.num_layers),
    }
    found = {}
    for kind, extents in shapes.items():
        rows = random_scores()[kind].reshape(extents)
        above = (rows[:, None, :] > rows[:, :, None]).sum(dim=2)  # units with a higher score
        found[kind] = torch.tensor(100.0).log() - 1.5 * above / (extents[1] - 1)
    return found


@pytest.mark.parametrize(
    ("parallel", "replicas"),
    [
        (layout(), 1),
        (layout(tp=2), 1),
        (layout(pp=2, vpp=2), 1),
        (layout(), 2),
        (layout(tp=2, pp=2, sp=True), 1),
    ],
    ids=["whole", "tp2", "pp2-vpp2", "dp2", "tp2-pp2-sp"],
)
def test_masks_begin_from_the_scores_at_every_layout(
    text: TextRun, scores: Path, tmp_path: Path, parallel: ParallelConfig, replicas: int
) -> None:
    for found in first_masks(configured(text, tmp_path, scores, parallel), replicas):
        assert found.keys() == wanted_masks().keys()
        for kind, mask in wanted_masks().items():
            assert torch.allclose(found[kind], mask, rtol=1e-6), kind  # one rounding
    # the twin
    alike, *_ = first_masks(configured(text, tmp_path, None))
    assert all((mask == mask.flatten()[0]).all() for mask in alike.values())


def test_a_part_of_another_rank_is_noticed(text: TextRun, scores: Path, tmp_path: Path) -> None:
    def broken() -> None:
        def first_part(masks: MaskSet, whole: dict[str, Tensor]) -> None:
            with torch.no_grad():
                for kind, mask in masks.log_alpha.items():
                    mask.copy_(whole[kind][: mask.size(0), : mask.size(1)])

        MaskSet.start_from = first_part  # type: ignore[assignment, method-assign]

    found, *_ = first_masks(configured(text, tmp_path, scores, layout(tp=2, pp=2)), broken=broken)
    wanted = wanted_masks()
    assert torch.allclose(found["hidden"], wanted["hidden"])  # every rank holds all of it
    for kind in ("head", "group", "intermediate", "layer"):
        assert (found[kind] - wanted[kind]).abs().max() > 0.1, kind


def test_a_resumed_run_keeps_its_masks_and_where_they_are_from(
    text: TextRun, scores: Path, tmp_path: Path
) -> None:
    own = shutil.copy(scores, tmp_path / "scores.json")
    whole = configured(text, tmp_path / "whole", own)
    start(whole, 1)
    config = configured(text, tmp_path / "parts", own)
    start(replace(config, train=replace(config.train, exit_interval=2)), 1)
    Path(own).unlink()  # as the source, it need not be there any more
    start(replace(config, train=replace(config.train, resume=True)), 1)
    directory = find_iteration(tmp_path / "parts" / "saved")
    saved = read_description(directory)
    assert saved.iteration == 4
    origin = saved.known.importance_scores
    assert (origin["sequences"], origin["file"]) == (5, str(own))
    again = read_log_alpha(directory)
    for kind, mask in read_log_alpha(find_iteration(tmp_path / "whole" / "saved")).items():
        assert torch.equal(again[kind], mask), kind
    # and so does what is cut of it
    run_ranks(1, lambda rank: cut_checkpoint(directory, tmp_path / "cut", exact_target=True))
    cut = read_description(find_iteration(tmp_path / "cut"))
    assert cut.lineage["importance_scores"] == origin
    # the report has it
    assert main(["report", str(tmp_path / "parts" / "saved")]) == 0
    page = (tmp_path / "parts" / "saved" / "report.html").read_text()
    assert "Its masks began from importance scores on 5 sequences" in page
    # flags that go on with a run and begin it are refused together
    other = replace(whole.train, load=str(directory), save=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"--init-scores \S+ is for masks that begin, and --load "):
        prepare(replace(whole, train=other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shape": replace(SHAPE, ffn_hidden_size=80)},
            "is of a model with ffn_hidden_size 80, an",
        ),
        ({"fingerprint": "0" * 64}, r"--init-scores \S+ is of another model of the same shape"),
    ],
)
def test_scores_of_another_model_are_refused(
    text: TextRun, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shape = change.get("shape", SHAPE)
    values = {name: torch.ones(kind.extents(shape)) for name, kind in KINDS.items()}
    given: dict[str, Any] = {"shape": shape, "values": values} | change
    ImportanceScores(**given).write(tmp_path / "scores.json")
    with pytest.raises(ValueError, match=message):
        prepare(configured(text, tmp_path, tmp_path / "scores.json"))
    assert TARGET["target_ffn_hidden_size"] < 80  # of which there could be a target
