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
"""Tokens of a text that the model reads at most; conversations are read up to the first answer."""
_NEW = 48
"""Tokens that it writes at most: three lines, which cost as many forward passes."""


@dataclass(frozen=True, kw_only=True)
class _Beginning:
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
                [text.prompt[-reader.longest :] for text in texts],
                most_new=_NEW,
                is_done=lambda tokens: tokens[-1] in self._reader.ends,
                sampling=Sampling(),
                what="text samples",
            )
        self.found = [self._sample(text, tokens) for text, tokens in zip(texts, new)]
        for one in self.found:
            logger.info("%s: %r, and the model: %r", one.domain, one.prompt, one.continuation)
        return {}

    def _sample(self, text: _Beginning, new: Sequence[int]) -> TextSample:
        decode, ends = self._reader.tokenizer.decode, self._reader.ends
        prompt = decode(text.prompt)

        def after(tokens: Sequence[int]) -> str:
            # decoded with the prompt, for a tokenizer may drop a blank before the first token
            whole = decode([*text.prompt, *tokens])
            return whole.removeprefix(prompt) if whole.startswith(prompt) else decode(tokens)

        return TextSample(
            domain=text.domain,
            prompt=prompt,
            continuation=after(new),
            # templates write a line end after the token that ends an answer
            original=after(list(itertools.takewhile(lambda token: token not in ends, text.rest))),
        )


def beginnings(
    names: Sequence[str], held_out: Sequence[HeldOutSet], number: int
) -> Iterator[_Beginning]:
    """Yield beginnings of held-out texts, domain by domain in turn, and the first text of each
    first; fewer than ``number`` where there is no more text.

    Args:
        names: of the domains.
        held_out: sets of the domains, in the same order.
        number: texts wanted.
    """
    for row in range(max(map(len, held_out))):
        for name, text in zip(names, held_out):
            if number and row < len(text):
                yield _beginning(name, text[row], text.documents(row))
                number -= 1


def _beginning(domain: str, stored: Tensor, documents: Tensor) -> _Beginning:
    """Return the beginning of the longest document of a sequence.

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
    return _Beginning(domain=domain, prompt=ids[:begin], rest=ids[begin : min(end, begin + _NEW)])
