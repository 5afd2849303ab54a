"""Chat templates: text of a conversation, and which part of it the assistant wrote."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from megashear.files.regular import read_bytes
from megashear.files.structured import read_json_object
from megashear.tokenizer.companions import CONFIG_NAME, named
from megashear.tokenizer.models import Tokenizer

TEMPLATE_NAME = "chat_template.jinja"
"""File of a model directory that transformers takes before tokenizer_config.json."""
TEMPLATE_BYTES = 4 * 2**20
SHEARED = (
    "{{ bos_token }}"
    "{{ 'You are a helpful assistant. "
    "Write a response that appropriately completes the request.' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '\\n\\n### Input:\\n' + message['content'] + '\\n\\n### Response:' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{% else %}"
    "{{ raise_exception('no place for a message of role ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)
"""The prompt of Sheared-LLaMA-*-ShareGPT; further turns repeat it from its input on, which is ours.

Source: instruction_tuning/prompts/sft_prompt.json of princeton-nlp/LLM-Shearing, which the model
card of Sheared-LLaMA-1.3B-ShareGPT repeats.
"""

Message = Mapping[str, str]
"""A ``role`` (system, user or assistant) and a ``content``."""
ASSISTANT = "assistant"


class Rendered(NamedTuple):
    """Text of a conversation."""

    text: str
    spans: list[tuple[int, int]]
    """Begin and end of what the assistant wrote in each of its turns, characters."""


class TemplateRefusedError(Exception):
    """The template has no text for a conversation."""


class UnsteadyError(Exception):
    """The text of a turn depends on later ones, so that no prompt would end in it."""


class ChatTemplate:
    """Renders conversations as ``apply_chat_template`` of transformers does.

    Args:
        text: Jinja of the template.
        tokens: texts of special tokens by the names that templates know (``bos_token``).

    Raises:
        ValueError: the text is no template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str]) -> None:
        # as transformers makes it: templates rely on its blanks, and must not reach the machine
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no Jinja: {error}") from None
        self._tokens = dict(tokens)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the assistant is to answer.

        Raises:
            TemplateRefusedError: the template has no text for these messages.
        """
        return self._render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return the text of a conversation, and where the assistant wrote it.

        The assistant wrote all that a turn of it adds to the prompt before it, so also what ends
        the turn.

        Raises:
            TemplateRefusedError: the template has no text for these messages.
            UnsteadyError: the text of a turn depends on later ones.
        """
        whole = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self.prompt(messages[:number])
                after = self._render(messages[: number + 1])
                if not (after.startswith(before) and whole.startswith(after)):
                    raise UnsteadyError
                spans.append((len(before), len(after)))
        return Rendered(whole, spans)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefusedError(str(error)) from None


def chat_template(tokenizer: Tokenizer, text: str) -> ChatTemplate:
    """Return a template that writes the special tokens of a tokenizer.

    Raises:
        ValueError: the text is no template.
    """
    tokens = {
        key: found[1]
        for key in ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        if (found := named(tokenizer.path, key)) is not None and found[1] is not None
    }
    for key, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if number is not None:
            tokens[key] = tokenizer.token(number)
    return ChatTemplate(text, tokens)


def template_of(tokenizer: Tokenizer) -> str | None:
    """Return the text of a tokenizer's own template, which lies beside it; of several the default.

    None where it has none, as a base model.

    Raises:
        ValueError: a file beside the tokenizer cannot be read.
    """
    # none where the tokenizer's file goes alone
    beside = {file.name: file for file in tokenizer.files[1:]}
    if TEMPLATE_NAME in beside:
        return _text(beside[TEMPLATE_NAME])
    found: Any = None
    if CONFIG_NAME in beside:
        found = read_json_object(beside[CONFIG_NAME], wide_integers=True).get("chat_template")
    if isinstance(found, list):  # of several, by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def no_template(tokenizer: Tokenizer, way_out: str) -> ValueError:
    """Return the error for a tokenizer without a template.

    Args:
        tokenizer: has none.
        way_out: what to do about it besides adding one.
    """
    return ValueError(
        f"the tokenizer {tokenizer.path} has no chat template: neither {TEMPLATE_NAME} nor a "
        f"chat_template in {CONFIG_NAME} beside it, as a base model has none; {way_out}, or put a "
        f"template as {TEMPLATE_NAME} beside the tokenizer"
    )


def _text(file: Path) -> str:
    try:
        return read_bytes(file, TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; save it as UTF-8") from None


class _Generation(jinja2.ext.Extension):
    """Reads ``{% generation %}``, by which some templates mark what the assistant wrote.

    Few templates have it, so it is not needed and changes nothing.
    """

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return JSON; jinja2's own filter would escape the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
