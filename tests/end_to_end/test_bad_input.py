"""Bad input through the command line: refused before processes meet, with nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megashear.__main__ import main
from megashear.commands.outcome import USAGE
from megashear.config import ModelConfig, ParallelConfig
from megashear.conversion import hf
from megashear.files import integrity
from megashear.parallel import launch
from tests import text_run
from tests.end_to_end.torchrun import torchrun
from tests.reference_llama import random_weights
from tests.text_run import SHAPE, TextRun

NOT_HANGING_S = 120.0
"""Seconds for torchrun to start, refuse and end; a hang would last ten minutes."""


class Refusal:
    """Runs a command that must be refused, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        text: TextRun,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder, self.text = folder, text
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object, processes: int = 1, starts: bool = False) -> str:
        """The error that ``megashear words`` ends with, as one of ``processes``.

        ``--dry-run`` ends with the same, unless a start alone finds it or says it otherwise
        (``starts``).
        """
        error = self._error(*words, processes=processes)
        if not starts:
            assert self._error(*words, "--dry-run", processes=processes) == error
        return error

    def _error(self, *words: object, processes: int) -> str:
        before = contents(self.folder), contents(self.text.data.parent)
        self._capsys.readouterr()
        with self._monkeypatch.context() as patched:
            patched.setenv("WORLD_SIZE", str(processes))
            patched.setenv("RANK", "0")
            patched.setattr(dist, "init_process_group", met)
            status = main([str(word) for word in words])
        printed = self._capsys.readouterr()
        assert status == USAGE, printed
        assert "--dry-run" in words or printed.out == ""
        assert (contents(self.folder), contents(self.text.data.parent)) == before
        *_, error = printed.err.strip().splitlines()
        assert error.startswith(f"megashear {words[0]}: error: "), printed.err
        return error

    def prune(
        self, *words: object, processes: int = 1, starts: bool = False, **changes: object
    ) -> str:
        """The same of a pruning run that is right but for ``words`` and ``changes``."""
        given = {
            "load": self.text.checkpoint,
            "data_path": self.text.data,
            "reference_loss": self.text.reference,
            "save": self.folder / "saved",
            "tensorboard_dir": self.folder / "events",
            "seq_length": text_run.SEQUENCE,
            "sparsity_warmup_iters": 20,
            **text_run.TARGET,
            **changes,
        }
        flags = [
            word
            for key, value in given.items()
            if value is not None
            for word in (f"--{key.replace('_', '-')}", value)
        ]
        return self("prune", *flags, *words, processes=processes, starts=starts)


def met(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("processes met before the refusal")


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change of everything in a folder."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refusal(
    tmp_path: Path,
    text: TextRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refusal:
    return Refusal(tmp_path, text, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("changes", "processes", "wanted"),
    [
        (
            {"tensor_model_parallel_size": 3},
            3,
            "model num_query_groups 4 is not a multiple of --tensor-model-parallel-size 3; the "
            "model divides by 1, 2",
        ),
        (
            {"pipeline_model_parallel_size": 3},
            3,
            "model num_layers 4 is not a multiple of --pipeline-model-parallel-size",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4},
            2,
            "--num-virtual-stages-per-pipeline-rank = 2 * 4; their product may be 1, 2, 4",
        ),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            6,
            "world size 6 is not a multiple of --tensor-model-parallel-size * "
            "--pipeline-model-parallel-size = 2 * 2; start a multiple of 4 processes",
        ),
        (
            {"global_batch_size": 6, "micro_batch_size": 2},
            2,
            "--global-batch-size 6 is not a multiple of --micro-batch-size * data-parallel size "
            "= 2 * 2; the nearest that are: 4 and 8",
        ),
        ({"mask_noise_streams": 3}, 1, "--mask-noise-streams 3 does not divide"),
    ],
)
def test_a_layout_that_does_not_divide(
    refusal: Refusal, changes: dict[str, Any], processes: int, wanted: str
) -> None:
    assert wanted in refusal.prune(processes=processes, **changes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"target_hidden_size": 48},
            "target hidden_size is 48, the source has 40, and pruning only removes; set "
            "--target-hidden-size to at most 40",
        ),
        (
            {"target": "llama2-370m", **dict.fromkeys(text_run.TARGET)},
            "target head_dim is 128, the source has 8, and no mask changes it",
        ),
        ({"target": "llama2-3b"}, "--target llama2-3b is not known; presets: llama2-7b"),
        (
            {"target_num_attention_heads": 6},
            "target has 6 query heads in num_query_groups 2, 3 for each key/value head; in the "
            "source each serves 2, and masks only remove; set --target-num-attention-heads to 4 or "
            "--target-num-query-groups to 3",
        ),
        (
            {"target_num_attention_heads": 3},
            "--target-num-attention-heads 3 is not a multiple of --target-num-query-groups 2, and "
            "every key/value head serves the same number of query heads; the nearest "
            "--target-num-attention-heads is 2 or 4; 3 fits --target-num-query-groups 3",
        ),
        (
            {"target_num_attention_heads": 6, "target_num_query_groups": None},
            "6 is not a multiple of --target-num-query-groups 4 (all are kept unless it is given), "
            "and every key/value head serves the same number of query heads; the nearest "
            "--target-num-attention-heads is 4 or 8; 6 fits --target-num-query-groups 3",
        ),
        (
            {"target_ffn_hidden_size": 2},
            "target ffn_hidden_size 2 of 96 is a sparsity of 0.9792, and masks reach 0.0020 to "
            "0.9529; the nearest --target-ffn-hidden-size is 5",
        ),
        (
            {"target_hidden_size": 25},
            "target hidden_size 25 is not a multiple of num_attention_heads 2: transformers from "
            "release 5 refuses such a llama model, although head_dim is given; the nearest that it "
            "loads: --target-hidden-size 24 or 26; or add --force-unloadable-target",
        ),
        (dict.fromkeys(text_run.TARGET), "nothing to prune"),
        ({"lambda2_max": 10}, "lambda2_max is 10; below 100"),
    ],
)
def test_a_target_that_no_mask_reaches(
    refusal: Refusal, changes: dict[str, Any], wanted: str
) -> None:
    assert wanted in refusal.prune(**changes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"sparsity_warmup_iters": 640},
            "--sparsity-warmup-iters 640 is above --train-iters 100, so the target would never be "
            "asked for; the recipes take a fifth of the steps, here 20",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 3},
            "--recompute-num-layers 3 does not divide the 4 layers of a stage, as "
            "--recompute-method uniform wants; possible: 1, 2, 4",
        ),
        ({"domain_weights": 1.0}, "--domain-weights has 1 numbers, wanted one for each of the 3"),
        ({"domain_weights": "word=1"}, "--domain-weights: no domain 'word'; did you mean 'words'?"),
        ({"domain_weights": "words=1"}, "--domain-weights has no weight for ['paths', 'numbers']"),
        ({"domain_cap": 0.3}, "--domain-cap allows no weights that sum to 1: 0.3 + 0.3 + 0.3 ="),
        ({"domain_floor": "path=.1"}, "--domain-floor: no domain 'path'; did you mean 'paths'?"),
        ({"dominant_share": 0}, "--dominant-share is 0.0; wanted 1e-9 to 1"),
        (
            {"reweight": "schedule"},
            "--reweight schedule follows the phases of --domain-phases, which is not given",
        ),
        (
            {"domain_phases": "phases.yaml"},
            "--domain-phases phases.yaml is followed by --reweight schedule only, not by signed",
        ),
        ({"eval_tokens": 8}, "--eval-tokens 8 is less than one sequence of --seq-length 32"),
        ({"eval_share": 1e-6}, "--eval-share 1e-06 of 800 training sequences does not pay for 2"),
        ({"reweight_eta": -1}, "--reweight-eta is -1.0; wanted 0 to 1000"),
        ({"reweight_smoothing": 1}, "--reweight-smoothing is 1.0; wanted 0 or more, below 1"),
        ({"mask_lr": 0}, "--mask-lr is 0.0; wanted 1e-30 to 10000"),
        ({"adam_beta2": 1}, "--adam-beta2 is 1.0; wanted 0 or more, below 1"),
        ({"reference_loss": None}, "--reweight signed compares losses with --reference-loss"),
        ({"load": None}, "--load is not given; pruning starts from a checkpoint that"),
    ],
)
def test_a_setting_that_would_fail_later(
    refusal: Refusal, changes: dict[str, Any], wanted: str
) -> None:
    assert wanted in refusal.prune(**changes)


def test_weights_that_make_no_mixture(refusal: Refusal, caplog: pytest.LogCaptureFixture) -> None:
    error = refusal.prune("--domain-weights", "words=.5", "paths=.4", "numbers=.2")
    assert "--domain-weights sum to 1.1, wanted 1; in the same proportions: 0.45" in error
    error = refusal.prune(
        *("--domain-weights", "words=.6", "paths=.2", "numbers=.2"), domain_cap="words=.5"
    )
    assert "--domain-weights: words 0.6 is above 0.5, its --domain-floor or --domain-cap" in error
    error = refusal.prune(
        *("--domain-weights", "words=.8", "paths=.1", "numbers=.1"),
        reference_loss="gone.yaml",
        starts=True,
    )
    assert "words takes 80.0 % of the mixture by its given weight, more than --domin" in caplog.text
    assert "paths takes" not in caplog.text
    assert "--reference-loss: losses gone.yaml does not exist" in error


def test_references_of_other_domains(refusal: Refusal) -> None:
    reference = refusal.folder / "reference.yaml"
    reference.write_text("words: 3.0\npaths: 3.5\nwiki: 2.0\n")
    for policy in ("signed", "constant"):
        error = refusal.prune(reference_loss=reference, reweight=policy)
        assert re.search(
            r"--reference-loss: .*reference.yaml: no domain 'wiki'; the data have \['words', ",
            error,
        )


def test_references_that_cannot_be_made(refusal: Refusal) -> None:
    text, losses = refusal.text, refusal.folder / "losses.yaml"
    output = ("--output", refusal.folder / "reference.yaml")
    losses.write_text("1000: {wiki: 2.0}\n2000: {wiki: 1.9}\n")
    known = ("--losses", losses)
    for words, wanted in (
        (output, "no model is named; give checkpoints with --load, or files of losses with"),
        ((*output, "--load", text.checkpoint), "--load is evaluated on --data-path, which is not"),
        ((*output, *known), "--method power-law wants the size of what the model shall become; g"),
        ((*output, *known, "--params", 0), "--params is 0; wanted 1 to 1000000000000000000"),
        (
            (*output, *known, "--params", 9, "--target", "llama2-1.3b"),
            "--target llama2-1.3b and --params 9 both say how large the target is; give one",
        ),
        (
            (*output, *known, "--target", "llama2-3b"),
            "--target llama2-3b is neither a preset (llama2-7b, ",
        ),
        (
            (*output, "--load", text.checkpoint, "--data-path", text.data),
            "--seq-length is not given and ",
        ),
        (("--output", losses, *known, "--params", 9), "losses.yaml exists; choose another or re"),
    ):
        assert wanted in refusal("reference-loss", *words), words


def test_phases_that_overlap_or_name_other_domains(refusal: Refusal) -> None:
    phases = refusal.folder / "phases.yaml"
    even = "weights: {words: .4, paths: .3, numbers: .3}"
    for text, wanted in (
        (f"- {{start_step: 0, {even}}}\n" * 2, "phase 2 begins at start_step 0 and the phase be"),
        ("- {start_step: 0, weights: {word: 1}}", "phase 1: weights: no domain 'word'; did you"),
    ):
        phases.write_text(text)
        error = refusal.prune(reweight="schedule", reference_loss=None, domain_phases=phases)
        assert wanted in error
    phases.write_text(f"- {{start_step: 0, {even}}}\n")
    error = refusal.prune("--domain-weights", 1, reweight="schedule", domain_phases=phases)
    assert "both say how the mixture starts; leave --domain-weights out" in error


def test_an_evaluation_of_unknown_length(refusal: Refusal) -> None:
    wanted = "--seq-length is not given and .* of stage 'converted', was not trained by megashear"
    words = ["--load", refusal.text.checkpoint, "--data-path", refusal.text.data]
    assert re.search(wanted, refusal("evaluate", *words))


def test_scores_that_cannot_be_measured(refusal: Refusal) -> None:
    right = ["--load", refusal.text.checkpoint, "--data-path", refusal.text.data]
    output, length = ("--output", refusal.folder / "scores.json"), ("--seq-length", 32)
    wanted = "--seq-length is not given and .* of stage 'converted', was not trained by megashear"
    assert re.search(wanted, refusal("score", *right, *output))
    wanted = "--transformer-impl transformer_engine fuses norms with the layers after them, so that"
    impl = ("--transformer-impl", "transformer_engine")
    assert wanted in refusal("score", *right, *output, *length, *impl)
    split = ("--tensor-model-parallel-size", 3)
    wanted = "model num_query_groups 4 is not a multiple of --tensor-model-parallel-size 3"
    assert wanted in refusal("score", *right, *output, *length, *split, processes=3)
    (refusal.folder / "scores.json").touch()
    wanted = "scores.json exists; choose another or remove it first"
    assert wanted in refusal("score", *right, *output, *length)
    wanted = "--load is not given; name a checkpoint, or a Hugging Face directory with --load-hf"
    assert wanted in refusal("score", *right[2:], "--output", refusal.folder / "other.json")


def test_tasks_of_srun_that_do_not_know_each_other(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"srun started 8 tasks .* each with torchrun"):
        launch.distributed(ParallelConfig(), ModelConfig()).__enter__()


def test_an_unknown_key_names_the_nearest(refusal: Refusal) -> None:
    error = refusal.prune("--tensor-model-paralel-size", 2)
    assert "unknown flag --tensor-model-paralel-size; nearest known: " in error
    assert "--tensor-model-parallel-size" in error
    config = refusal.folder / "run.yaml"
    config.write_text("lr: 1e-4\ntrain-iter: 10\n")
    error = refusal.prune("--config", config)
    assert f"{config} line 2: unknown key train-iter; nearest known: train_iters" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no CUDA device")
def test_a_cuda_only_option_on_the_cpu(refusal: Refusal) -> None:
    wanted = (
        "--transformer-impl transformer_engine needs a CUDA device and none is found; use "
        "--transformer-impl local"
    )
    words = ["--load", refusal.text.checkpoint, "--data-path", refusal.text.data]
    words += ["--save", refusal.folder / "saved", "--seq-length", text_run.SEQUENCE]
    words += ["--reweight", "constant", "--transformer-impl", "transformer_engine"]
    assert wanted in refusal("pretrain", *words, starts=True)


def test_layers_whose_norms_know_no_masks(refusal: Refusal) -> None:
    error = refusal.prune(transformer_impl="transformer_engine")
    assert re.search(
        r"--transformer-impl transformer_engine is for continued pretraining: .*"
        r"fused norms divide by all of them.*not checked.* prune with --transformer-impl local, "
        r"`megashear cut`, and give the flag to `megashear pretrain`$",
        error,
    )


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"has no latest_checkpointed_iteration.txt, nor is it a Hugging Face directory",
    ),
    "a part missing": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "names model-00002-of-00003.safetensors, which is missing; download it again",
    ),
    "a part truncated": (
        lambda folder: truncate(folder / "model-00002-of-00003.safetensors"),
        "model-00002-of-00003.safetensors .* cannot be read as safetensors.*is truncated",
    ),
    "no weights": (
        lambda folder: list(map(Path.unlink, folder.glob("model*"))),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "another family": (
        lambda folder: edit_config(folder, model_type="gemma"),
        "model_type is 'gemma', wanted one of llama, mistral, qwen2, qwen3",
    ),
    "tied embeddings": (
        lambda folder: edit_config(folder, tie_word_embeddings=True),
        "lm_head.weight is not model.embed_tokens.weight; set it to false",
    ),
    "a field of another model": (
        lambda folder: edit_config(folder, clip_qkv=8.0),
        r"fields that megashear does not know.*: clip_qkv \(8.0\); if they do not, remove them",
    ),
    "another shape": (
        lambda folder: edit_config(folder, intermediate_size=128),
        r"mlp.gate_proj.weight has shape \[96, 40\], its shape in this model is \[128, 40\]",
    ),
    "a weight too much": (
        lambda folder: edit_weights(folder, lambda weights: weights.update(extra=torch.ones(2))),
        "index.json does not list extra of model-00002-of-00003.safetensors;",
    ),
    "a weight missing": (
        lambda folder: edit_weights(folder, lambda weights: weights.popitem()),
        r"index.json puts model.layers.* into model-00002-of-.*, it is in none of them",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_hugging_face_directory_that_is_no_whole_llama(refusal: Refusal, harm: str) -> None:
    model, output = refusal.folder / "model", refusal.folder / "converted"
    shape = replace(SHAPE, num_layers=2)
    weights = random_weights(shape).items()
    hf.write_directory(model, weights, shape, max_shard_bytes=100_000)
    assert (model / "model-00003-of-00003.safetensors").is_file()
    change, wanted = HARMS[harm]
    change(model)
    error = refusal("convert", "--input", model, "--output", output)
    assert re.search(wanted, error), error


def test_sequences_beyond_a_sliding_window(refusal: Refusal, tmp_path: Path) -> None:
    narrow = replace(SHAPE, family="mistral", sliding_window=text_run.SEQUENCE - 1)
    error = refusal.prune(load=text_run.write_checkpoint(tmp_path / "narrow", narrow))
    assert f"--seq-length {text_run.SEQUENCE} is longer than the model's sliding_window" in error
    assert f"lower it to at most {text_run.SEQUENCE - 1}" in error


def test_text_of_another_vocabulary_or_tokenizer(refusal: Refusal, tmp_path: Path) -> None:
    small = replace(SHAPE, vocab_size=200)
    error = refusal.prune(load=text_run.write_checkpoint(tmp_path / "small", small))
    wanted = r"/(\w+)\.bin, token \d+ is id (\d+), but the model has 200 ids .*preprocess again"
    assert (found := re.search(wanted, error)), error
    assert found[1].removesuffix("_heldout") in text_run.REFERENCE
    assert 200 <= int(found[2]) < 256
    lines = (refusal.text.jsonl / "paths.jsonl").read_text().splitlines()
    other = text_run.train_tokenizer([json.loads(line)["text"] for line in lines], tmp_path)
    text_run.write_checkpoint(tmp_path / "other", SHAPE, other)
    error = refusal.prune(load=tmp_path / "other")
    assert "was tokenised with another tokenizer than the model's" in error
    assert "preprocess again with --tokenizer-model" in error


@pytest.mark.parametrize(
    ("file", "change", "wanted"),
    [
        ("paths.idx", None, r"paths\.idx does not exist, though paths\.bin is there; copy both"),
        ("paths.bin", None, r"paths\.bin does not exist, though paths\.idx is there; copy both"),
        ("words_heldout.bin", 100, r"words_heldout\.bin has 100 bytes, but \S+idx \(\d+ bytes\)"),
        ("words.idx", 100, r"words\.idx has 100 bytes, its header wants \d+"),
        ("manifest.json", None, r"though it has \.bin files; data that Megatron-LM tokenised are"),
    ],
)
def test_data_that_are_not_whole(
    refusal: Refusal, file: str, change: int | None, wanted: str
) -> None:
    data = Path(shutil.copytree(refusal.text.data, refusal.folder / "data"))
    if change is None:
        (data / file).unlink()
    else:
        (data / file).write_bytes((data / file).read_bytes()[:change])
    for error in (
        refusal.prune(data_path=data),
        refusal("evaluate", "--load", refusal.text.checkpoint, "--data-path", data),
    ):
        assert re.search(wanted, error), error


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("", "domain 'broken' is empty"),
        ('{"text": "  "}\n\n', "domain 'broken' is empty"),
        ('{"text": "good"}\n{"text": "cut sho', "broken.jsonl, line 2 is not valid JSON"),
        ('{"text": "good"}\n\n["a list"]\n', "broken.jsonl, line 3 holds a list"),
        ('{"content": "good"}\n', "broken.jsonl, line 1 has no key 'text', only ['content']"),
        ('{"text": 1}\n', "domain 'broken' is empty: its 1 files hold no document"),
    ],
)
def test_an_empty_domain_or_a_broken_line(refusal: Refusal, lines: str, wanted: str) -> None:
    folder = refusal.folder / "jsonl"
    shutil.copytree(refusal.text.jsonl, folder)
    (folder / "broken.jsonl").write_text(lines)
    error = preprocess(refusal, folder, starts=True)  # --dry-run reads no text
    assert wanted in error


def test_a_tokenizer_that_is_none(refusal: Refusal) -> None:
    model = refusal.folder / "tokenizer.model"
    model.write_text("no protobuf")
    error = preprocess(refusal, refusal.text.jsonl, tokenizer=model)
    assert "tokenizer.model is not a SentencePiece model" in error


def preprocess(
    refusal: Refusal, folder: Path, *, tokenizer: Path | None = None, starts: bool = False
) -> str:
    return refusal(
        "preprocess",
        *("--input", folder, "--output", refusal.folder / "data"),
        *("--tokenizer-model", tokenizer or refusal.text.tokenizer),
        starts=starts,
    )


def test_output_that_exists(refusal: Refusal) -> None:
    text, taken = refusal.text, refusal.folder / "taken"
    taken.mkdir()
    (taken / "precious").write_text("do not lose me")
    tokenizer = ("--tokenizer-model", text.tokenizer)
    for words in (
        ("preprocess", "--input", text.jsonl, "--output", taken, *tokenizer),
        ("convert", "--input", text.checkpoint, "--output", taken),
        ("evaluate", "--load", text.checkpoint, "--data-path", text.data, "--output", taken),
    ):
        assert f"{taken} exists" in refusal(*words, starts=True), words
    pruned = pruned_checkpoint(refusal.folder / "pruned")
    assert f"{taken} exists" in refusal(*("cut", "--load", pruned, "--output", taken), starts=True)
    saved = text_run.write_checkpoint(refusal.folder / "saved", SHAPE)
    assert f"--save {saved} holds a run at step 0; add --resume" in refusal.prune(save=saved)


def pruned_checkpoint(output: Path) -> Path:
    """A pruning run's checkpoint as far as a refusal reads it."""
    text_run.write_checkpoint(output, SHAPE)
    edit_description(output, stage="prune")
    return output


def edit_description(checkpoint: Path, **fields: object) -> None:
    (path,) = checkpoint.glob("iter_*/megashear.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    integrity.write(path.parent)


def test_a_checkpoint_of_another_stage(refusal: Refusal) -> None:
    pruned, output = pruned_checkpoint(refusal.folder / "pruned"), refusal.folder / "output"
    error = refusal("convert", "--input", pruned, "--output", output, starts=True)
    assert "is of a pruning run" in error
    assert "`megashear cut`" in error
    error = refusal("cut", "--load", refusal.text.checkpoint, "--output", output)
    assert "is of stage 'converted' and has no masks; give one that megashear prune wrote" in error
    assert f"no checkpoint at {output}" in refusal.prune(load=output, starts=True)
    assert "--load is not given; pruning starts from a checkpoint" in refusal.prune(load=None)


def test_a_damaged_iteration_that_was_named(refusal: Refusal) -> None:
    saved = Path(shutil.copytree(refusal.text.checkpoint, refusal.folder / "damaged"))
    (directory,) = saved.glob("iter_*")
    (directory / "common.pt").unlink()
    for load in (saved, directory):
        error = refusal.prune(load=load)
        assert re.search(r"damaged/iter_0000000/common\.pt is missing; [0-9,]+ bytes were", error)


def test_curves_of_another_run(refusal: Refusal) -> None:
    events = refusal.folder / "curves"
    events.mkdir()
    (events / "events.out.tfevents.1.host").write_bytes(b"")
    error = refusal.prune(tensorboard_dir=events)
    assert f"--tensorboard-dir {events} has another run's curves in it; choose another" in error


def test_a_hugging_face_directory_to_start_from(refusal: Refusal) -> None:
    directory, text = refusal.folder / "hf", refusal.text
    weights = random_weights(SHAPE, scale=0.1)
    hf.write_directory(directory, weights.items(), SHAPE, max_shard_bytes=40_000)
    error = refusal.prune(load_hf=directory)
    assert f"--load {text.checkpoint} and --load-hf {directory} exclude each other" in error
    error = refusal.prune(load=None, load_hf=text.checkpoint)
    assert f"HF checkpoint {text.checkpoint} has no config.json" in error
    error = refusal.prune(load=None, load_hf=directory, tensor_model_parallel_size=3, processes=3)
    assert "model num_query_groups 4 is not a multiple of --tensor-model-parallel-size 3" in error
    data = ("--data-path", text.data, "--reweight", "constant")
    error = refusal("pretrain", "--load-hf", directory, "--init-shape", "llama2-370m", *data)
    assert f"--load-hf {directory} and --init-shape exclude each other" in error
    error = refusal("evaluate", "--data-path", text.data)
    assert "--load is not given; name a checkpoint, or a Hugging Face directory with" in error
    error = refusal("evaluate", "--load-hf", directory, "--data-path", text.data)
    assert f"--seq-length is not given and {directory}, of stage 'converted', was not" in error

    shard = next(directory.glob("model-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} (" in (error := refusal.prune(load=None, load_hf=directory))
    assert "it is truncated" in error
    shard.unlink()
    assert "which is missing; download it again" in refusal.prune(load=None, load_hf=directory)


def test_a_checkpoint_of_another_shape(refusal: Refusal) -> None:
    other = text_run.write_checkpoint(refusal.folder / "other", SHAPE)
    edit_description(other, shape=replace(SHAPE, ffn_hidden_size=128).to_dict())
    wanted = r"checkpoint .*other.* has shape \[\d+, \d+, \d+\], its shape in this model is"
    error = refusal("convert", "--input", other, "--output", refusal.folder / "output")
    assert re.search(wanted, error), error
    assert re.search(wanted, error := refusal.prune(load=other)), error
    error = refusal("evaluate", "--load", other, "--data-path", refusal.text.data)
    assert re.search(wanted, error), error


def test_a_run_of_another_target_is_not_gone_on_with(refusal: Refusal) -> None:
    pruned = pruned_checkpoint(refusal.folder / "pruned")
    edit_description(
        pruned, details={"target_shape": replace(SHAPE, num_layers=3, hidden_size=32).to_dict()}
    )
    error = refusal.prune(load=pruned)
    assert "was pruned towards hidden_size 32, and the target now has 24" in error
    assert "add --finetune" in error


@pytest.mark.scenario
def test_every_process_of_torchrun_ends_at_once(text: TextRun, tmp_path: Path) -> None:
    begin = time.monotonic()
    result = torchrun(
        3,
        *("prune", "--load", text.checkpoint, "--data-path", text.data),
        *("--reference-loss", text.reference, "--save", tmp_path / "saved"),
        *("--tensor-model-parallel-size", 2, "--target-hidden-size", 24),
        timeout_s=NOT_HANGING_S,
    )
    assert result.returncode != 0
    line = "megashear prune: error: world size 3 is not a multiple of"
    # once where it was met, and once below the traceback that torchrun itself prints
    assert result.stderr.count(line) == 2
    assert f"traceback : {line}" in result.stderr.rpartition("Traceback")[2]
    assert "error on rank" not in result.stderr
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - begin < NOT_HANGING_S


@pytest.mark.scenario
def test_a_checkpoint_cut_short_ends_every_process(text: TextRun, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(text.checkpoint, tmp_path / "damaged"))
    largest = max(damaged.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    result = torchrun(
        2,
        *("evaluate", "--load", damaged, "--data-path", text.data, "--output", tmp_path / "out"),
        *("--tensor-model-parallel-size", 2, "--seq-length", text_run.SEQUENCE),
        timeout_s=NOT_HANGING_S,
    )
    assert result.returncode != 0
    assert "no whole checkpoint in " in result.stderr
    assert "copy one there again" in result.stderr
    assert not (tmp_path / "out").exists()
