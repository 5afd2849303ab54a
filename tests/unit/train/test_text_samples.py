"""Texts that a run continues at its end begin where a person would begin them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megashear.checkpoint.text_sample import TextSample
from megashear.data.conversations import HeldOutConversations
from megashear.data.held_out import HeldOutSet
from megashear.tokenizer.choice import load_tokenizer
from megashear.train.text_samples import Beginning, TextSamples, beginnings
from tests.unit.data.test_conversations import conversation, write

LENGTH = 512
CHAT_LENGTH = 40


def test_a_text_is_read_from_the_beginning_of_its_longest_document(data: Any) -> None:
    text = IndexedDataset(str(data.prefix("words")))
    owners = np.repeat(np.arange(len(text)), text.sequence_lengths)
    flat = np.concatenate([text[number] for number in range(len(text))])
    sequences = HeldOutSet(data.prefix("words"), LENGTH)
    places = []
    for row, found in enumerate(beginnings(["words"], [sequences], len(sequences))):
        here = slice(row * LENGTH, (row + 1) * LENGTH + 1)
        documents = [flat[here][owners[here] == owner] for owner in np.unique(owners[here])]
        longest = max(documents, key=len).tolist()
        assert (found.domain, found.prompt) == ("words", longest[:32])
        assert found.rest == longest[32:80]
        places.append([part.tolist() for part in documents].index(longest))
    assert len(places) == len(sequences)
    assert len({*places}) > 1, "not always the first"


def test_domains_take_turns_and_end_with_their_text(data: Any) -> None:
    sets = [HeldOutSet(data.prefix(name), LENGTH) for name in ("words", "paths")]
    fewest = min(map(len, sets))
    found = [one.domain for one in beginnings(["a", "b"], sets, 2 * fewest)]
    assert found == ["a", "b"] * fewest
    everything = list(beginnings(["a", "b"], sets, 10**6))
    assert len(everything) == sum(map(len, sets))
    assert list(beginnings(["a", "b"], sets, 0)) == []


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_conversation_is_read_up_to_the_first_answer(tmp_path: Path, is_packed: bool) -> None:
    prefix = write(tmp_path, [(20, 6), (6, 2), (11, 3)])  # length, and tokens of the answer
    held_out = HeldOutConversations(prefix, CHAT_LENGTH, is_packed=is_packed)
    found = {tuple(one.prompt): tuple(one.rest) for one in beginnings(["chat"], [held_out], 10)}
    ids = np.arange(20) + 100
    assert found[tuple(ids[:14].tolist())] == tuple(ids[14:].tolist())
    # a row of several conversations gives one
    assert len(found) == (1 if is_packed else 3)


def test_an_answer_ends_where_the_next_question_begins(tmp_path: Path) -> None:
    folder = tmp_path / "turns"
    folder.mkdir()
    prefix = write(folder, [(12, 5)])
    first = conversation(0, 12, 5)
    turns = np.concatenate([first[:9], ~np.abs(first[9:11]), first[11:]])  # 2 learned, 2 not, 1
    Path(f"{prefix}.bin").write_bytes(turns.tobytes())
    (found,) = beginnings(["chat"], [HeldOutConversations(prefix, CHAT_LENGTH, is_packed=False)], 1)
    assert (found.prompt, found.rest) == ([100 + n for n in range(7)], [107, 108])


def test_a_text_that_is_cut_within_a_character_is_put_together_again(
    hugging_face_file: Path,
) -> None:
    tokenizer = load_tokenizer(hugging_face_file)
    ids = tokenizer.encode("caf\u00e9 \u4f60")
    reader: Any = SimpleNamespace(tokenizer=tokenizer, ends=frozenset({7}))
    texts = TextSamples(reader, [], [])
    assert "\ufffd" in tokenizer.decode(ids[:-1]), "a character of several tokens"
    cut = Beginning(domain="words", prompt=ids[:-1], rest=[*ids[-1:], 7, *ids])
    sample = texts._sample(cut, ids[-1:])
    assert (sample.prompt, sample.continuation) == ("caf\u00e9 ", "\u4f60")
    assert sample.original == "\u4f60", "nothing behind the end of a text"


def test_a_long_question_is_read_from_its_end(tmp_path: Path) -> None:
    prefix = write(tmp_path, [(400, 5)])
    (found,) = beginnings(["chat"], [HeldOutConversations(prefix, 400, is_packed=False)], 1)
    assert found.prompt == list(range(100 + 395 - 256, 100 + 395))


def test_a_sample_of_a_damaged_checkpoint_is_refused() -> None:
    said = {"domain": "c", "prompt": "int", "continuation": " x", "original": " main"}
    assert TextSample.read({**said, "of a later release": 1}).original == " main"
    with pytest.raises(TypeError, match="continuation is 3; wanted str"):
        TextSample.read({**said, "continuation": 3})
    del said["prompt"]
    with pytest.raises(TypeError, match="prompt"):
        TextSample.read(said)
