"""Conversations in JSON: read in three forms, written by a chat template, tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megashear.data.context import as_context
from megashear.tokenizer.chat_template import (
    ASSISTANT,
    SHEARED,
    ChatTemplate,
    Message,
    TemplateRefusedError,
    UnsteadyError,
    chat_template,
    no_template,
    template_of,
)
from megashear.tokenizer.models import Tokenizer
from megashear.tokenizer.turns import check_turns

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
}
"""Roles by the names that OpenAI and ShareGPT give them."""
LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Keys of a list of messages, and the keys of each: OpenAI's form and ShareGPT's."""
PAIR = ("prompt", "response")
"""Keys of one question and its answer."""
WANTED = "messages (of role and content), conversations (of from and value), or prompt and response"

NOT_TEXT = "a message is not a string"
UNKNOWN_ROLE = "a role other than system, user and assistant"
NO_ANSWER = "no text of the assistant"
ASSISTANT_FIRST = "the assistant speaks first"
SPELLS_SPECIAL = "a special token is spelled in a message"
REFUSED = "refused by the chat template"
UNSTEADY = "the template changes earlier turns"


class Skipped(Exception):  # noqa: N818 (no error: the reason is counted)
    """A conversation is left out; its text is the reason."""


def read_messages(record: Mapping[str, object], place: str) -> list[Message]:
    """Return the messages of a JSON object, in whichever form it has.

    Args:
        record: the object.
        place: file and line, for messages of errors.

    Raises:
        ValueError: the object has none of the forms.
        Skipped: a message is no text, or of a role that has no place here.
    """
    form = next((name for name in LISTS if name in record), None)
    if form is None:
        if not set(PAIR) <= record.keys():
            raise ValueError(
                f"{place} is no conversation: it has the keys {sorted(record)}; wanted {WANTED}"
            )
        found: list[tuple[object, object]] = list(zip(("user", ASSISTANT), map(record.get, PAIR)))
    else:
        found = _pairs(record[form], form, place)
    messages: list[Message] = []
    for role, content in found:
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Skipped(UNKNOWN_ROLE)
        if not isinstance(content, str):
            raise Skipped(NOT_TEXT)
        messages.append({"role": ROLES[role.lower()], "content": content})
    return messages


def _pairs(found: object, form: str, place: str) -> list[tuple[object, object]]:
    keys = LISTS[form]
    wanted = f"wanted a list of objects with {keys[0]!r} and {keys[1]!r}"
    if not isinstance(found, list):
        raise ValueError(f"{place} has a {type(found).__name__} under {form!r}; {wanted}")
    for number, message in enumerate(found, start=1):
        if not isinstance(message, dict) or not set(keys) <= message.keys():
            has = f"keys {sorted(message)}" if isinstance(message, dict) else "no keys"
            raise ValueError(f"{place}, message {number} of {form!r} has {has}; {wanted}")
    return [(message[keys[0]], message[keys[1]]) for message in found]


def to_learn(messages: Sequence[Message], *, first_turn: bool) -> list[Message]:
    """Return the messages up to the last answer, or up to the first one.

    Raises:
        Skipped: there is no answer, or none to a question.
    """
    answers = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
    chosen = answers[:1] if first_turn else answers
    if not chosen or not all(messages[n]["content"].strip() for n in chosen):
        raise Skipped(NO_ANSWER)
    if not any(message["role"] == "user" for message in messages[: chosen[0]]):
        raise Skipped(ASSISTANT_FIRST)
    return list(messages[: chosen[-1] + 1])


class ChatEncoder:
    """Tokenises conversations.

    Args:
        tokenizer: has the special tokens.
        template: writes the text.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._special = tokenizer.special_tokens

    def encode(self, messages: Sequence[Message]) -> tuple[npt.NDArray[np.int32], int]:
        """Return the tokens of a conversation, all but the assistant's as context.

        A token is the assistant's if its last character is. The first token is context in any
        case, for nothing predicts it.

        Returns:
            int32 [tokens], and the size of the text in bytes.

        Raises:
            Skipped: the template has no text for it, or would lie about it.
        """
        # the tokenizer would read it as the template's own: an answer would end in its middle
        if any(token in m["content"] for m in messages for token in self._special):
            raise Skipped(SPELLS_SPECIAL)
        try:
            text, spans = self._template.render(messages)
        except TemplateRefusedError:
            raise Skipped(REFUSED) from None
        except UnsteadyError:
            raise Skipped(UNSTEADY) from None
        ids, ends = self._tokenizer.encode_rendered(text)
        tokens, last = np.array(ids, dtype=np.int32), np.array(ends)
        is_target = np.zeros(len(tokens), dtype=bool)
        for start, stop in spans:
            is_target |= (start < last) & (last <= stop)
        is_target[:1] = False
        if not is_target.any():
            raise Skipped(NO_ANSWER)
        return np.where(is_target, tokens, as_context(tokens)), len(text.encode())


def template_for(chat_format: str | None, tokenizer: Tokenizer) -> str | None:
    """Return the text of the template that --chat-format names; None where records are text.

    Raises:
        ValueError: the tokenizer has no template, or one that is none or of which headers would be
            learned, or no EOS to end answers.
    """
    if chat_format is None:
        return None
    template = template_of(tokenizer) if chat_format == "template" else SHEARED
    if template is None:
        raise no_template(
            tokenizer, "give --chat-format sheared, the prompt of Sheared-LLaMA-ShareGPT"
        )
    if chat_format == "sheared" and tokenizer.eos_id is None:
        raise ValueError(
            f"--chat-format sheared ends each answer with EOS, which the tokenizer "
            f"{tokenizer.path} lacks; name the token in tokenizer_config.json beside it"
        )
    check_turns(tokenizer, chat_template(tokenizer, template))
    return template
