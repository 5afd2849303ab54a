"""Every shipped script and YAML file is a run that the real commands accept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megashear.__main__ import COMMANDS, main
from megashear.commands.settings import build, settings_of
from megashear.config import FinetuneRun, PlanConfig, PretrainRun, PruneRun, check_streams
from megashear.data.reference_loss import read_reference
from megashear.masks.target_flags import target_shape
from megashear.masks.targets import whole_parts
from megashear.models.llama import check_layout
from megashear.planning.jobs import make_plans
from megashear.planning.memory import checkpoint_bytes
from megashear.planning.tables import Plan
from megashear.shape import PRESETS, ModelShape
from megashear.train.target import check_target_layout
from tests.published_losses import PUBLISHED_DOMAINS, REFERENCE_LOSSES
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(EXAMPLES.glob("llama2_*"))
SCRIPTS = sorted(EXAMPLES.glob("*/*.sh"))
STEPS = [script for script in SCRIPTS if script.name.startswith("0")]
SOURCED = ("settings.sh", "model.sh", "environment.sh")
SETTINGS = [script for script in SCRIPTS if script.name in SOURCED]
"""Sourced by others."""
RUNS = {"prune": PruneRun, "pretrain": PretrainRun, "finetune": FinetuneRun}
YAMLS = [path for path in sorted(EXAMPLES.glob("*/*.yaml")) if path.stem in RUNS]
PUBLISHED = [path for path in YAMLS if path.parent in FOLDERS and path.stem != "finetune"]
GROUPED = EXAMPLES / "llama3.1_8b_to_3.6b"
LLAMA_3_1_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=14336,
    vocab_size=128256,
)
"""Source: Llama 3 (arXiv:2407.21783), table 3."""
GPUS = 8
"""What the layouts of the YAML files are meant for."""

# Starting weights as published, in the order of PUBLISHED_DOMAINS. Source: docs/algorithm.md
# section 6.
PUBLISHED_WEIGHTS = {
    "prune": (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15),
    "pretrain": (0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845),
}


def in_folders(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def run_of(path: Path, **changed: Any) -> Any:
    """Return the run that a YAML file describes."""
    values = {"data_path": "data", **yaml.safe_load(path.read_text()), **changed}
    return build(RUNS[path.stem], values)


def target_of(path: Path) -> str:
    """Return the preset that an example's folder is about."""
    return path.parent.name.replace("llama2_7b_to_", "llama2-")


def test_there_are_examples() -> None:
    assert len(FOLDERS) == 2
    assert len(STEPS) == 8
    assert len(RECIPES) == 3
    assert len(YAMLS) == 7


@pytest.mark.parametrize("path", YAMLS, ids=in_folders)
def test_a_yaml_file_is_a_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([path.stem, "--config", str(path), "--data-path", "data", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert (
        "error: --data-path data does not exist" in err
    )  # which comes after the run is understood
    printed = yaml.safe_load(out)
    given = yaml.safe_load(path.read_text())
    assert {key: printed[key] for key in given} == given


def test_a_misspelt_key_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "prune.yaml"
    broken.write_text(PUBLISHED[-1].read_text() + "\nsparsity_warmup_iter: 640\n")
    assert main(["prune", "--config", str(broken), "--data-path", "data", "--dry-run"]) == 2
    assert "nearest known: sparsity_warmup_iters" in capsys.readouterr().err


@pytest.mark.parametrize("path", PUBLISHED, ids=in_folders)
def test_weights_are_the_published_ones_in_the_order_of_the_data(path: Path) -> None:
    given = dict(zip(sorted(PUBLISHED_DOMAINS), run_of(path).data.domain_weights))
    assert given == dict(zip(PUBLISHED_DOMAINS, PUBLISHED_WEIGHTS[path.stem]))


@pytest.mark.parametrize("folder", FOLDERS, ids=in_folders)
def test_references_are_the_published_ones(folder: Path) -> None:
    size = folder.name.rpartition("_")[2].upper()
    found = read_reference(folder / "reference_loss.yaml", PUBLISHED_DOMAINS)
    assert tuple(found) == REFERENCE_LOSSES[size]


@pytest.mark.parametrize("path", PUBLISHED, ids=in_folders)
def test_a_layout_divides_the_model_and_the_batch(path: Path) -> None:
    run = run_of(path)
    check_layout(PRESETS["llama2-7b" if path.stem == "prune" else target_of(path)], run.parallel)
    replicas = run.parallel.data_parallel_size(GPUS)
    assert run.train.num_microbatches(replicas) >= 1
    if path.stem == "prune":
        assert run.masks.target == target_of(path)
        check_streams(
            run.masks.mask_noise_streams,
            global_batch_size=run.train.global_batch_size,
            micro_batch_size=run.train.micro_batch_size,
        )


SOURCES = {"llama2": "llama2-7b", "llama3.1": "llama3.1-8b"}
RECIPES = sorted({path.parent for path in YAMLS})


def plans(folder: Path, gpu: str, *, any_layout: bool = False) -> list[Plan]:
    """Return the plans of a recipe's two runs."""
    prune, pretrain = run_of(folder / "prune.yaml"), run_of(folder / "pretrain.yaml")
    name = SOURCES[folder.name.partition("_")[0]]
    config = PlanConfig(model=name, gpus=GPUS, gpu=gpu, any_layout=any_layout)
    target = target_shape(prune.masks, PRESETS[name])
    return make_plans(config, PRESETS[name], target, prune=prune, pretrain=pretrain)


@pytest.mark.parametrize("folder", RECIPES, ids=in_folders)
def test_a_recipe_has_the_layout_that_is_planned_to_be_fastest(folder: Path) -> None:
    for own, best in zip(plans(folder, "A100-80G"), plans(folder, "A100-80G", any_layout=True)):
        (held,), first = own.candidates, best.candidates[0]
        assert held.flags(own.job) == first.flags(best.job)
        assert held.memory == first.memory
        assert own.job.keep == 2
        # the twin: other layouts are there
        assert len(best.candidates) > 10


@pytest.mark.parametrize("folder", RECIPES, ids=in_folders)
def test_the_figures_of_a_recipe_are_those_planned(folder: Path) -> None:
    assert set(figures(folder)) <= set((EXAMPLES / "README.md").read_text().splitlines())


def figures(folder: Path) -> list[str]:
    """Return a recipe's rows of the table in the README of the examples."""
    rows = []
    for name, on_a100, on_h100 in zip(
        ("prune", "pretrain"), plans(folder, "A100-80G"), plans(folder, "H100-80G")
    ):
        job, found = on_a100.job, on_a100.candidates[0]
        size = checkpoint_bytes(job.shape, job.masks) / 1e9
        rows.append(
            f"| {folder.name} | {name} | {found.needed_gib:.1f} | {on_a100.hours(found):.1f} | "
            f"{on_h100.hours(on_h100.candidates[0]):.1f} | {job.saves} of {size:.1f} GB | "
            f"{job.saves_on_disk}, {size * job.saves_on_disk:,.0f} GB |"
        )
    return rows


def test_the_grouped_query_recipe_keeps_as_many_query_heads_in_every_group() -> None:
    prune, pretrain = run_of(GROUPED / "prune.yaml"), run_of(GROUPED / "pretrain.yaml")
    target = target_shape(prune.masks, LLAMA_3_1_8B)
    assert (target.num_query_groups, target.heads_per_group) == (8, 3)
    assert f"{target.num_params() / 1e9:.1f}b" in GROUPED.name
    parts = whole_parts(LLAMA_3_1_8B, target)
    assert {kind: part.extents for kind, part in parts.items()} == {
        "hidden": (1, 4096),
        "head": (32, 8, 4),
        "intermediate": (32, 14336),
        "layer": (1, 32),
    }
    check_layout(LLAMA_3_1_8B, prune.parallel)
    check_target_layout(target, LLAMA_3_1_8B, prune)
    check_layout(target, pretrain.parallel)
    assert prune.train.num_microbatches(prune.parallel.data_parallel_size(GPUS)) >= 1
    check_streams(
        prune.masks.mask_noise_streams,
        global_batch_size=prune.train.global_batch_size,
        micro_batch_size=prune.train.micro_batch_size,
    )


def test_a_layout_that_does_not_divide_is_noticed() -> None:
    (path,) = (path for path in YAMLS if path.match("llama2_7b_to_2.7b/pretrain.yaml"))
    with pytest.raises(ValueError, match="num_query_groups 20 is not a multiple"):
        check_layout(PRESETS["llama2-2.7b"], run_of(path, tensor_model_parallel_size=8).parallel)


@pytest.mark.parametrize("script", SCRIPTS, ids=in_folders)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    if script not in SETTINGS:
        assert text.startswith("#!/usr/bin/env bash\n# ")
        assert "\nset -euo pipefail\n" in text
        assert os.access(script, os.X_OK)
    else:
        assert text.startswith("# shellcheck shell=bash\n# ")
        knobs = re.findall(r"^(?:export )?([A-Z_]+)=(.*)$", text, flags=re.MULTILINE)
        assert [name for name, value in knobs if not value.startswith(f'"${{{name}:-')] == (
            ["HERE", "DISTILL"] if script.name == "settings.sh" else []
        )


@pytest.mark.parametrize("recipe", RECIPES, ids=in_folders)
@pytest.mark.parametrize("script", STEPS, ids=in_folders)
def test_a_scripts_command_line_is_accepted(script: Path, recipe: Path, tmp_path: Path) -> None:
    units = "masks" if script.name == "04_prune.sh" else "importance"
    done = dry_run(script, tmp_path, recipe=recipe.name, UNITS=units)
    if script.name == "03_reference.sh" and recipe in FOLDERS:  # whose references are published
        file = recipe / "reference_loss.yaml"
        assert (done.returncode, done.stdout) == (0, f"{file} exists; nothing to measure\n")
        return
    # nothing that it reads is there
    assert (done.returncode, done.stderr[-16:]) == (2, " does not exist\n"), done.stderr
    command = re.match(r"# megashear (\w+) --config <this file>\n", done.stdout)
    assert command is not None, done.stdout
    assert command[1] in COMMANDS
    if command[1] in RUNS:
        printed = yaml.safe_load(done.stdout)
        assert printed.keys() == settings_of(RUNS[command[1]]).keys()
        # what one script writes the next one reads
        assert Path(printed["load"]).name == {"prune": "source", "pretrain": "cut"}[command[1]]
        assert printed["save"].startswith(f"runs/{recipe.name}/")
        assert (printed["lr_warmup_iters"] == 1440) is (command[1] == "pretrain")
        assert printed["distill_from"] == f"runs/{recipe.name}/source"
    assert list(tmp_path.iterdir()) == []


def recipe_script(name: str) -> Path:
    return EXAMPLES / "recipe" / name


@pytest.mark.parametrize(
    ("name", "units", "other"),
    [("04_prune.sh", "importance", "04_score.sh"), ("04_score.sh", "masks", "04_prune.sh")],
)
def test_the_way_of_choosing_units_that_was_not_chosen_does_nothing(
    name: str, units: str, other: str, tmp_path: Path
) -> None:
    done = dry_run(recipe_script(name), tmp_path, extra="", UNITS=units)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"UNITS is {units}: {other} chooses the units" in done.stdout


def test_units_are_chosen_by_importance_or_by_masks(tmp_path: Path) -> None:
    done = dry_run(recipe_script("05_cut.sh"), tmp_path, UNITS="chance")
    assert (done.returncode, done.stderr) == (2, "UNITS=chance; wanted importance or masks\n")


@pytest.mark.parametrize(
    ("units", "wanted"),
    [
        ("importance", {"load": "source", "scores": "scores.json", "exact_target": False}),
        ("masks", {"load": "pruned", "scores": None, "exact_target": True}),
    ],
)
def test_a_cut_keeps_what_the_step_before_it_chose(
    units: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    printed = yaml.safe_load(dry_run(recipe_script("05_cut.sh"), tmp_path, UNITS=units).stdout)
    folder = "runs/llama2_7b_to_2.7b"
    for key, value in wanted.items():
        assert printed[key] == (f"{folder}/{value}" if isinstance(value, str) else value)
    assert printed["target"] == ("llama2-2.7b" if units == "importance" else None)


@pytest.mark.parametrize("path", [path for path in YAMLS if path.stem == "prune"], ids=in_folders)
def test_importance_and_masks_have_the_same_target(path: Path, tmp_path: Path) -> None:
    done = dry_run(recipe_script("05_cut.sh"), tmp_path, recipe=path.parent.name)
    printed, masks = yaml.safe_load(done.stdout), yaml.safe_load(path.read_text())
    targets = {key for key in printed | masks if key.startswith("target")}
    assert {key: printed[key] for key in targets} == {key: masks.get(key) for key in targets}


def test_no_teacher_is_a_choice(tmp_path: Path) -> None:
    done = dry_run(recipe_script("06_pretrain.sh"), tmp_path, TEACHER="none")
    assert yaml.safe_load(done.stdout)["distill_from"] is None


def test_an_unknown_flag_in_a_script_is_noticed(tmp_path: Path) -> None:
    done = dry_run(STEPS[0], tmp_path, extra="--dry-run --heldout-fraction 0.1")
    assert done.returncode == 2
    assert "unknown flag --heldout-fraction" in done.stderr


def test_a_recipe_that_is_not_there_is_noticed(tmp_path: Path) -> None:
    done = dry_run(STEPS[0], tmp_path, recipe="llama2_7b_to_9b")
    assert done.returncode == 1
    assert "llama2_7b_to_9b: No such file or directory" in done.stderr


def dry_run(
    script: Path,
    folder: Path,
    *,
    extra: str = "--dry-run",
    recipe: str = "llama2_7b_to_2.7b",
    **knobs: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script with one process in place of torchrun."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    given = {"PYTHON": sys.executable, "LAUNCH": sys.executable, "EXTRA": extra, "RECIPE": recipe}
    return subprocess.run(
        [script],
        cwd=folder,
        env=environment | given | knobs | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
