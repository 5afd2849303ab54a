"""The made-up chat set of the examples, and a tokenizer with a template."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from megashear.shape import ModelShape
from tests import text_run
from tests.texts import preprocess

SET = Path(__file__).parents[1] / "examples" / "chat" / "colours" / "colours.jsonl"
"""Questions and answers; a third of the conversations asks twice."""
CHAT_ML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCAB = 340
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=VOCAB,
    max_position_embeddings=128,
)
SEQUENCE = 96


class ChatRun(NamedTuple):
    """What a run needs; tests only read it."""

    tokenizer: Path
    """Directory of a tokenizer with a template."""
    data: Path
    """The conversations, preprocessed."""
    checkpoint: Path
    """Random weights of ``SHAPE``, with a tokenizer of another template."""


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SET.read_text().splitlines()]


def answers() -> dict[str, str]:
    """The answer about each thing, as the first question about it has it."""
    found = {}
    for record in records():
        question, answer = (message["content"] for message in record["messages"][:2])
        if asked := re.fullmatch(r"What colour is (.+)\?", question):
            found[asked[1]] = answer
    return found


def messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn)
    ]


def write_records(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tokenizer(folder: Path, template: str | None = CHAT_ML) -> Path:
    """A byte-level tokenizer in the files of a Hugging Face directory."""
    folder.mkdir(parents=True)
    made = tokenizers.Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for record in records() for message in record["messages"]]
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def make(folder: Path) -> ChatRun:
    """Make everything in ``folder``, once."""
    folder.mkdir()
    tokenizer = write_tokenizer(folder / "tokenizer")
    preprocess(
        {"colours": [SET]},
        folder / "data",
        tokenizer,
        chat_format="template",
        held_out_fraction=0.15,
    )
    other = write_tokenizer(folder / "other", template="{{ 'of the base model' }}")
    text_run.write_checkpoint(folder / "checkpoint", SHAPE, other)
    return ChatRun(
        tokenizer=tokenizer,
        data=folder / "data",
        checkpoint=folder / "checkpoint",
    )
