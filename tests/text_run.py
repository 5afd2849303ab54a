"""Real text, a tokenizer and a starting checkpoint for short runs of the real commands."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import write_weights
from megashear.shape import ModelShape
from tests.reference_llama import random_weights
from tests.texts import DOMAIN_MODULES, docstrings, preprocess, write_jsonl

VOCAB = 256
SEQUENCE = 32
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=VOCAB,
    max_position_embeddings=64,
)
TARGET: dict[str, Any] = {
    "target_num_layers": 3,
    "target_hidden_size": 24,
    "target_num_attention_heads": 2,  # of the two in each group one
    "target_num_query_groups": 2,
    "target_ffn_hidden_size": 56,
}
REFERENCE = {"words": 3.0, "paths": 3.5, "numbers": 2.0}
"""Reference losses, nats per token; far apart, so that every evaluation moves the mixture."""


class TextRun(NamedTuple):
    """What a run needs; tests only read it."""

    jsonl: Path
    """Directory of three jsonl files."""
    tokenizer: Path
    """SentencePiece model of ``VOCAB`` pieces."""
    data: Path
    """The same text, preprocessed."""
    checkpoint: Path
    """Random weights of ``SHAPE``, with the tokenizer."""
    reference: Path
    """YAML of ``REFERENCE``."""


def train_tokenizer(texts: list[str], folder: Path, *, vocab_size: int = VOCAB) -> Path:
    """A SentencePiece model with byte fallback, as LLaMA's is."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@functools.cache
def make(folder: Path) -> TextRun:
    """Make everything in ``folder``, once."""
    folder.mkdir()
    texts = {name: docstrings(*modules) for name, modules in DOMAIN_MODULES.items()}
    for name, each in texts.items():
        write_jsonl(folder / "jsonl" / f"{name}.jsonl", each)
    tokenizer = train_tokenizer([text for each in texts.values() for text in each], folder)
    files = {name: [folder / "jsonl" / f"{name}.jsonl"] for name in texts}
    preprocess(files, folder / "data", tokenizer, held_out_fraction=0.04)
    write_checkpoint(folder / "checkpoint", SHAPE, tokenizer)
    (folder / "reference.yaml").write_text(json.dumps(REFERENCE))  # JSON is YAML
    return TextRun(
        jsonl=folder / "jsonl",
        tokenizer=tokenizer,
        data=folder / "data",
        checkpoint=folder / "checkpoint",
        reference=folder / "reference.yaml",
    )


def write_checkpoint(output: Path, shape: ModelShape, tokenizer: Path | None = None) -> Path:
    """Random weights as a converted checkpoint."""
    description = Description(shape=shape, iteration=0, stage="converted")
    # small weights, or the loss starts far above that of a uniform guess
    weights = random_weights(shape, scale=0.1)
    write_weights(output, weights, description, tokenizer=tokenizer)
    return output


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Points of every tag in a directory of TensorBoard event files, by step; none twice."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    points = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        points[tag] = {event.step: event.value for event in events}
        assert len(points[tag]) == len(events), f"{tag} has a step twice"
    return points
