"""Choice of the file that fixes the ids where a directory holds two forms of a tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

from megashear.tokenizer.companions import (
    COMPANION_NAMES,
    HUGGING_FACE_NAME,
    SENTENCEPIECE_NAME,
    named,
    some,
    stamps_of,
)
from megashear.tokenizer.models import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

PROBE = (
    "The quick brown fox, 3.14 and 2,718: don't  stop   here.\n\n\tdef f(x):\n        return x\n"
    "caf\u00e9 na\u00efve \u00fcber \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f642 e\u0301 \ufb01 <|x|> [INST] ok\r\n  end  "
)
"""Text that two tokenizers of one model must cut alike. It does not begin with a blank, which
LlamaTokenizer of transformers 5 (and files it wrote) drops and SentencePiece keeps."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer in a file, or in a model directory.

    Where a directory holds tokenizer.model and tokenizer.json, the first is used if the two agree
    on `PROBE`, on the tokens that can come from text, and on BOS and EOS. If they disagree,
    tokenizer.json is used, as transformers does; if one cannot be read, the other is used; in both
    cases the tokenizer's ``note`` says why. A file that is named is used, and ``note`` says where
    another file disagrees.

    Args:
        path: a SentencePiece ``*.model``, a Hugging Face ``tokenizer.json``, or a directory that
            holds tokenizer.model or tokenizer.json.

    Raises:
        ValueError: the path does not exist, or is no tokenizer of these two kinds.
    """
    path = Path(path)
    if path.is_dir():
        return _load_directory(path)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist")
    if path.suffix == ".model":
        return _load_named_model(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise ValueError(
        f"tokenizer {path} ends in neither .model (SentencePiece) nor .json (Hugging Face); "
        f"give one of these or a directory that holds one"
    )


def preferred(model: Path, fast: Path) -> Path:
    """Return which of a tokenizer.model and a tokenizer.json `load_tokenizer` would use.

    Raises:
        ValueError: neither can be read.
    """
    beside = [model, *(fast.with_name(name) for name in COMPANION_NAMES)]
    return _preferred(model, fast, stamps_of(beside))


@functools.lru_cache(maxsize=16)
def _preferred(model: Path, fast: Path, stamps: tuple[tuple[Path, int, int], ...]) -> Path:
    """Return `preferred`, cached while no file changes, for a run asks at every save."""
    return _choose(model, fast).path


def _load_directory(directory: Path) -> Tokenizer:
    model, fast = directory / SENTENCEPIECE_NAME, directory / HUGGING_FACE_NAME
    if model.exists() and fast.exists():
        return _choose(model, fast)
    if model.exists():
        return SentencePieceTokenizer(model)
    if fast.exists():
        return HuggingFaceTokenizer(fast)
    way_out = (
        "; it has a vocab.json: write the other file with transformers, "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        if (directory / "vocab.json").exists()
        else "; give the file itself if it has another name"
    )
    raise ValueError(
        f"no tokenizer in {directory}: it holds neither {SENTENCEPIECE_NAME} nor "
        f"{HUGGING_FACE_NAME}{way_out}"
    )


def _load_named_model(path: Path) -> Tokenizer:
    fast = path.with_name(HUGGING_FACE_NAME)
    if path.name == SENTENCEPIECE_NAME and fast.exists():
        tokenizer = SentencePieceTokenizer(path, alone=True)
        try:
            differences = _differences(tokenizer, HuggingFaceTokenizer(fast))
        except ValueError as error:
            differences = [str(error)]
        if differences:
            tokenizer.note = (
                f"{path} is used as it was named, though transformers takes {HUGGING_FACE_NAME} "
                f"beside it, which disagrees: {'; '.join(differences)}; to use that, name "
                f"{fast} or the directory"
            )
            tokenizer._goes_alone = True  # beside a copy of the other file it would be ignored
        return tokenizer
    return SentencePieceTokenizer(path)


def _choose(model: Path, fast: Path) -> Tokenizer:
    """Choose the tokenizer of a directory that holds both."""
    try:
        pieces = SentencePieceTokenizer(model, alone=True)
    except ValueError as error:
        try:
            other = HuggingFaceTokenizer(fast)
        except ValueError as second:
            raise ValueError(f"{error}; and {second}: neither can be read") from None
        other.note = f"{fast} is used, not {model.name} beside it: {error}"
        return other
    try:
        other = HuggingFaceTokenizer(fast)
    except ValueError as error:
        pieces = SentencePieceTokenizer(model)
        pieces.note = f"{model} is used, not {fast.name} beside it: {error}"
        return pieces
    if not (differences := _differences(pieces, other)):
        return pieces
    other.note = (
        f"{fast} is used, as transformers does, and not {model.name} beside it, which disagrees: "
        f"{'; '.join(differences)}; to use that file anyway, name it"
    )
    return other


def _differences(pieces: SentencePieceTokenizer, other: HuggingFaceTokenizer) -> list[str]:
    """Return in what a tokenizer.json differs from a tokenizer.model."""
    found = []
    if lacking := [token.content for token in other.added if pieces.lacks(token)]:
        found.append(f"{len(lacking)} added tokens are no pieces of it ({some(lacking)})")
    for name in ("bos", "eos"):
        ids = [getattr(each, f"{name}_id") for each in (pieces, other)]
        # Where no file names the token, tokenizer.json does not say which token it is.
        if ids[0] != ids[1] and (ids[1] is not None or named(other.path, f"{name}_token")):
            found.append(f"{name.upper()} is {ids[1]}, not {ids[0]}")
    if pieces.encode(PROBE) != other.encode(PROBE):
        found.append("it cuts text into other pieces")
    return found
