"""`megashear plan` from its command line: what it reads, prints and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megashear.__main__ import main
from megashear.conversion.hf_config import config_of_shape
from megashear.shape import PRESETS
from tests.text_run import SHAPE, write_checkpoint

EIGHT = ["--gpus", "8", "--gpu", "A100-80G"]


def run(*words: str, status: int = 0) -> None:
    assert main(["plan", *words]) == status


def layouts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    run(*words, "--json")
    plans: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plans


def test_json_has_every_layout_with_parts_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    plans = layouts(capsys, "--model", "llama2-7b", "--target", "llama2-2.7b", *EIGHT)
    assert list(plans) == ["pruning", "continued pretraining"]
    pruning = plans["pruning"]
    assert pruning["steps"] == 3200
    assert pruning["masks"] == ["head", "hidden", "intermediate"]
    assert len(pruning["layouts"]) > 10
    for found in pruning["layouts"]:
        parts, seconds = dict(found["bytes"]), dict(found["seconds"])
        assert parts.pop("total") == sum(parts.values())
        assert seconds.pop("step") == pytest.approx(sum(seconds.values()))
        assert found["gpu_hours"] == pytest.approx(8 * found["hours"])
        step = found["seconds"]["step"] + found["evaluation_seconds_per_step"]
        assert found["hours"] == pytest.approx(3200 * step / 3600)
        rate = 32 * 4096 / found["seconds"]["step"] / 8
        assert found["tokens_per_second_per_gpu"] == pytest.approx(rate)


def test_a_teacher_is_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "pretrain.yaml"
    recipe.write_text("bf16: true\ndistill_from: source\nlm_loss_weight: 0.5\n")
    words = ["--model", "llama2-7b", "--target", "llama2-2.7b", *EIGHT]
    plain = layouts(capsys, *words)
    asked = layouts(capsys, *words, "--distill")
    of_recipe = layouts(capsys, *words, "--pretrain-config", str(recipe), "--any-layout")
    for found, taught in ((plain, ()), (asked, asked.keys()), (of_recipe, [*of_recipe][1:])):
        for name, job in found.items():
            teacher = 6_738_415_616 if name in taught else None
            assert job["teacher_parameters"] == teacher
            for each in job["layouts"]:
                assert bool(each["seconds"]["teacher"]) == bool(teacher)
                assert bool(each["bytes"]["teacher"]) == bool(teacher)
    run(*words, "--distill")
    out = capsys.readouterr().out
    assert "teacher: 6,738,415,616 parameters, the shape of --model" in out
    assert re.search(r"^  teacher +\d+\.\d+  its weights, and hidden states that wait$", out, re.M)
    assert re.search(r"^  teacher +\d+\.\d+  its forward pass$", out, re.M)


def test_a_teacher_has_the_shape_of_the_model_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = replace(SHAPE, vocab_size=32000)
    write_checkpoint(tmp_path / "checkpoint", small)
    (tmp_path / "hf").mkdir()
    config = config_of_shape(PRESETS["llama2-2.7b"], dtype="float32")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()

    def taught(named: str, *words: str) -> tuple[int, str]:
        file = recipe(tmp_path / "pretrain.yaml", bf16=True, distill_from=named)
        base = ("--model", "llama2-1.3b", "--pretrain-config", file, *EIGHT, "--any-layout")
        (found,) = layouts(capsys, *base, "--micro-batch-size", "1", *words).values()
        return found["teacher_parameters"], found["teacher_source"]

    assert taught("hf") == (PRESETS["llama2-2.7b"].num_params(), "the shape of hf")
    assert taught("checkpoint", "--tensor-model-parallel-size", "1") == (
        small.num_params(),
        "the shape of checkpoint",
    )
    of_flag = taught("hf", "--teacher", "llama2-7b")
    assert of_flag == (PRESETS["llama2-7b"].num_params(), "the shape of llama2-7b")
    # a student is planned alone: without the file there is nothing but its own shape to assume
    parameters, source = taught("elsewhere/teacher")
    assert parameters == PRESETS["llama2-1.3b"].num_params()
    assert source == (
        "assumed to be as --model, for elsewhere/teacher is not here; --teacher gives another"
    )
    file = recipe(tmp_path / "pretrain.yaml", bf16=True, distill_from="empty")
    run("--model", "llama2-1.3b", "--pretrain-config", file, *EIGHT, status=2)
    error = capsys.readouterr().err
    assert re.search(r"distill_from empty: no checkpoint at empty.* or give the teacher's", error)
    run("--model", "llama2-1.3b", "--teacher", "llama", *EIGHT, status=2)
    assert "--teacher llama is neither a preset (" in capsys.readouterr().err
    run("--model", "llama2-1.3b", "--teacher", "llama3.1-8b", *EIGHT, status=2)
    assert re.search(
        r"error: the teacher \(the shape of llama3.1-8b\) has a vocabulary of 128256 tokens and "
        r"the model one of 32000; a teacher must have the same tokens",
        capsys.readouterr().err,
    )


MEASURED = str(Path(__file__).parents[3] / "docs/benchmarks/gpu_speed.json")


def test_shares_of_the_peak_are_those_of_the_gpu_or_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model", "llama2-7b", "--target", "llama2-2.7b", "--gpus", "8", "--gpu", "H200")
    usual = layouts(capsys, *words)
    assert [job["assumed_mfu"] for job in usual.values()] == [0.55, 0.57]
    assert {job["mfu_source"] for job in usual.values()} == {
        "megashear, 7B on one H200",
        "megashear, 2.7B on one H200",
    }
    found = layouts(capsys, *words, "--measured", MEASURED, "--mfu", "0.5")
    assert found["pruning"]["mfu_source"] == "measured, 7B pruning on NVIDIA H200"
    assert found["pruning"]["assumed_mfu"] == pytest.approx(0.57, abs=0.005)
    training = found["continued pretraining"]
    assert (training["assumed_mfu"], training["mfu_source"]) == (0.5, "--mfu")
    run(*words, "--measured", MEASURED)
    assert "57 % of the peak while computing (measured, 7B pruning on" in capsys.readouterr().out
    run(*words, "--measured", "gone.json", status=2)
    assert "--measured gone.json is no file" in capsys.readouterr().err


def test_a_budget_gives_shapes_and_then_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama2-7b", "--budget-params", "1.3e9")
    run(*words)
    out = capsys.readouterr().out
    assert "continued pretraining" not in out
    (flags,) = re.findall(r"^The first: (.*)$", out, re.MULTILINE)
    more = (*EIGHT, "--micro-batch-size", "1", "--pipeline-model-parallel-size", "1")
    pasted = layouts(capsys, "--model", "llama2-7b", *flags.split(), *more)
    found = layouts(capsys, *words, *more)
    assert found["shapes"][0]["flags"] == flags
    assert found["shapes"][0]["shape"] == PRESETS["llama2-1.3b"].to_dict()
    assert {name: job for name, job in found.items() if name != "shapes"} == pasted
    run(*words, *more, "--top", "1")
    assert re.search(
        r"^The first: .*\n\npruning: .*\n(.*\n)*continued", capsys.readouterr().out, re.M
    )
    # and --dry-run says what is wrong with it
    run("--model", "llama2-7b", "--budget-params", "9e9", "--dry-run", status=2)
    assert "--budget-params 9e9 is not below" in capsys.readouterr().err
    assert layouts(capsys, *words, *EIGHT[2:], "--top", "1") == {"shapes": found["shapes"]}


def test_the_table_lists_as_many_as_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", "llama2-2.7b", *EIGHT, "--top", "3")
    out = capsys.readouterr().out
    assert out.startswith("continued pretraining: 48,000 steps of 256 x 4,096 tokens (50.33 B)")
    rows = [line for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 3
    assert "more that fit; --top " in out


@pytest.mark.parametrize("way", ["preset", "json", "hf", "checkpoint"])
def test_a_model_is_named_in_four_ways(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, name = PRESETS["llama2-1.3b"], "llama2-1.3b"
    if way == "json":
        name = str(tmp_path / "shape.json")
        Path(name).write_text(json.dumps(shape.to_dict()))
    elif way == "hf":
        name = str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_of_shape(shape, dtype="float32")))
    elif way == "checkpoint":
        shape, name = SHAPE, str(write_checkpoint(tmp_path / "checkpoint", SHAPE))
    (found,) = layouts(capsys, "--model", name, "--gpus", "4", "--gpu", "H100-80G").values()
    assert found["shape"] == shape.to_dict()
    assert found["parameters"] == shape.num_params()


def test_what_is_chosen_is_all_that_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    more = ("--num-virtual-stages-per-pipeline-rank", "4", "--micro-batch-size", "2")
    (found,) = layouts(capsys, "--model", "llama2-2.7b", *EIGHT, *words, *more).values()
    (only,) = found["layouts"]
    assert only["flags"] == (
        f"{words[0]} 2 --sequence-parallel {words[2]} 2 {more[0]} 4 --use-distributed-optimizer "
        f"--overlap-grad-reduce --overlap-param-gather {more[2]} 2 --bf16"
    )


def test_a_slower_network_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama2-7b", "--gpus", "64", "--tensor-model-parallel-size", "8")
    (fast,) = layouts(capsys, *words).values()
    (slow,) = layouts(capsys, *words, "--network-gbit", "10").values()
    slower = {layout["flags"]: layout["seconds"] for layout in slow["layouts"]}
    crossing = [layout for layout in fast["layouts"] if layout["data_parallel_size"] > 1]
    in_both = [found for found in crossing if found["flags"] in slower]
    assert in_both
    for found in in_both:
        # 10 Gbit/s in place of 400; and less of it lies beside the passes
        assert slower[found["flags"]]["data"] > 39.9 * found["seconds"]["data"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model", "llama2-7b", "--gpus", "8", "--gpu", "A100"],
            "--gpu A100 may be A100-40G or A100-80G; say which",
        ),
        (
            ["--model", "llama-7b", "--gpus", "8"],
            "--model llama-7b is neither a preset (llama2-7b, ",
        ),
        (
            ["--model", "llama2-7b", "--target", "llama2-2", "--gpus", "8"],
            "--target llama2-2 is not known; presets: llama2-7b, ",
        ),
        (["--model", "llama2-7b", "--gpus", "7"], "no layout of 7 GPUs divides layers, heads"),
        (
            ["--model", "llama2-7b", "--gpus", "1", "--gpu", "A100-40G"],
            "no layout fits. The nearest, --tensor-model-parallel-size 1 --micro-batch-size 1",
        ),
        (
            ["--model", "llama2-2.7b", "--target", "llama2-7b", "--gpus", "8"],
            "target",
        ),
        (
            ["--model", "llama2-7b", "--target-hidden-size", "2050", "--gpus", "8"],
            "nearest that it loads: --target-hidden-size 2048 or 2080, or "
            "--target-num-attention-heads 25; or add --force-unloadable-target",
        ),
        (
            ["--model", "llama2-7b", "--target-num-layers", "40", "--gpus", "8"],
            "set --target-num-layers to at most 32",
        ),
        (["--model", "llama2-7b", "--target-num-layers", "0", "--gpus", "8"], "is 0; wanted 1 to"),
        (
            [
                *("--model", "llama2-7b", "--gpus", "8", "--pipeline-model-parallel-size", "1"),
                *("--recompute-granularity", "full", "--recompute-num-layers", "3"),
            ],
            "--recompute-num-layers 3 does not divide the 32 layers of a stage, as "
            "--recompute-method uniform wants; possible: 1, 2, 4, 8, 16, 32",
        ),
        (["--model", "llama2-7b", "--gpus", "0"], "--gpus is 0; wanted 1 to 1048576"),
        (["--model", ".", "--gpus", "8"], "no checkpoint"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*(str(tmp_path) if word == "." else word for word in words), status=2)
    error = capsys.readouterr().err
    assert error.startswith("megashear plan: error: ")
    assert message in error
    assert error.count("\n") == 1


RECIPES = Path(__file__).parents[3] / "examples"


def recipe(path: Path, **keys: Any) -> str:
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_extents_of_the_target_are_flags_as_for_prune(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extents = {"hidden_size": 2560, "num_attention_heads": 20, "ffn_hidden_size": 6912}
    file = tmp_path / "target.json"
    file.write_text(json.dumps(extents | {"num_query_groups": 20}))
    flags = [w for k, v in extents.items() for w in (f"--target-{k.replace('_', '-')}", str(v))]
    whole, *others = (
        layouts(capsys, "--model", "llama2-7b", *words, *EIGHT, "--micro-batch-size", "1")
        for words in (("--target", "llama2-2.7b"), flags, ("--target", str(file)))
    )
    assert whole["pruning"]["masks"] == ["head", "hidden", "intermediate"]
    assert all(other == whole for other in others)
    # the twin: a flag stands above the preset
    words = ("--target", "llama2-2.7b", "--target-num-layers", "24")
    fewer = layouts(capsys, "--model", "llama2-7b", *words, *EIGHT, "--micro-batch-size", "1")
    assert fewer["pruning"]["masks"] == ["head", "hidden", "intermediate", "layer"]


@pytest.mark.parametrize("folder", ["llama2_7b_to_1.3b", "llama2_7b_to_2.7b"])
def test_the_published_recipes_are_what_is_planned_without_them(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(RECIPES / folder / f"{name}.yaml") for name in ("prune", "pretrain")]
    words = ("--prune-config", files[0], "--pretrain-config", files[1], "--any-layout")
    target = "llama2-" + folder.rpartition("_")[2]
    of_recipe = layouts(capsys, "--model", "llama2-7b", *words, *EIGHT)
    assert of_recipe == layouts(capsys, "--model", "llama2-7b", "--target", target, *EIGHT)


def test_a_recipe_says_what_is_trained_and_how_it_is_laid_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {
        **{"target": "llama2-1.3b", "tensor_model_parallel_size": 2, "micro_batch_size": 2},
        **{"bf16": True, "seq_length": 2048, "global_batch_size": 16, "train_iters": 100},
        **{"mask_noise_streams": 2, "eval_interval": 10, "eval_sequences": 5},
        **{"domain_weights": [0.5, 0.5], "recompute_granularity": "full"},
    }
    words = ("--model", "llama2-7b", "--prune-config", recipe(tmp_path / "prune.yaml", **keys))
    pruning = layouts(capsys, *words, *EIGHT)["pruning"]
    assert (pruning["steps"], pruning["seq_length"]) == (100, 2048)
    assert pruning["held_out_sequences_per_step"] == 2 * 2 * 5 / 10
    (only,) = pruning["layouts"]
    # no sequence parallelism and no distributed optimizer, for the recipe asks for neither
    assert only["flags"] == (
        "--tensor-model-parallel-size 2 --micro-batch-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1 --mask-noise-streams 2 --bf16"
    )
    # the twins: what flags say stands above the recipe, and its layout can be left open
    more = ("--pruning-global-batch-size", "32", "--pruning-tokens", "1e9", "--any-layout")
    other = layouts(capsys, *words, *EIGHT, *more)["pruning"]
    assert other["steps"] == -(-(10**9) // (32 * 2048))
    assert len(other["layouts"]) > 10
    chosen = layouts(capsys, *words, *EIGHT, "--tensor-model-parallel-size", "4")["pruning"]
    assert {found["tensor_model_parallel_size"] for found in chosen["layouts"]} == {4}


def test_recompute_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama2-2.7b", *EIGHT, "--tensor-model-parallel-size", "1")
    words += ("--pipeline-model-parallel-size", "1", "--micro-batch-size", "1")
    (free,) = layouts(capsys, *words).values()
    (again,) = layouts(capsys, *words, "--recompute-granularity", "full").values()
    (block,) = layouts(
        capsys,
        *(*words, "--recompute-granularity", "full"),
        *("--recompute-method", "block", "--recompute-num-layers", "8"),
    ).values()
    free, again, block = (plans["layouts"][0] for plans in (free, again, block))
    assert free["recompute_granularity"] is None
    assert again["recompute_granularity"] == "full"
    sizes = [found["bytes"]["activations"] for found in (again, block, free)]
    assert sizes == sorted(set(sizes))
    seconds = [found["seconds"]["compute"] for found in (free, block, again)]
    assert seconds == sorted(set(seconds))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bf16": True}, "prune.yaml names no target; give --target or --target-* extents"),
        ({"target": "llama2-1.3b"}, "bf16 is false, and plans are for bfloat16 alone; set bf16: t"),
        ({"targt": "llama2-1.3b"}, "prune.yaml line 1: unknown key targt; nearest known: target"),
        (
            {"target": "llama2-1.3b", "bf16": True, "global_batch_size": 9},
            "global_batch_size in {file} 9 is not a multiple of --micro-batch-size * data-parallel",
        ),
        (
            {"target": "llama2-1.3b", "bf16": True, "seq_length": 65536},
            "GiB too much; ways out: --any-layout",
        ),
    ],
)
def test_a_recipe_that_cannot_be_planned_is_one_line(
    keys: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path / "prune.yaml", **keys)
    run("--model", "llama2-7b", "--prune-config", file, *EIGHT, status=2)
    error = capsys.readouterr().err
    assert message.format(file=file) in error
    assert error.count("\n") == 1


def test_a_recipe_in_the_place_of_the_plans_own_file_is_told_where_it_goes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(RECIPES / "llama2_7b_to_1.3b/prune.yaml")
    run("--model", "llama2-7b", "--config", file, *EIGHT, status=2)
    assert "name the YAML file of a run with --prune-config or --pretrain-config" in (
        capsys.readouterr().err
    )
    run("--model", "llama2-7b", "--prune-config", "gone.yaml", *EIGHT, status=2)
    assert "--prune-config gone.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"hidden_size": "2048"},
            'target.json: hidden_size is "2048"; it must be a number wit',
        ),
        ({"hidden_size": True}, "target.json: hidden_size is true; it must be a number without a"),
        (
            {"hidden_sizes": 2048},
            "target.json has hidden_sizes, which is no extent; there are",
        ),
    ],
)
def test_a_file_of_extents_is_refused_in_its_own_words(
    content: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "target.json"
    file.write_text(json.dumps(content))
    for words in (["--model", "llama2-7b", "--target", str(file)], ["--model", str(file)]):
        run(*words, *EIGHT, status=2)
        assert message in capsys.readouterr().err
    file.write_text(json.dumps({"hidden_size": 2048}))
    run("--model", str(file), *EIGHT, status=2)
    assert "target.json does not say num_layers, num_attention_heads, " in capsys.readouterr().err
