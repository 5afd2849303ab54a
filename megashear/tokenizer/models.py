"""SentencePiece and Hugging Face tokenizers under one interface."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from megashear.files.regular import open_regular, read_bytes
from megashear.files.structured import LARGE_JSON_BYTES
from megashear.tokenizer.companions import (
    COMPANION_NAMES,
    HUGGING_FACE_NAME,
    SENTENCEPIECE_NAME,
    AddedToken,
    declared,
    named,
    of_another,
    sha256_of,
    some,
)
from megashear.tokenizer.pieces import encode_rendered

WELL_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
WELL_KNOWN_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
"""Names tried where nothing beside a tokenizer.json says which tokens begin and end a text."""

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\n")


class Tokenizer(ABC):
    """Turns text into token ids and back, whatever library made the file."""

    vocab_size: int
    """Largest id that the tokenizer can give, plus 1: the least number of rows of an embedding."""
    bos_id: int | None
    """Id that begins a document; None where the tokenizer has no such token."""
    eos_id: int | None
    """Id that ends a document; None where the tokenizer has no such token."""
    note: str | None = None
    """Warning for the user about the choice between several files; None where there is none."""

    added_fingerprint: str | None = None
    """SHA-256 of the tokens that the files beside the model add to it; None where they add none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._goes_alone = path.name not in COMPANION_NAMES
        """Whether to ignore files beside it: they may belong to another model's tokenizer."""
        self.fingerprint = sha256_of(path)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without special tokens.

        A special token spelled out in the text is encoded as its letters: a document that talks
        about ``</s>`` must not end there.
        """

    @abstractmethod
    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text that a chat template wrote, and where each of them ends.

        A special token spelled out in the text is that token, as the template means it.

        Returns:
            Ids, and the number of characters up to the end of each.
        """

    @property
    @abstractmethod
    def special_tokens(self) -> frozenset[str]:
        """Texts of the tokens that never come from text."""

    @abstractmethod
    def token(self, number: int) -> str:
        """Return the text of a token as the vocabulary spells it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special tokens leave no trace."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The model file, then the files that belong beside it in an exported directory."""
        if self._goes_alone:
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
    """A SentencePiece ``*.model``, as LLaMA-1 and -2 ship it.

    Args:
        path: path of the file.
        alone: take BOS and EOS from the model; else from the files beside a tokenizer.model, as
            far as they name them.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        import sentencepiece

        super().__init__(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(_not_sentencepiece(path, error)) from error
        alone = alone or self._goes_alone
        self._added = {} if alone else declared(path)
        self.bos_id = _present(self._model.bos_id())
        self.eos_id = _present(self._model.eos_id())
        if not alone:
            self.bos_id = self._special_id("bos_token", self.bos_id)
            self.eos_id = self._special_id("eos_token", self.eos_id)
        used = [number for number in (self.bos_id, self.eos_id) if number is not None]
        self.vocab_size = max([self._model.get_piece_size(), *(number + 1 for number in used)])
        if unknown := [t.content for t in self._added.values() if self.lacks(t)]:
            self.note = (
                f"{path} lacks {len(unknown)} tokens that the files beside it add "
                f"({some(unknown)}): text that spells them is cut into letters; to use their "
                f"ids, save the tokenizer as {HUGGING_FACE_NAME} with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; see ``Tokenizer.encode``."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids and their ends; see ``Tokenizer.encode_rendered``."""
        return encode_rendered(self._model, self._specials, text)

    @property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the tokens that never come from text."""
        return frozenset(self._specials)

    def token(self, number: int) -> str:
        """Return the text of a token; see ``Tokenizer.token``."""
        if number in self._added:
            return self._added[number].content
        piece: str = self._model.id_to_piece(number)
        return piece

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        """Ids of the special tokens by their text; SentencePiece always has one, <unk>."""
        model = self._model
        pieces = range(model.get_piece_size())
        found = {
            model.id_to_piece(n): n for n in pieces if model.is_control(n) or model.is_unknown(n)
        }
        return found | {t.content: t.number for t in self._added.values() if t.special}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; see ``Tokenizer.decode``."""
        size = self._model.get_piece_size()
        text: str = self._model.decode([number for number in ids if number < size])
        return text

    def lacks(self, token: AddedToken) -> bool:
        """Return whether a token can come from text and is not a piece of the model with its id."""
        return not token.special and self._piece_id(token.content) != token.number

    def _piece_id(self, token: str) -> int | None:
        number: int = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None

    def _special_id(self, key: str, own: int | None) -> int | None:
        naming = named(self.path, key)
        if naming is None:
            return own
        file, token = naming
        if token is None:
            return None
        ids = {added.content: added.number for added in self._added.values()}
        found = ids.get(token, self._piece_id(token))
        if found is None:
            raise of_another(file, key, token, self.path)
        return found


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the tokenizers library, with the tokens that the files beside it add.

    The library's reading of it is what ``AutoTokenizer`` gives, unless tokenizer_config.json names
    a class of transformers with rules of its own.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        super().__init__(path)
        try:
            content = read_bytes(path, LARGE_JSON_BYTES).decode("utf-8")
            self._model = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{path} is not a {HUGGING_FACE_NAME} of the tokenizers library "
                f"({str(error)[:80].strip()})"
            ) from error
        # Files keep the settings of the code that trained them: a truncation left on would
        # silently cut every document.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        if not self._goes_alone:
            self._add(declared(path))
        # Where ids have gaps, the count of tokens is too small.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._special_id("bos_token", WELL_KNOWN_BOS)
        self.eos_id = self._special_id("eos_token", WELL_KNOWN_EOS)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; see ``Tokenizer.encode``."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids and their ends; see ``Tokenizer.encode_rendered``."""
        self._model.encode_special_tokens = False
        try:
            found = self._model.encode(text, add_special_tokens=False)
        finally:
            self._model.encode_special_tokens = True
        return found.ids, [end for _, end in found.offsets]

    @property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the tokens that never come from text."""
        return frozenset(token.content for token in self.added if token.special)

    def token(self, number: int) -> str:
        """Return the text of a token; see ``Tokenizer.token``."""
        return str(self._model.id_to_token(number))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; see ``Tokenizer.decode``."""
        text: str = self._model.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def added(self) -> list[AddedToken]:
        """Tokens beside the vocabulary of the model, by id."""
        found = self._model.get_added_tokens_decoder()
        return [AddedToken(n, token.content, token.special) for n, token in sorted(found.items())]

    def _add(self, declared: Mapping[int, AddedToken]) -> None:
        """Add the tokens that the files beside tokenizer.json declare and it lacks."""
        import tokenizers

        known = {token.content for token in self.added}
        lacking = [
            (n, token) for n, token in sorted(declared.items()) if token.content not in known
        ]
        if lacking:
            self.added_fingerprint = hashlib.sha256(repr(lacking).encode()).hexdigest()
        for number, token in lacking:
            self._model.add_tokens([tokenizers.AddedToken(**token.options, special=token.special)])
            found = self._model.token_to_id(token.content)
            if found != number:
                raise ValueError(
                    f"the files beside {self.path} give {token.content!r} the id {number}, and it "
                    f"would get {found}; they belong to different tokenizers"
                )

    def _special_id(self, key: str, well_known: Sequence[str]) -> int | None:
        """Return the id of the token that the files beside the model name ``key``."""
        naming = named(self.path, key)
        if naming is not None:
            file, token = naming
            if token is None:  # declared missing, as Qwen declares its bos_token
                return None
            found: int | None = self._model.token_to_id(token)
            if found is None:
                raise of_another(file, key, token, self.path)
            return found
        for name in well_known:
            known: int | None = self._model.token_to_id(name)
            if known is not None:
                return known
        return None


def _not_sentencepiece(path: Path, error: Exception) -> str:
    """Return the message for a ``.model`` file that SentencePiece cannot read."""
    with open_regular(path) as stream:
        is_tiktoken = _TIKTOKEN.match(stream.read(1024)) is not None
    if is_tiktoken:
        return (
            f"{path} is not a SentencePiece model but tiktoken's, as LLaMA-3 was published with; "
            f"give its {HUGGING_FACE_NAME}, which lies beside the model in Hugging Face's format"
        )
    return (
        f"{path} is not a SentencePiece model ({str(error)[:80].strip()}); for a tokenizer of "
        f"another kind give its {HUGGING_FACE_NAME}"
    )


def _present(token_id: int) -> int | None:
    """Return None for the -1 that SentencePiece gives for a special token that it lacks."""
    return token_id if token_id >= 0 else None
