"""Conversations of every form become the same tokens; only the assistant's are to be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megashear.config import PreprocessConfig
from megashear.data.indexed import read_documents
from megashear.data.manifest import DataManifest
from megashear.preprocessing import conversations
from megashear.tokenizer.chat_template import SHEARED
from megashear.tokenizer.choice import load_tokenizer
from tests.chat import messages, write_records, write_tokenizer
from tests.texts import preprocess

TWO_TURNS = [("What colour is snow?", "Snow is white."), ("And grass?", "Grass is green.")]
ONE_TURN = [("Which colour has coal?", "Coal is black.")]
SHARE_GPT = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "files")


def read(
    folder: Path, records: list[Any], tokenizer: Path, **flags: Any
) -> tuple[DataManifest, list[np.ndarray]]:
    """What preprocessing makes of records: all conversations, training first."""
    file = write_records(folder / "chat.jsonl", records)
    flags = {"chat_format": "template", "held_out_fraction": 0.5, **flags}
    manifest = preprocess({"chat": [file]}, folder / "data", tokenizer, **flags)
    prefixes = (manifest.prefix("chat"), manifest.held_out_prefix("chat"))
    return manifest, [tokens for prefix in prefixes for tokens in read_documents(prefix)]


def sharegpt(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "id": "x",
        "conversations": [
            {"from": SHARE_GPT[m["role"]], "value": m["content"]} for m in messages(turns)
        ],
    }


def test_all_forms_are_read_alike_even_in_one_file(tmp_path: Path, tokenizer: Path) -> None:
    forms: list[list[Any]] = [
        [{"messages": messages(TWO_TURNS)}, {"messages": messages(ONE_TURN)}],
        [sharegpt(TWO_TURNS), sharegpt(ONE_TURN)],
        [
            {"messages": messages(TWO_TURNS), "prompt": "other trainers add this"},
            dict(zip(("prompt", "response"), ONE_TURN[0])),
        ],
    ]
    found = []
    for number, records in enumerate(forms):
        _, documents = read(tmp_path / str(number), records, tokenizer)
        found.append(sorted(tokens.tolist() for tokens in documents))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


@pytest.mark.parametrize("chat_format", ["template", "sheared"])
def test_what_is_learned_is_the_assistants_tokens_alone(
    tmp_path: Path, tokenizer: Path, chat_format: str
) -> None:
    """Counted another way: text up to an answer and after it, tokenised by transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    if chat_format == "sheared":
        theirs.chat_template = SHEARED
    records = [{"messages": messages(turns)} for turns in (TWO_TURNS, ONE_TURN)]
    manifest, documents = read(tmp_path, records, tokenizer, chat_format=chat_format)

    def length(turns: list[dict[str, str]], **more: Any) -> int:
        return len(theirs.apply_chat_template(turns, **more)["input_ids"])

    wanted = []
    for turns in map(messages, (TWO_TURNS, ONE_TURN)):
        places = [False] * length(turns)
        for n in range(1, len(turns), 2):
            start = length(turns[:n], add_generation_prompt=True)
            stop = length(turns[: n + 1])
            places[start:stop] = [True] * (stop - start)
        ids = theirs.apply_chat_template(turns)["input_ids"]
        wanted.append([i if learned else -1 - i for i, learned in zip(ids, places)])
    assert sorted(tokens.tolist() for tokens in documents) == sorted(wanted)
    assert manifest.chat_format == chat_format
    assert manifest.domains[0].largest_id == max(
        max(i, -1 - i) for tokens in documents for i in tokens.tolist()
    )
    # and read again, the answers are all that is left
    ours = load_tokenizer(tokenizer)
    text = sorted(ours.decode(tokens[tokens >= 0].tolist()) for tokens in documents)
    assert [part.replace("\n", "") for part in text] == [
        "Coal is black.",
        "Snow is white.Grass is green.",
    ]
    exported = (manifest.tokenizer_directory / "chat_template.jinja").read_text()
    assert exported == theirs.chat_template


def test_the_first_turn_alone(tmp_path: Path, tokenizer: Path) -> None:
    both = [{"messages": messages(turns)} for turns in (TWO_TURNS, ONE_TURN)]
    first = [{"messages": messages(turns[:1])} for turns in (TWO_TURNS, ONE_TURN)]
    found = [
        sorted(tokens.tolist() for tokens in read(tmp_path / name, records, tokenizer, **flags)[1])
        for name, records, flags in (("a", both, {"first_turn": True}), ("b", first, {}))
    ]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="--first-turn is of conversations, which --chat-format"):
        PreprocessConfig(input="i", output="o", tokenizer_model="t", first_turn=True)


def test_conversations_that_teach_nothing_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    user, assistant = messages(ONE_TURN)
    refused = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    other = write_tokenizer(
        tmp_path / "other",
        template=refused + "{{ messages | length if messages[0].content == 'unsteady' }}"
        "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}",
    )
    wrong: dict[str, list[list[Any]]] = {
        conversations.NO_ANSWER: [[user], [], [user, {**assistant, "content": " \n"}]],
        conversations.ASSISTANT_FIRST: [[assistant, user, assistant]],
        conversations.UNKNOWN_ROLE: [[user, {"role": "tool", "content": "x"}, assistant]],
        conversations.NOT_TEXT: [[user, {"role": "assistant", "content": None}]],
        conversations.SPELLS_SPECIAL: [[{**user, "content": "What is </s>?"}, assistant]],
        conversations.REFUSED: [[{"role": "system", "content": "x"}, user, assistant]],
        conversations.UNSTEADY: [[{**user, "content": "unsteady"}, assistant]],
    }
    good: list[Any] = [{"messages": messages(turns)} for turns in (TWO_TURNS, ONE_TURN)]
    records = good + [{"messages": turns} for each in wrong.values() for turns in each]
    manifest, documents = read(tmp_path, records, other)
    assert manifest.domains[0].skipped == {why: len(each) for why, each in wrong.items()}
    assert len(documents) == len(good)
    with pytest.raises(ValueError, match=r"is empty: .*1 no text of the assistant.*skipped"):
        read(tmp_path / "none", [{"messages": [user]}], tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"line 2 is no conversation: it has the keys \['text'\]; wanted messages"),
        ({"prompt": "x"}, r"line 2 is no conversation: .*or prompt and response"),
        ({"messages": "x"}, r"line 2 has a str under 'messages'; wanted a list of objects with"),
        (
            {"conversations": [{"role": "user", "content": "x"}]},
            r"line 2, message 1 of 'conversations' has keys \['content', 'role'\]; wanted .*'from'",
        ),
        ({"messages": ["x"]}, r"line 2, message 1 of 'messages' has no keys; wanted"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(
    tmp_path: Path, tokenizer: Path, record: Any, message: str
) -> None:
    good = {"messages": messages(ONE_TURN)}
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [good, record], tokenizer)


def test_what_is_no_json_and_a_missing_end_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(2):
        (text / f"{number}.txt").write_text("some text")
    files = {"texts": sorted(text.iterdir())}
    with pytest.raises(ValueError, match=r"0\.txt, document 1 is no JSON; --chat-format reads"):
        preprocess(files, tmp_path / "data", tokenizer, chat_format="sheared")
    bare = write_tokenizer(tmp_path / "bare", template=None)
    values = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": None}))
    with pytest.raises(ValueError, match=r"ends each answer with EOS, which the .* lacks"):
        read(tmp_path, [], bare, chat_format="sheared")
