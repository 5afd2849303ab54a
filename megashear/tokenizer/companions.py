"""The files of a tokenizer: their names, and what those beside its model say of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.files.regular import open_regular
from megashear.files.structured import read_json_object

SENTENCEPIECE_NAME = "tokenizer.model"
HUGGING_FACE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
COMPANION_NAMES = (
    SENTENCEPIECE_NAME,
    HUGGING_FACE_NAME,
    CONFIG_NAME,
    SPECIAL_NAME,
    ADDED_NAME,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that describe one tokenizer in a Hugging Face model directory."""
CARRIED = (
    *COMPANION_NAMES,
    "tekken.json",
    "tokenizer.model.v3",
    "generation_config.json",
    "chat_template.json",
)
"""Files that checkpoints carry along, as Hugging Face directories spell them."""

_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the vocabulary of a model."""

    number: int
    """Id of the token."""
    content: str
    """Text of the token."""
    special: bool
    """Whether the token never comes from text."""
    rest: tuple[tuple[str, bool], ...] = ()
    """Options by which the tokenizers library finds the token in text."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the tokenizers library for this token."""
        return {"content": self.content, **dict(self.rest)}


def declared(path: Path) -> dict[int, AddedToken]:
    """Return the tokens that the files beside a tokenizer add, by id, as transformers 5 reads them.

    They are those of ``added_tokens_decoder`` in tokenizer_config.json; without it those of
    added_tokens.json, in which a token is special if another file calls it so.

    Raises:
        ValueError: the files cannot be read.
    """
    file = path.with_name(CONFIG_NAME)
    config = _read(file)
    try:
        if "added_tokens_decoder" in config:
            return {
                int(number): AddedToken(
                    int(number),
                    str(token["content"]),
                    bool(token.get("special")),
                    tuple((name, bool(token[name])) for name in _OPTIONS if name in token),
                )
                for number, token in config["added_tokens_decoder"].items()
            }
        file = path.with_name(ADDED_NAME)
        found = _read(file)
        special = _special_names(config) | _special_names(_read(path.with_name(SPECIAL_NAME)))
        return {
            int(number): AddedToken(
                int(number), name, name in special, (("normalized", name not in special),)
            )
            for name, number in found.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not list added tokens by their ids: {error}") from None


def _special_names(values: Mapping[str, Any]) -> set[str]:
    names = set()
    for key, value in values.items():
        if key.endswith(("_token", "_tokens")):
            tokens = value if isinstance(value, list) else [value]
            names |= {str(t.get("content") if isinstance(t, dict) else t) for t in tokens}
    return names


def named(path: Path, key: str) -> tuple[Path, str | None] | None:
    """Return the file beside a tokenizer that names ``key``, and the name; None where none does.

    The name is None where that file says that there is no such token.
    """
    config = _read(path.with_name(CONFIG_NAME))
    order = [CONFIG_NAME, SPECIAL_NAME]
    if "added_tokens_decoder" not in config:
        order.reverse()  # like transformers, which then takes the other file for a leftover
    for name in order:
        file = path.with_name(name)
        values = config if name == CONFIG_NAME else _read(file)
        if key not in values:
            continue
        token = values[key]
        token = token.get("content") if isinstance(token, dict) else token
        if token != "":  # "" says nothing; early conversions of LLaMA have it
            return file, None if token is None else str(token)
    return None


def declared_ids(path: Path) -> dict[str, int]:
    """Return the ids of the tokens that the files beside a tokenizer add, by their text.

    Raises:
        ValueError: the files cannot be read.
    """
    return {token.content: token.number for token in declared(path).values()}


def of_another(file: Path, key: str, token: str, path: Path) -> ValueError:
    """Return the error for a ``file`` that names a token which the tokenizer in ``path`` lacks."""
    return ValueError(
        f"{file} names {key} {token!r}, which {path} does not have; the two files belong to "
        f"different tokenizers"
    )


def some(names: Sequence[str]) -> str:
    """Return the first few names, for messages."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamps_of(files: Iterable[Path]) -> tuple[tuple[Path, int, int], ...]:
    """Return path, time of change and size of each file that exists; equal while none changes."""
    found = [(file, file.stat()) for file in files if file.exists()]
    return tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in found)


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is no file."""
    return read_json_object(file, wide_integers=True) if file.exists() else {}
