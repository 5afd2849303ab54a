"""Conversations are written as transformers writes them, and the assistant's part is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megashear.preprocessing.conversations import template_for
from megashear.tokenizer.chat_template import (
    SHEARED,
    ChatTemplate,
    TemplateRefusedError,
    UnsteadyError,
    chat_template,
    template_of,
)
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.turns import check_turns, end_of_turn
from tests import chat
from tests.chat import CHAT_ML, write_tokenizer

INSTRUCT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""In the manner of LLaMA-2's: no generation prompt, blanks trimmed."""
MARKED = """{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' ~ message | tojson ~ '<|im_end|>' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}
"""
"""With the tags and the filters that transformers knows."""
HEADER = "{{ '<|im_start|>assistant\n' }}"
UNASKED = CHAT_ML.partition("{% if add")[0]
"""ChatML as it was before there were generation prompts."""
ALWAYS = UNASKED + HEADER
LAST = UNASKED + "{% if messages[-1].role == 'user' %}" + HEADER + "{% endif %}"
"""Knows no generation prompt, and needs none."""
THINKING = CHAT_ML.replace(
    "+ message['content']",
    "+ ('<s></s>' if loop.last and message.role == 'assistant' else '') + message['content']",
)
"""Something before the answer that is no part of the prompt, special tokens in it."""
TURNS = [
    {"role": "user", "content": " What colour is <b>snow</b>? \u00e9\U0001f642 "},
    {"role": "assistant", "content": "Snow is white."},
    {"role": "user", "content": "And grass?"},
    {"role": "assistant", "content": "\U0001f642 Grass is green."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "files")


@pytest.mark.parametrize("text", [CHAT_ML, INSTRUCT, MARKED, SHEARED])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_text_and_ids_are_those_of_transformers(folder: Path, text: str, count: int) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = text
    ours = load_tokenizer(folder)
    template = chat_template(ours, text)
    turns = TURNS[:count]
    is_asked = count == 1
    found = template.prompt(turns) if is_asked else template.render(turns).text
    wanted: dict[str, Any] = {"add_generation_prompt": is_asked}
    assert found == theirs.apply_chat_template(turns, tokenize=False, **wanted)
    ids, ends = ours.encode_rendered(found)
    assert ids == theirs.apply_chat_template(turns, **wanted)["input_ids"]
    assert ends == sorted(ends)
    assert ends[-1] == len(found)


@pytest.mark.parametrize(
    ("text", "ending"),
    [(CHAT_ML, "<|im_end|>\n"), (INSTRUCT, " </s>"), (MARKED, "<|im_end|>"), (SHEARED, "</s>")],
)
def test_the_assistant_wrote_its_words_and_what_ends_them(
    folder: Path, text: str, ending: str
) -> None:
    whole, spans = chat_template(load_tokenizer(folder), text).render(TURNS)
    begin = " " if text == INSTRUCT else ""
    assert [whole[start:stop] for start, stop in spans] == [
        f"{begin}{turn['content']}{ending}" for turn in TURNS[1::2]
    ]


def test_the_prompt_of_the_recipe_is_the_published_one(folder: Path) -> None:
    template = chat_template(load_tokenizer(folder), SHEARED)
    question = [{"role": "user", "content": "What colour is snow?"}]
    assert template.prompt(question) == (
        "<s>You are a helpful assistant. Write a response that appropriately completes the request."
        "\n\n### Input:\nWhat colour is snow?\n\n### Response:"
    )
    with pytest.raises(TemplateRefusedError, match="no place for a message of role system"):
        template.prompt([{"role": "system", "content": "Be brief."}])


def test_a_template_that_changes_earlier_turns_is_noticed() -> None:
    last_alone = "{% for m in messages %}{{ m.content if loop.last else '...' }};{% endfor %}"
    with pytest.raises(UnsteadyError):
        ChatTemplate(last_alone, {}).render(TURNS)


@pytest.mark.parametrize("text", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_cannot_reach_what_is_around_it(text: str) -> None:
    with pytest.raises(TemplateRefusedError):
        ChatTemplate(text, {}).prompt(TURNS)


def test_templates_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the chat template is no Jinja: "):
        ChatTemplate("{% for %}", {})
    bare = write_tokenizer(tmp_path / "bare", template=None)
    assert template_of(load_tokenizer(bare)) is None
    with pytest.raises(ValueError, match=r"has no chat template: .*give --chat-format sheared"):
        template_for("template", load_tokenizer(bare))


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (CHAT_ML, "<|im_end|>"),
        (INSTRUCT, "</s>"),
        (MARKED, "<|im_end|>"),
        (UNASKED, "<|im_end|>"),
        (ALWAYS, "<|im_end|>"),
        (THINKING, "<|im_end|>"),
        ("{{ 1 }}", None),
    ],
)
def test_what_ends_a_turn_is_known(folder: Path, text: str, ending: str | None) -> None:
    tokenizer = load_tokenizer(folder)
    found = end_of_turn(tokenizer, chat_template(tokenizer, text))
    assert (None if found is None else tokenizer.token(found)) == ending


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (UNASKED, r"a prompt lacks '<\|im_start\|>assistant\\n', .*end the template with \{% if"),
        (
            ALWAYS,
            r"after an answer, too, it writes '.*assistant\\n', .* add_generation_prompt %\} a",
        ),
    ],
)
def test_templates_whose_headers_would_be_learned_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", template=text))
    with pytest.raises(ValueError, match="json ignores add_generation_prompt: " + message):
        template_for("template", tokenizer)


def test_the_way_out_that_a_refusal_names_is_one(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="end the template with ") as refusal:
        check_turns(tokenizer, chat_template(tokenizer, UNASKED))
    named = str(refusal.value).partition("end the template with ")[2].partition("; correct")[0]
    check_turns(tokenizer, chat_template(tokenizer, UNASKED + named))


@pytest.mark.parametrize("text", [CHAT_ML, INSTRUCT, MARKED, SHEARED, LAST, THINKING, "{{ 1 }}"])
def test_templates_whose_answers_have_no_header_are_taken(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    check_turns(tokenizer, chat_template(tokenizer, text))


def test_a_file_and_the_default_of_several_are_found(folder: Path, tmp_path: Path) -> None:
    assert template_of(load_tokenizer(folder)) == CHAT_ML
    several = tmp_path / "several"
    shutil.copytree(folder, several)
    values = json.loads((several / "tokenizer_config.json").read_text())
    values["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    (several / "tokenizer_config.json").write_text(json.dumps(values))
    assert template_of(load_tokenizer(several)) == "plain"
    (several / "chat_template.jinja").write_text("of the file")
    assert template_of(load_tokenizer(several)) == "of the file"
    # what lies beside a file of another name may be another tokenizer's
    (several / "tokenizer.json").rename(several / "other.json")
    assert template_of(load_tokenizer(several / "other.json")) is None


def test_special_tokens_are_spelled_in_no_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == set(chat.SPECIAL)
    assert len(tokenizer.encode("</s>")) > 1
    assert tokenizer.encode_rendered("a</s>b") == (
        [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")],
        [1, 5, 6],
    )
