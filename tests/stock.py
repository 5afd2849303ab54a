"""A model whose exported tokenizer cuts and decodes text as its own does, in both forms."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import write_weights
from megashear.shape import ModelShape
from tests.conversions import megatron_to_hf
from tests.reference_llama import random_weights
from tests.text_run import SHAPE
from tests.texts import DOMAIN_MODULES, docstrings

STOCK = dataclasses.replace(SHAPE, vocab_size=401)
"""Odd, so that two tensor ranks have a row of padding."""
UNSAID = 259
"""Special tokens and bytes, which the two decoders print differently where they make no text: the
model never says them."""


class Stock(NamedTuple):
    """One model in both forms that a command loads."""

    shape: ModelShape
    tokenizer: Path
    checkpoint: Path
    hf: Path


@functools.cache
def make(folder: Path) -> Stock:
    """Make everything in ``folder``, once."""
    folder.mkdir()
    lines = [
        line
        for modules in DOMAIN_MODULES.values()
        for text in docstrings(*modules)
        for line in text.splitlines()
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=STOCK.vocab_size - 1,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = folder / "tokenizer.model"
    weights = random_weights(STOCK, seed=1)
    weights["lm_head.weight"][:UNSAID] = 0.0  # below the largest of random logits
    described = Description(shape=STOCK, iteration=0, stage="converted")
    write_weights(folder / "checkpoint", weights, described, tokenizer=tokenizer)
    megatron_to_hf(folder / "checkpoint", folder / "hf", progress=False)
    return Stock(STOCK, tokenizer, folder / "checkpoint", folder / "hf")
