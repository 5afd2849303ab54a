"""Real text and real tokenizers, as for the tests of `megashear.data`."""

from tests.unit.data.conftest import (
    data,
    hugging_face_file,
    jsonl,
    sentencepiece_file,
    texts,
    tokenise,
    untouched,
)

__all__ = [
    "data",
    "hugging_face_file",
    "jsonl",
    "sentencepiece_file",
    "texts",
    "tokenise",
    "untouched",
]
