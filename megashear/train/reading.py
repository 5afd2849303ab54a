"""A model that ranks share, asked about text: scores of continuations, and continuations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megashear.data.batch import MicroBatch
from megashear.models.next_token import token_scores, whole_rows
from megashear.monitor.console import progress
from megashear.parallel import device
from megashear.parallel.agree import gather_objects, ordered_sum
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.sampling import Sampling
from megashear.train.schedule import ForwardPass

_ROUND = 32
"""Lengths are rounded up to a multiple, or every batch would have another shape."""
_PER_STAGE = 4
"""Microbatches of a stage that go through a pipeline together. They are of one length, so that
more would fill up more."""


class Passage(NamedTuple):
    """Text of which the last tokens are scored."""

    tokens: Sequence[int]
    """All tokens."""
    num_scored: int
    """Number of last tokens to score; at least one token precedes them. None scores 0 nats."""


class PassageScore(NamedTuple):
    """What a model thinks of the scored tokens of a passage."""

    log_probability: float
    """Sum over the scored tokens, nats."""
    is_greedy: bool
    """Whether each scored token is the likeliest after those before it."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model that all ranks ask the same of; replicas share the work, and all get the answers.

    Causal attention looks at no later token, so shorter texts of a batch are filled up at the end.
    """

    model: ForwardPass
    shape: ModelShape
    groups: ParallelGroups
    micro_batch_size: int = 1
    """Texts in one forward pass of a replica."""
    beat: Callable[[str], None] = lambda doing: None
    """Is told of every few batches, see `Watchdog`."""

    @property
    def longest(self) -> int:
        """Tokens that the model can read."""
        return longest_of(self.shape)

    def score(self, passages: Sequence[Passage], *, what: str = "scoring") -> list[PassageScore]:
        """Return the score of every passage. Collective over the world.

        Passages that differ in their last token alone, such as the choices A, B, C and D after a
        question, are read together once.

        Args:
            passages: none longer than `longest` and one token, for the last token is not read.
            what: text beside the progress bar.
        """
        by_text: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (tokens, num_scored) in enumerate(passages):
            if num_scored == 0:  # has no row of its own in the logits
                continue
            by_text.setdefault((tuple(tokens[:-1]), num_scored), []).append(number)
        readings = list(by_text.values())  # numbers of passages that are read together
        texts = [passages[numbers[0]] for numbers in readings]
        # rows that other stages or replicas measure stay 0 here
        scores = torch.zeros(len(passages), 2, dtype=torch.float64)

        def measure(batch: MicroBatch, logits: Tensor) -> None:
            together = [readings[n] for n in batch.positions.tolist()]
            ends = [[passages[number].tokens[-1] for number in numbers] for numbers in together]
            for numbers, found in zip(together, self._scores(batch, logits, ends)):
                scores[numbers] = torch.tensor(found, dtype=torch.float64)

        order = sorted(range(len(texts)), key=lambda n: -len(texts[n].tokens))
        own = order[self.groups.data_rank :: self.groups.data_size]
        with self._bar(len(own), what) as bar:
            for part in self._parts(own):
                self.beat(what)
                batches = self._batches(
                    part,
                    [texts[n].tokens[:-1] for n in part],
                    [texts[n].tokens[1:] for n in part],
                    [texts[n].num_scored for n in part],
                )
                self.model.read(batches, measure)
                bar.update(len(part))
        (scores,) = ordered_sum([scores], self.groups.pipeline)
        (scores,) = ordered_sum([scores], self.groups.data)
        return [
            PassageScore(total, bool(greedy) or passage.num_scored == 0)
            for passage, (total, greedy) in zip(passages, scores.tolist())
        ]

    def continue_texts(
        self,
        texts: Sequence[Sequence[int]],
        *,
        most_new: int,
        is_done: Callable[[Sequence[int]], bool],
        sampling: Sampling,
        what: str = "generating",
    ) -> list[list[int]]:
        """Return the tokens that follow each text. Collective over the world.

        The whole text is read again for every token: there is no cache of keys and values.

        Args:
            texts: at least one token each, and no more than `longest`.
            most_new: tokens to add at most; fewer where the text has become as long as `longest`.
            is_done: is given the new tokens of a text after each of them; true ends the text.
            sampling: how tokens are chosen.
            what: text beside the progress bar.
        """
        own = range(self.groups.data_rank, len(texts), self.groups.data_size)
        new: dict[int, list[int]] = {n: [] for n in own}
        active = list(own)
        with self._bar(len(own), what) as bar:
            # replicas go on together: one that waited for the others' texts would count as hung
            while self._anyone(active):
                whole = {n: [*texts[n], *new[n]] for n in active}
                places = {n: len(new[n]) for n in active}
                for n, token in self._next_tokens(whole, places, sampling, what).items():
                    new[n].append(token)
                still = [
                    n
                    for n in active
                    if len(new[n]) < min(most_new, self.longest - len(texts[n]))
                    and not is_done(new[n])
                ]
                bar.update(len(active) - len(still))
                active = still
        for theirs in gather_objects(new, self.groups.data):
            new |= theirs
        return [new[n] for n in range(len(texts))]

    def _anyone(self, active: Sequence[int]) -> bool:
        """Return whether some replica still continues texts."""
        (count,) = ordered_sum([torch.tensor([len(active)])], self.groups.data)
        return bool(count)

    def _next_tokens(
        self,
        texts: Mapping[int, Sequence[int]],
        places: Mapping[int, int],
        sampling: Sampling,
        what: str,
    ) -> dict[int, int]:
        """Return the token after each text, by the text's number; equal on a replica's ranks."""
        # 0 on stages that do not choose
        chosen = torch.zeros(max(texts, default=0) + 1, dtype=torch.int64)

        def choose(batch: MicroBatch, logits: Tensor) -> None:
            last = batch.loss_mask.bool().to(logits.device)
            rows = whole_rows(logits[last], self.shape.vocab_size, self.groups.tensor)
            assert len(rows) == len(batch.positions), "a text without tokens"
            for row, n in zip(rows, batch.positions.tolist()):
                chosen[n] = sampling.choose(row, text=n, place=places[n])

        self.beat(what)
        for part in self._parts(sorted(texts, key=lambda n: -len(texts[n]))):
            self.beat(what)
            own = [texts[n] for n in part]
            self.model.read(self._batches(part, own, own, [1] * len(part)), choose)
        (chosen,) = ordered_sum([chosen], self.groups.pipeline)
        return {n: int(chosen[n]) for n in texts}

    def _scores(
        self, batch: MicroBatch, logits: Tensor, ends: Sequence[Sequence[int]]
    ) -> list[list[tuple[float, bool]]]:
        """Return sum of log-probabilities, and whether all are greedy, with each last token.

        Args:
            batch: its loss mask selects the scored tokens.
            logits: of the batch, [b, s, vocab/tp].
            ends: of each sequence the last tokens to score it with; the first is its label.
        """
        is_scored = batch.loss_mask.bool()  # [b, s]
        rows = logits[is_scored.to(logits.device)]
        tokens = batch.labels[is_scored]
        # the row of a sequence's last token once more for each further end
        counts = is_scored.sum(dim=1)
        last = (counts.cumsum(dim=0) - 1).tolist()
        again = [row for row, of_one in zip(last, ends) for _ in of_one[1:]]
        further = torch.tensor([end for of_one in ends for end in of_one[1:]], dtype=torch.int64)
        rows = torch.cat([rows, rows[again]])
        tokens = torch.cat([tokens, further]).to(logits.device)
        log_probabilities, is_greedy = token_scores(rows, tokens, self.groups.tensor)
        values = list(zip(log_probabilities.double().tolist(), is_greedy.tolist()))
        # sums by sequence and end
        found, behind = [], int(counts.sum())
        for end_row, count, of_one in zip(last, counts.tolist(), ends):
            shared = values[end_row - count + 1 : end_row]
            total, greedy = sum(value for value, _ in shared), all(each for _, each in shared)
            own = [values[end_row], *values[behind : behind + len(of_one) - 1]]
            behind += len(of_one) - 1
            found.append([(total + value, greedy and each) for value, each in own])
        return found

    def _parts(self, order: Sequence[int]) -> Iterator[list[int]]:
        """Yield the texts that go through the model together, by their numbers."""
        stages = self.groups.pipeline_size
        size = self.micro_batch_size * (_PER_STAGE * stages if stages > 1 else 1)
        for start in range(0, len(order), size):
            yield list(order[start : start + size])

    def _batches(
        self,
        numbers: Sequence[int],
        texts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        num_scored: Sequence[int],
    ) -> list[MicroBatch]:
        """Make microbatches of one length; the last text is repeated until they are full."""
        size, stages = self.micro_batch_size, self.groups.pipeline_size
        # the interleaved schedule takes a multiple of the stages only
        per_pass = size * (stages if self.groups.virtual_size > 1 else 1)
        missing = -len(texts) % per_pass
        rows = [*range(len(texts)), *[len(texts) - 1] * missing]
        multiple = math.lcm(_ROUND, self.groups.tensor_size)
        length = -(-max(map(len, texts)) // multiple) * multiple
        tokens, after = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
        mask = torch.zeros(len(rows), length)
        for at, row in enumerate(rows):
            end = len(texts[row])
            tokens[at, :end] = torch.tensor(texts[row])
            after[at, :end] = torch.tensor(labels[row])
            mask[at, end - num_scored[row] : end] = 1.0
        places = torch.tensor([numbers[row] for row in rows])
        return [
            MicroBatch(
                tokens=device.pinned(tokens[at : at + size]),
                labels=device.pinned(after[at : at + size]),
                loss_mask=mask[at : at + size],
                domains=torch.zeros(size, dtype=torch.int64),
                positions=places[at : at + size],
            )
            for at in range(0, len(rows), size)
        ]

    def _bar(self, total: int, what: str) -> Any:
        return progress(total, rank=self.groups.rank, desc=what, unit="text", leave=False)


def longest_of(shape: ModelShape) -> int:
    """Return how many tokens a model can read: what it was made for, or its sliding window."""
    longest = shape.max_position_embeddings
    return longest if shape.sliding_window is None else min(longest, shape.sliding_window)
