"""A long text encoded in parts has the ids of the whole."""

import pytest

from megashear.preprocessing import long_text
from megashear.preprocessing.long_text import encode_parts
from megashear.tokenizer.choice import load_tokenizer


@pytest.fixture(params=["sentencepiece_file", "hugging_face_file"])
def encode(request):
    return load_tokenizer(request.getfixturevalue(request.param)).encode


@pytest.fixture(autouse=True)
def short_parts(monkeypatch) -> None:
    monkeypatch.setattr(long_text, "PART", 50)
    monkeypatch.setattr(long_text, "WINDOW", 32)


def joined(encode, text: str) -> tuple[list[int], int]:
    parts = list(encode_parts(encode, text))
    return [token for part in parts for token in part], len(parts)


def test_parts_give_the_ids_of_the_whole(encode, texts) -> None:
    for text in (text for each in texts.values() for text in each):
        ids, num_parts = joined(encode, text)
        assert ids == encode(text)
        if len(text) > 500:
            assert num_parts > 2


def test_another_place_would_change_the_ids(encode, texts) -> None:
    """The twin: parts that are not tested against the text around their borders."""
    text = max(texts["words"], key=len)
    cut = [text[begin : begin + 50] for begin in range(0, len(text), 50)]
    assert [token for part in cut for token in encode(part)] != encode(text)


def test_text_without_words_is_encoded_as_a_whole(encode) -> None:
    for text in ("x" * 500, "\u4e2d\u6587" * 200, " " * 500):
        assert joined(encode, text) == (encode(text), 1)


def test_a_tokenizer_that_looks_across_words_gets_the_whole() -> None:
    def encode(text: str) -> list[int]:
        return [len(text)]  # depends on all there is

    assert joined(encode, "one two " * 100) == ([800], 1)


def test_what_lies_behind_a_place_that_fails_is_tried(encode) -> None:
    text = "a \u0308b" * 20 + " plain words in a row" * 20
    ids, num_parts = joined(encode, text)
    assert ids == encode(text)
    assert num_parts > 1
