"""Held-out texts as the model continues them at the end of a run, for a person to read."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megashear.checkpoint.text_sample import TextSample
from megashear.data.context import ids_of
from megashear.data.held_out import HeldOutSet
from megashear.monitor.sinks import Sink
from megashear.train.evaluations import Moment
from megashear.train.run_reader import RunReader
from megashear.train.sampling import Sampling

logger = logging.getLogger(__name__)

_PROMPT = 32
"""Tokens of a text that the model reads at most."""
_QUESTION = 256
"""Tokens of a conversation that it reads at most, the last ones before the first answer."""
_NEW = 48
"""Tokens that it writes at most: some three lines. Each reads the whole text again."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A text that a model is to continue."""

    domain: str
    prompt: list[int]
    rest: list[int]
    """Tokens that follow in the text."""


class TextSamples:
    """Has the model continue a few held-out texts at the end of a run, greedily.

    Args:
        reader: opens the model.
        names: of the domains.
        held_out: sets of the domains, in the same order.
    """

    def __init__(
        self, reader: RunReader, names: Sequence[str], held_out: Sequence[HeldOutSet]
    ) -> None:
        self._reader, self._names, self._held_out = reader, names, held_out
        self.found: list[TextSample] = []
        """What the model wrote at the end."""

    def due(self, moment: Moment) -> bool:
        """Return whether the run has ended, and texts are wanted."""
        return moment.is_end and self._reader.train.text_samples > 0

    def run(self, moment: Moment, sink: Sink) -> dict[str, float]:
        """Continue the texts and log them; nothing is measured."""
        texts = list(beginnings(self._names, self._held_out, self._reader.train.text_samples))
        with self._reader.reading() as reader:
            new = reader.continue_texts(
                # sequences may be longer than what the model was made to read
                [text.prompt[1 - reader.longest :] for text in texts],
                most_new=_NEW,
                is_done=lambda tokens: tokens[-1] in self._reader.ends,
                sampling=Sampling(),
                what="text samples",
            )
        self.found = [self._sample(text, tokens) for text, tokens in zip(texts, new)]
        for one in self.found:
            # a line each; the report has the whole prompt
            logger.info("%s: %r, and the model: %r", one.domain, one.prompt[-80:], one.continuation)
        return {}

    def _sample(self, text: Beginning, new: Sequence[int]) -> TextSample:
        decode, ends = self._reader.tokenizer.decode, self._reader.ends
        # the last token may be a part of a character
        prompt = decode(text.prompt).rstrip("\ufffd")

        def after(tokens: Sequence[int]) -> str:
            # templates write a line end after the token that ends an answer
            said = itertools.takewhile(lambda token: token not in ends, tokens)
            # decoded with the prompt, for a tokenizer may drop a blank before the first token
            return decode([*text.prompt, *said]).removeprefix(prompt)

        return TextSample(
            domain=text.domain,
            prompt=prompt,
            continuation=after(new),
            original=after(text.rest),
        )


def beginnings(
    names: Sequence[str], held_out: Sequence[HeldOutSet], number: int
) -> Iterator[Beginning]:
    """Yield beginnings of held-out texts, domain by domain in turn, and the first text of each
    first; fewer than ``number`` where there is no more text.

    Args:
        names: of the domains.
        held_out: sets of the domains, in the same order.
        number: texts wanted.
    """
    rows = (
        (name, text, row)
        for row in range(max(map(len, held_out)))
        for name, text in zip(names, held_out)
        if row < len(text)
    )
    for name, text, row in itertools.islice(rows, number):
        yield _beginning(name, text[row], text.documents(row))


def _beginning(domain: str, stored: Tensor, documents: Tensor) -> Beginning:
    """Return the beginning of the document with the most tokens to predict in a sequence.

    Args:
        domain: of the text.
        stored: tokens of a sequence as they are stored, see `context`, [s + 1].
        documents: number of the document of each, [s + 1].
    """
    is_learned = stored >= 0
    longest = documents[is_learned].bincount().argmax()
    ids = ids_of(stored[documents == longest]).tolist()
    learned = is_learned[documents == longest].tolist()
    begin, end = min(_PROMPT, max(1, len(ids) // 2)), len(ids)
    if not all(learned):  # up to the first answer, which goes on to the next context
        begin = max(1, learned.index(True))
        end = [*learned, False].index(False, begin)
    return Beginning(
        domain=domain,
        prompt=ids[max(0, begin - _QUESTION) : begin],
        rest=ids[begin : min(end, begin + _NEW)],
    )
