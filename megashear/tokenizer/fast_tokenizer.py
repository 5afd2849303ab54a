"""A tokenizer.json equal to a SentencePiece BPE model, for transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megashear.files.regular import read_bytes

logger = logging.getLogger(__name__)

MODEL_BYTES = 100 * 2**20
"""Largest SentencePiece model that is read, bytes; LLaMA's has 0.5 MB, Gemma's 4 MB."""
_BPE = 2  # trainer_spec.model_type. Source: sentencepiece_model.proto
_CONTROL = 3  # type of a piece, from the same file
_USER_DEFINED = 4
_SPACE = "\u2581"  # how SentencePiece writes a space inside of pieces


def write_for_transformers(model: Path, directory: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json beside a bare SentencePiece model.

    Without tokenizer.json, transformers 5 rebuilds the merges from the order of the pieces instead
    of their scores: LLaMA's pieces of several spaces then win over words, and text with two spaces
    in a row is cut otherwise than in training.

    Args:
        model: a SentencePiece model file.
        directory: directory to write into.

    Returns:
        Whether tokenizer.json was written. It is for byte-pair models without text normalisation,
        such as LLaMA's; for others transformers builds its own.

    Raises:
        ValueError: ``model`` is not a SentencePiece model.
    """
    proto = _parse(model)
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    tokens = {
        name: proto.pieces[number].piece
        for name, number in (
            ("unk_token", proto.trainer_spec.unk_id),
            ("bos_token", proto.trainer_spec.bos_id),
            ("eos_token", proto.trainer_spec.eos_id),
            ("pad_token", proto.trainer_spec.pad_id),
        )
        if 0 <= number < len(proto.pieces)
    }
    rules = proto.normalizer_spec
    is_reproducible = (
        proto.trainer_spec.model_type == _BPE
        and rules.add_dummy_prefix
        and not rules.precompiled_charsmap
        and not rules.remove_extra_whitespaces
        and all(piece.type != _USER_DEFINED for piece in proto.pieces)
    )
    config = {
        # This class leaves tokenizer.json unchanged; LlamaTokenizer adds its own rule for spaces.
        "tokenizer_class": "PreTrainedTokenizerFast" if is_reproducible else "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if is_reproducible:
        _build(proto, pieces, tokens).save(str(directory / "tokenizer.json"))
    else:
        logger.warning(
            "%s: transformers builds this kind of SentencePiece model by rules of its own and may "
            "cut some text otherwise; encode with SentencePiece where that matters",
            model,
        )
    return is_reproducible


def _build(proto: Any, pieces: dict[str, int], tokens: dict[str, str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    tokenizer = Tokenizer(
        BPE(
            vocab=pieces,
            merges=_merges(proto, pieces),
            unk_token=tokens.get("unk_token"),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    special += [tokens[name] for name in ("unk_token",) if name in tokens]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    if "bos_token" in tokens:
        bos = tokens["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces[bos])]
        )
    return tokenizer


def _merges(proto: Any, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a piece, beginning with the best-scored piece."""
    # The sort is stable: pieces of one score (those of several spaces) keep their order.
    ranked = sorted(proto.pieces, key=lambda piece: -piece.score)
    merges = []
    for whole in (piece.piece for piece in ranked):
        pairs = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        known = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        merges += sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    return merges


def _parse(model: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    # The class is made when the module is imported, unseen by type checkers.
    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    try:
        proto.ParseFromString(read_bytes(model, MODEL_BYTES))
    except DecodeError as error:
        raise ValueError(f"{model} is not a SentencePiece model: {error}") from None
    return proto
