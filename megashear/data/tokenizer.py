"""SentencePiece and Hugging Face tokenizers behind one interface."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SENTENCEPIECE_NAME = "tokenizer.model"
HUGGING_FACE_NAME = "tokenizer.json"
COMPANION_NAMES = (
    SENTENCEPIECE_NAME,
    HUGGING_FACE_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that describe one tokenizer in a Hugging Face model directory."""

WELL_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
WELL_KNOWN_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
"""Names looked for when nothing beside a tokenizer.json says which tokens begin and end a text."""


class Tokenizer(ABC):
    """Text to token ids and back, whatever library made the file."""

    vocab_size: int
    """One more than the largest id the tokenizer can give, so at least rows of an embedding."""
    bos_id: int | None
    """Id that begins a document; None where the tokenizer has none."""
    eos_id: int | None
    """Id that ends a document; None where the tokenizer has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self.fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens.

        A special token spelled out in the text is encoded as the letters it is made of: a
        document that talks about ``</s>`` must not end there.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens leave no trace."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The model file, then what belongs beside it in an exported model directory."""
        if self.path.name not in COMPANION_NAMES:
            # A file of another name may share its directory with another model's tokenizer.
            return (self.path,)
        beside = (self.path.with_name(name) for name in COMPANION_NAMES)
        return (self.path, *(file for file in beside if file != self.path and file.is_file()))

    def copy_to(self, directory: Path) -> list[Path]:
        """Copy the tokenizer's files into ``directory``, which ``load_tokenizer`` then reads.

        The model file gets its standard name (tokenizer.model or tokenizer.json).

        Returns:
            The files written, the model file first.
        """
        directory.mkdir(parents=True, exist_ok=True)
        standard = HUGGING_FACE_NAME if self.path.suffix == ".json" else SENTENCEPIECE_NAME
        names = [standard, *(file.name for file in self.files[1:])]
        return [
            Path(shutil.copyfile(file, directory / name)) for file, name in zip(self.files, names)
        ]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``*.model``, as LLaMA-1 and -2 ship it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        super().__init__(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({str(error)[:80].strip()}); for a tokenizer "
                f"of another kind, such as LLaMA-3's tiktoken file, give its {HUGGING_FACE_NAME}"
            ) from error
        self.vocab_size = self._model.get_piece_size()
        self.bos_id = _present(self._model.bos_id())
        self.eos_id = _present(self._model.eos_id())

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; see ``Tokenizer.encode``."""
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; see ``Tokenizer.decode``."""
        text: str = self._model.decode(list(ids))
        return text


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the tokenizers library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        super().__init__(path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{path} is not a {HUGGING_FACE_NAME} of the tokenizers library "
                f"({str(error)[:80].strip()})"
            ) from error
        # Files are saved with the settings of the code that trained them: a truncation left on
        # would silently cut every document.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        # The count of tokens is too small where ids have gaps.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._special_id("bos_token", WELL_KNOWN_BOS)
        self.eos_id = self._special_id("eos_token", WELL_KNOWN_EOS)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; see ``Tokenizer.encode``."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; see ``Tokenizer.decode``."""
        text: str = self._model.decode(list(ids), skip_special_tokens=True)
        return text

    def _special_id(self, key: str, well_known: Sequence[str]) -> int | None:
        """Id of the token that the files beside the model name ``key``."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = self.path.with_name(name)
            named = _read_json(file) if file.is_file() else {}
            if key not in named:
                continue
            token = named[key]["content"] if isinstance(named[key], dict) else named[key]
            if token is None:  # said not to exist, as Qwen says of its bos_token
                return None
            found: int | None = self._model.token_to_id(token)
            if found is None:
                raise ValueError(
                    f"{file} names {key} {token!r}, which {self.path} does not have; "
                    f"the two files belong to different tokenizers"
                )
            return found
        for token in well_known:
            known: int | None = self._model.token_to_id(token)
            if known is not None:
                return known
        return None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in a model directory.

    Args:
        path: a SentencePiece ``*.model``, a Hugging Face ``tokenizer.json``, or a directory that
            holds tokenizer.model or tokenizer.json (the first is taken where both are there).

    Raises:
        ValueError: nothing there, or nothing there is a tokenizer of these two kinds.
    """
    path = Path(path)
    if path.is_dir():
        for name in (SENTENCEPIECE_NAME, HUGGING_FACE_NAME):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise ValueError(
            f"no tokenizer in {path}: it holds neither {SENTENCEPIECE_NAME} nor "
            f"{HUGGING_FACE_NAME}; give the file itself if it has another name"
        )
    if not path.is_file():
        raise ValueError(f"tokenizer {path} does not exist")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise ValueError(
        f"tokenizer {path} ends in neither .model (SentencePiece) nor .json (Hugging Face); "
        f"give one of these or a directory that holds one"
    )


def _present(token_id: int) -> int | None:
    """SentencePiece says -1 for a special token that its model lacks."""
    return token_id if token_id >= 0 else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; an object is wanted")
    return value
