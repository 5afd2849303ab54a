"""Seven domains of RedPajama under LLaMA's tokenizer, from jsonl to a Hugging Face model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from megashear.__main__ import main
from megashear.conversion import hf
from megashear.shape import ModelShape
from tests import text_run
from tests.end_to_end.torchrun import ROOT, torchrun
from tests.reference_llama import random_weights

SHARED = ROOT.parent / "shared" / "data"
TEXT, TOKENIZER = SHARED / "redpajama_sample", SHARED / "llama_tokenizer.model"
pytestmark = pytest.mark.skipif(
    not (TEXT.is_dir() and TOKENIZER.is_file()),
    reason="no RedPajama sample and LLaMA tokenizer in ../shared/data beside the repository",
)

DOMAINS = ("arxiv", "book", "c4-rp", "cc", "github", "stackexchange", "wiki")
SOURCE = ModelShape(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=16,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=160,
    vocab_size=32000,
)
TARGET = {
    "target_num_layers": 2,
    "target_hidden_size": 32,
    "target_num_attention_heads": 4,
    "target_num_query_groups": 2,
    "target_ffn_hidden_size": 80,
}
ITERATIONS, WARMUP = 80, 30
DOCUMENTS, CHARACTERS = 60, 20_000
"""Of a domain's documents and of each, so that tokenisation and the last evaluation end soon."""
SPARSITY_GAP = 0.1
"""Of the expected sparsity at the end from its target. The controller swings around its target,
and two swings of 80 steps end within .05, measured."""


@pytest.mark.scenario
def test_llama_is_sheared_on_redpajama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: object) -> str:
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    text, data = sample(tmp_path / "text"), tmp_path / "data"
    source, megatron = tmp_path / "source", tmp_path / "megatron"
    printed = call("preprocess", "--input", text, "--output", data, "--tokenizer-model", TOKENIZER)
    assert [line.split()[0] for line in printed.splitlines()[:-2]] == list(DOMAINS)
    weights = random_weights(SOURCE, scale=0.05)
    hf.write_directory(source, weights.items(), SOURCE, tokenizer=TOKENIZER)
    call("convert", "--input", source, "--output", megatron)

    pruned, events = tmp_path / "pruned", tmp_path / "events"
    reference = tmp_path / "reference.yaml"
    reference.write_text(json.dumps(dict.fromkeys(DOMAINS, 8.0)))
    result = torchrun(
        4,
        "prune",
        *("--load", megatron, "--data-path", data, "--save", pruned, "--tensorboard-dir", events),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        *("--train-iters", ITERATIONS, "--sparsity-warmup-iters", WARMUP, "--lr", 3e-3),
        *("--lr-warmup-iters", 5, "--log-interval", 5, "--eval-interval", 20),
        *("--eval-sequences", 2, "--seq-length", 64, "--global-batch-size", 4),
        *("--micro-batch-size", 2, "--mask-noise-streams", 2, "--reference-loss", reference),
        *(word for k, v in TARGET.items() for word in (f"--{k.replace('_', '-')}", v)),
    )
    assert result.returncode == 0, result.stderr

    points = text_run.scalars(events)
    losses = points["train/lm-loss"]
    assert losses[ITERATIONS] < losses[5] - 0.5, losses
    for kind in ("hidden", "head", "group", "intermediate", "layer"):
        wanted, found = (
            points[f"prune/{which}-sparsity/{kind}"] for which in ("target", "expected")
        )
        assert wanted[5] < 0.2 < 0.45 < wanted[WARMUP] <= wanted[ITERATIONS] == 0.5
        assert found[5] < 0.2  # follows its target from the first step on
        assert found[ITERATIONS] == pytest.approx(wanted[ITERATIONS], abs=SPARSITY_GAP), kind

    cut, sheared = tmp_path / "cut", tmp_path / "sheared"
    call("cut", "--load", pruned, "--output", cut, "--exact-target")
    call("convert", "--input", cut, "--output", sheared)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(sheared, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sheared)
    assert model.config.num_hidden_layers == TARGET["target_num_layers"]
    assert model.config.num_attention_heads == TARGET["target_num_attention_heads"]
    assert model.config.num_key_value_heads == TARGET["target_num_query_groups"]
    ids = tokenizer("Shearing a LLaMA", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert model(ids).logits.isfinite().all()


def sample(folder: Path) -> Path:
    """The first documents of every domain, with all their keys."""
    folder.mkdir()
    for name in DOMAINS:
        with (TEXT / f"{name}.jsonl").open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in itertools.islice(lines, DOCUMENTS)]
        cut = [record | {"text": record["text"][:CHARACTERS]} for record in records]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in cut))
    return folder
