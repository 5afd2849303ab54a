"""Real text and real tokenizers, made once for each test session."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from megashear.data.manifest import DataManifest
from tests.texts import DOMAIN_MODULES, docstrings, preprocess, write_jsonl


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Documents of three domains of unequal size."""
    return {name: docstrings(*modules) for name, modules in DOMAIN_MODULES.items()}


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory, texts) -> Path:
    """A SentencePiece model of 300 pieces."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            line for each in texts.values() for t in each for line in t.split("\n")
        ),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def hugging_face_file(tmp_path_factory: pytest.TempPathFactory, texts) -> Path:
    """A byte-level tokenizer.json of 300 tokens, saved with a truncation that must not act."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(
        (text for each in texts.values() for text in each),
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<end>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model.enable_truncation(4)
    file = tmp_path_factory.mktemp("hugging_face") / "tokenizer.json"
    model.save(str(file))
    return file


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts) -> dict[str, list[Path]]:
    """One jsonl file a domain."""
    folder = tmp_path_factory.mktemp("jsonl")
    return {name: [write_jsonl(folder / f"{name}.jsonl", each)] for name, each in texts.items()}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, jsonl, sentencepiece_file: Path) -> DataManifest:
    """The three domains, tokenised."""
    output = tmp_path_factory.mktemp("data") / "tokenised"
    return preprocess(jsonl, output, sentencepiece_file, held_out_fraction=0.1)


@pytest.fixture
def untouched(tmp_path: Path, data: DataManifest) -> DataManifest:
    """A copy of the data that no other test has read, so no index is cached beside it."""
    copy = Path(shutil.copytree(data.directory, tmp_path / "copy"))
    for folder in data.names:
        shutil.rmtree(copy / folder, ignore_errors=True)
    return data.moved(copy)


@pytest.fixture
def tokenise(tmp_path: Path, sentencepiece_file: Path) -> Callable[..., DataManifest]:
    """Preprocess given texts as one domain ``prose``; keywords go to ``preprocess``."""

    def run(texts: list[Any], output: str = "out", **options) -> DataManifest:
        file = write_jsonl(tmp_path / "in" / f"{output}.jsonl", texts)
        return preprocess({"prose": [file]}, tmp_path / output, sentencepiece_file, **options)

    return run
