"""Arrays of JSON are cut into the items that json finds; what is broken is told by its item."""

import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.preprocessing import json_records
from megashear.preprocessing.json_records import (
    BOM,
    ArrayError,
    TooLongError,
    is_array,
    split_array,
    split_lines,
)

LIMIT = 10_000
TRICKY = st.text(alphabet='a"\\[]{},: \n\u00e9\u4e2d')
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=8,
)


def stream(content: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(content))


def items(content: bytes, limit: int = LIMIT) -> list[bytes]:
    found = stream(content)
    assert is_array(found)
    return list(split_array(found, limit))


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(VALUES, max_size=5),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    around=st.sampled_from([(b"", b""), (b" \n", b"\n "), (BOM, b"\r\n")]),
    block=st.sampled_from([1, 2, 3, 7, 1 << 18]),
)
def test_items_are_those_that_json_finds(values, ascii_only, indent, around, block) -> None:
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode()
    before, json_records.BLOCK = json_records.BLOCK, block  # blocks must join without a seam
    try:
        found = items(around[0] + text + around[1])
    finally:
        json_records.BLOCK = before
    assert [json.loads(item) for item in found] == values


def test_a_cut_at_every_comma_would_be_noticed() -> None:
    """The twin: items hold commas and brackets that are none."""
    text = b'[{"text": "a, [b"}, "c}"]'
    assert items(text) == [b'{"text": "a, [b"}', b'"c}"']
    assert len(text.split(b",")) == 3


@pytest.mark.parametrize(
    ("content", "good", "message"),
    [
        (b"[1,,2]", 1, "is missing: there is a comma too many"),
        (b"[1, 2,]", 2, "is missing: there is a comma too many"),
        (b"[1}", 0, "is followed by a '}' that closes nothing"),
        (b"[1] [2]", 1, "is no part of the array, which has ended before it"),
        (b"[1]" + b" " * 99 + b"x", 1, "is no part of the array"),
        (b"[1, 2", 1, "is the last: the file ends before the array does"),
        (b'[1, "a', 1, "is the last: the file ends"),
    ],
)
def test_broken_arrays_are_told_at_their_item(monkeypatch, content, good: int, message) -> None:
    monkeypatch.setattr(json_records, "BLOCK", 50)
    found = split_array(stream(content), LIMIT)
    for _ in range(good):
        next(found)
    with pytest.raises(ArrayError, match=re.escape(message)):
        next(found)


def test_longer_records_than_the_limit_are_refused() -> None:
    line = b'"' + b"x" * 97 + b'"'
    assert list(split_lines(stream(line + b"\n" + line), 100)) == [line + b"\n", line]
    with pytest.raises(TooLongError):
        list(split_lines(stream(line + b"\n" + line), 99))
    assert items(b"[%b,%b]" % (line, line), 99) == [line, line]
    with pytest.raises(TooLongError):
        items(b"[%b,%b]" % (line, line), 98)


@pytest.mark.parametrize("content", [b"", b" ", b"{}", b'"["', BOM + b'{"a": [1]}'])
def test_what_is_no_array_is_lines(content: bytes) -> None:
    assert not is_array(stream(content))
