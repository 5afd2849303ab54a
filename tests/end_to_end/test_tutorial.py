"""docs/tutorial.md, typed as it stands: only the sizes in its settings are small ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megashear.conversion import hf
from tests.end_to_end.torchrun import ROOT
from tests.reference_llama import random_weights
from tests.text_run import SEQUENCE, SHAPE, TextRun

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [block for language, block in BLOCKS if language == "bash"]
SIZES = {
    "GPUS": 1,
    "TP": 1,
    "FLAGS": "",
    "SHARE": "",
    "STREAMS": 2,
    "TRAIN_MICRO": 2,
    "KEEP": 2,
    "TARGET": "--target-hidden-size 32 --target-num-layers 3 --target-num-attention-heads 4"
    " --target-ffn-hidden-size 56",
    "SEQUENCE": SEQUENCE,
    "PRUNE_STEPS": 8,
    "PRUNE_BATCH": 4,
    "TRAIN_STEPS": 8,
    "TRAIN_BATCH": 4,
    "RATE": "1e-3",
    "HELD_OUT": 0.04,
    "CHAT": ROOT / "examples/chat/colours",
    "CHAT_STEPS": 4,
    "CHAT_BATCH": 4,
    "CHAT_RATE": "1e-3",
    "EVAL": 2,
    "LOG_EVERY": 2,
    "PRUNE_EVAL_EVERY": 2,
    "PRUNE_SAVE_EVERY": 4,
    "TRAIN_EVAL_EVERY": 4,
    "TRAIN_SAVE_EVERY": 6,
}
JOBS = {
    "pruned": {"iter_0000004", "iter_0000008"},
    "small": {"iter_0000006", "iter_0000008"},
}
"""Checkpoints of those sizes."""
PROGRAMS = {
    "megashear": 'exec "{python}" -m megashear "$@"',
    # one process: how torchrun starts many is tried elsewhere
    "torchrun": 'test "$1 $2" = "--nproc-per-node 1" && shift 2 && exec "{python}" "$@"; exit 2',
    "python3": 'exec "{python}" "$@"',
}
"""As installing puts them into an environment."""


@pytest.mark.scenario
@pytest.mark.timeout(1500)
def test_every_command_of_the_tutorial_runs(text: TextRun, tmp_path: Path) -> None:
    model = tmp_path / "a model"  # a space, for whoever has one in a path
    weights = random_weights(SHAPE, scale=0.1)
    hf.write_directory(model, weights.items(), SHAPE, tokenizer=text.tokenizer)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        program = programs / name
        program.write_text("#!/bin/sh\n" + body.format(python=sys.executable) + "\n")
        program.chmod(0o755)
    settings = SIZES | {"MODEL": model, "TEXT": text.jsonl, "WORK": tmp_path / "work"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(COMMANDS)],
        cwd=tmp_path,
        env=os.environ
        | {name: str(value) for name, value in settings.items()}
        | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work/report.html").is_file()
    # what was shown as a dry run is what ran, and a long run saves on its way
    shown = yaml.safe_load((tmp_path / "work/prune.yaml").read_text())
    assert (shown["load_hf"], shown["train_iters"]) == (str(model), SIZES["PRUNE_STEPS"])
    saved = {job: {path.name for path in (tmp_path / "work" / job).iterdir()} for job in JOBS}
    assert {job: steps & saved[job] for job, steps in JOBS.items()} == JOBS
    config = json.loads((tmp_path / "work/small-hf/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 3)
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 56)
    said = re.search(
        rf"^(\d+) torch\.Size\(\[1, \d+, {SHAPE.vocab_size}\]\)$", done.stdout, flags=re.MULTILINE
    )
    assert said is not None
    assert int(said[1]) < sum(weight.numel() for weight in weights.values())
    assert "### Response:" in (tmp_path / "work/chat-hf/chat_template.jinja").read_text()


def test_intervals_are_those_of_the_recipe() -> None:
    recipe = ROOT / "examples/llama2_7b_to_2.7b"
    for job in ("prune", "pretrain"):
        given = yaml.safe_load((recipe / f"{job}.yaml").read_text())
        prefix = {"prune": "PRUNE", "pretrain": "TRAIN"}[job]
        defaults = dict(re.findall(r'\b([A-Z_]+)="\$\{\1:?-([^}]*)\}', COMMANDS[0]))
        found = [defaults[f"{prefix}_{what}_EVERY"] for what in ("EVAL", "SAVE")]
        assert found == [str(given["eval_interval"]), str(given["save_interval"])]
        assert defaults["LOG_EVERY"] == str(given["log_interval"])


def test_settings_are_those_of_the_recipe() -> None:
    recipe = ROOT / "examples/llama2_7b_to_2.7b"
    prune, pretrain = (
        yaml.safe_load((recipe / f"{job}.yaml").read_text()) for job in ("prune", "pretrain")
    )
    defaults = dict(re.findall(r'\b([A-Z_]+)="\$\{\1:?-([^}]*)\}', COMMANDS[0]))
    wanted = {
        "TARGET": f"--target {prune['target']}",
        "SEQUENCE": prune["seq_length"],
        "PRUNE_STEPS": prune["train_iters"],
        "PRUNE_BATCH": prune["global_batch_size"],
        "STREAMS": prune["mask_noise_streams"],
        "EVAL": prune["eval_sequences"],
        "TRAIN_STEPS": pretrain["train_iters"],
        "TRAIN_BATCH": pretrain["global_batch_size"],
        "TRAIN_MICRO": pretrain["micro_batch_size"],
    }
    assert {name: defaults[name] for name in wanted} == {n: str(v) for n, v in wanted.items()}
    assert prune["micro_batch_size"] == 1  # which the tutorial leaves out
    for run in (prune, pretrain):
        assert (str(run["tensor_model_parallel_size"]), str(run["keep"])) == (
            defaults["TP"],
            defaults["KEEP"],
        )
        flags = {key.replace("-", "_") for key in re.findall(r"--([\w-]+)", defaults["SHARE"])}
        assert all(run[flag] is True for flag in flags)
        assert len(flags) == 3
        assert defaults["FLAGS"] == "--bf16"
        assert run["bf16"] is True
    # and what the page says of hours and disk is what plan prints for them
    text = " ".join(PAGE.split())
    shown = (ROOT / "docs/planning.md").read_text()
    for job, hours, saves in (("prune", "8.4", "4"), ("pretrain", "349.5", "15")):
        assert re.search(rf"\b{hours}\b", text), job
        assert re.search(rf" {hours} +[\d,]+$", shown, flags=re.MULTILINE), job
        (size, total) = re.findall(
            rf"^Disk: {saves} checkpoints of ([\d.]+) GB; with --keep 2, 3 at once, (\d+) GB$",
            shown,
            flags=re.MULTILINE,
        )[0]
        assert f"{saves} " in text
        assert f"of {size} GB" in text
        assert re.search(rf"\b{total}\b", text)


def test_all_sizes_are_settings_at_the_top() -> None:
    top, *rest = COMMANDS
    settings = set(re.findall(r'\b([A-Z_]+)="\$\{\1:?-', top))
    assert {*SIZES, "MODEL", "TEXT", "WORK"} == settings
    used = set(re.findall(r"\$\(*\{?([A-Z_]+)", "".join(rest)))
    used |= set(re.findall(r"\(\(([A-Z_]+)", "".join(rest)))
    assert used == settings
    # the machine without a GPU sets them all anew
    (small,) = (block for language, block in BLOCKS if not language and "quickstart" in block)
    assert settings <= set(re.findall(r"\b([A-Z_]+)=", small))
