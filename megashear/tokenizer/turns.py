"""What a chat template writes around an answer: the header before it, and what ends it."""

from __future__ import annotations

import itertools

from megashear.tokenizer.chat_template import (
    ASSISTANT,
    TEMPLATE_NAME,
    ChatTemplate,
    TemplateRefusedError,
    UnsteadyError,
)
from megashear.tokenizer.models import Tokenizer

_QUESTION, _ANSWER = "0question0", "0answer0"
"""Texts that no template writes by itself."""
_ASKED = [{"role": "user", "content": _QUESTION}]
_ANSWERED = [*_ASKED, {"role": ASSISTANT, "content": _ANSWER}]


def check_turns(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Refuse a template that takes no heed of add_generation_prompt and would need to.

    Where an answer has a header of its role, it must be the prompt's: else the model would learn
    to write headers. Templates without such headers, as LLaMA-2's and that of the recipe, need no
    generation prompt.

    Args:
        tokenizer: beside which the template lies.
        template: its template.

    Raises:
        ValueError: the header of a turn would be learned as a part of answers.
    """
    try:
        asked = template.render(_ASKED).text
        if template.prompt(_ASKED) != asked:
            return
        text, [(start, _)] = template.render(_ANSWERED)
        again = template.prompt([*_ANSWERED, *_ASKED])
    except (TemplateRefusedError, UnsteadyError):
        return  # each conversation is then refused or left out by itself
    before, found, after = text[start:].partition(_ANSWER)
    if not found:
        return
    where = f"the chat template of the tokenizer {tokenizer.path}"
    way_out = f"correct it, as {TEMPLATE_NAME} beside the tokenizer"
    if before.strip():
        raise ValueError(
            f"{where} ignores add_generation_prompt: a prompt lacks {before!r}, which each answer "
            f"would have to begin with; end the template with {{% if add_generation_prompt %}}"
            f"{{{{ {before!r} }}}}{{% endif %}}; {way_out}"
        )
    # a header at the end of every text ends question and answer alike
    header = _common_end(asked.rpartition(_QUESTION)[2], after)
    if header.strip() and not again.startswith(text):
        raise ValueError(
            f"{where} ignores add_generation_prompt: after an answer, too, it writes {header!r}, "
            f"and with it a header that would be learned as a part of the answer; write the "
            f"header of the next turn within {{% if add_generation_prompt %}} alone; {way_out}"
        )


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """Return the special token that ends the assistant's turns; None where none does."""
    try:
        text, spans = template.render(_ANSWERED)
    except (TemplateRefusedError, UnsteadyError):
        return None
    start, stop = spans[-1]
    place = text.find(_ANSWER, start, stop)
    begin = start if place < 0 else place + len(_ANSWER)
    special = tokenizer.special_tokens
    for number, end in zip(*tokenizer.encode_rendered(text)):
        if begin < end <= stop and tokenizer.token(number) in special:
            return number
    return None


def _common_end(one: str, other: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1]))
    return "".join(letter for letter, _ in pairs)[::-1]
