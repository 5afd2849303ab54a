"""The files of a tokenizer that travel with a checkpoint, and the ids of its special tokens."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megashear.files.pointers import refuse_pointer
from megashear.files.structured import LARGE_JSON_BYTES, read_json_object
from megashear.tokenizer import fast_tokenizer
from megashear.tokenizer.choice import preferred
from megashear.tokenizer.companions import (
    CARRIED,
    COMPANION_NAMES,
    declared_ids,
    sha256_of,
    stamps_of,
)
from megashear.tokenizer.models import SentencePieceTokenizer, Tokenizer

TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates, ``*.jinja``, that checkpoints carry along too."""


def find(source: Path | str | Iterable[Path | str] | None) -> list[Path]:
    """Find the tokenizer's files among ``source``.

    Args:
        source: a directory, of which the `CARRIED` files and `TEMPLATES` are taken; or files, all
            of which are taken (``x.model`` counts as ``tokenizer.model``); None gives no files.

    Raises:
        ValueError: the directory or a file does not exist, a file's name is not in `CARRIED`, or a
            file is a pointer of Git LFS.
    """
    if source is None:
        return []
    if isinstance(source, Path | str):
        source = Path(source)
        if source.is_dir():
            named = [source / name for name in CARRIED if (source / name).is_file()]
            for path in named:
                refuse_pointer(path)
            templates = sorted((source / TEMPLATES).glob("*.jinja"))
            return named + [path for path in templates if path.is_file()]
        source = [source]
    files = [Path(path) for path in source]
    for path in files:
        if not path.is_file():
            raise ValueError(f"tokenizer file {path} does not exist")
        refuse_pointer(path)
        if _carried_name(path) not in CARRIED and path.parent.name != TEMPLATES:
            raise ValueError(
                f"{path} is not a tokenizer file: its name is none of {', '.join(CARRIED)}"
            )
    return files


def copy(files: Sequence[Path], directory: Path) -> None:
    """Copy ``files`` into ``directory`` under the names that transformers looks for."""
    for path in files:
        target = directory / _carried_name(path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def copy_for_transformers(files: Sequence[Path], directory: Path) -> None:
    """Copy ``files``; beside a bare SentencePiece model, also write what transformers needs.

    Raises:
        ValueError: the SentencePiece model cannot be read.
    """
    copy(files, directory)
    names = {_carried_name(path) for path in files}
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        fast_tokenizer.write_for_transformers(directory / "tokenizer.model", directory)


def fingerprint(files: Sequence[Path]) -> str | None:
    """Return the SHA-256 of the file that fixes the token ids; None where there is none.

    `megashear.tokenizer.choice` chooses between tokenizer.model and tokenizer.json.
    """
    chosen = _chosen({_carried_name(path): path for path in files})
    return None if chosen is None else sha256_of(chosen)


def token_ids(files: Sequence[Path]) -> dict[str, Any]:
    """Return ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` as far as the files say.

    A generation_config.json comes first, then the SentencePiece model unless tokenizer.json is
    preferred to it, then the added tokens of tokenizer.json under the names that
    tokenizer_config.json gives.
    """
    beside = {path.with_name(name) for path in files for name in COMPANION_NAMES}
    return dict(_token_ids(tuple(files), stamps_of(sorted({*files, *beside}))))


def end_tokens(token_ids: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text, as a model and its tokenizer name them.

    Args:
        token_ids: special tokens of the model, as config.json has them.
        tokenizer: of the model.
    """
    named = token_ids.get("eos_token_id")
    found = {tokenizer.eos_id, *(named if isinstance(named, list) else [named])}
    return frozenset(token for token in found if token is not None)


@functools.lru_cache(maxsize=4)
def _token_ids(
    files: tuple[Path, ...], stamps: tuple[tuple[Path, int, int], ...]
) -> Mapping[str, Any]:
    """Return `token_ids`, cached while no file changes, for a run asks at every save."""
    by_name = {_carried_name(path): path for path in files}
    chosen = _chosen(by_name)
    ids: dict[str, Any] = {}
    if "tokenizer.json" in by_name and "tokenizer_config.json" in by_name:
        added = _json(by_name["tokenizer.json"]).get("added_tokens") or []
        number = declared_ids(by_name["tokenizer_config.json"])
        number |= {token["content"]: token["id"] for token in added}
        names = _json(by_name["tokenizer_config.json"])
        for name in ("bos_token", "eos_token", "pad_token"):
            token = names.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token in number:
                ids[f"{name}_id"] = number[token]
    if chosen is not None and chosen == by_name.get("tokenizer.model"):
        pieces = SentencePieceTokenizer(chosen)
        found = {"bos_token_id": pieces.bos_id, "eos_token_id": pieces.eos_id}
        ids |= {name: number for name, number in found.items() if number is not None}
    if "generation_config.json" in by_name:
        generation = _json(by_name["generation_config.json"])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if generation.get(name) is not None:
                ids[name] = generation[name]
    return ids


def _carried_name(path: Path) -> str:
    if path.parent.name == TEMPLATES:
        return f"{TEMPLATES}/{path.name}"
    return "tokenizer.model" if path.suffix == ".model" else path.name


def _chosen(by_name: Mapping[str, Path]) -> Path | None:
    """Return the file that fixes the token ids."""
    model, fast = by_name.get("tokenizer.model"), by_name.get("tokenizer.json")
    return preferred(model, fast) if model is not None and fast is not None else model or fast


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path, max_bytes=LARGE_JSON_BYTES, wide_integers=True)
