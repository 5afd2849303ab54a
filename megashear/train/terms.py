"""Terms of the loss: what is added up, with which weight, for every counted token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megashear.data.batch import MicroBatch


class LossTerm(ABC):
    """A summand of the loss, measured per token on the last pipeline stage.

    A term joins any objective: the loss of a microbatch is the sum over terms of weight times mean
    over its counted tokens. A subclass gives :meth:`per_token`; masked and padded positions are
    left out by the objective.

    Args:
        name: in the tag ``train/term/<name>``.
        weight: factor in the loss.
    """

    needs_logits = False
    """Whether :meth:`per_token` reads logits, which are kept beside the cross entropy then."""
    needs_entropy = True
    """Whether :meth:`per_token` is differentiable in the cross entropy, which otherwise is measured
    without a graph."""

    def __init__(self, name: str, *, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight

    def weight_at(self, step: int) -> float:
        """Return the weight at a step, counted from 0; equal on every rank."""
        return self.weight

    def prepare(self, batches: Sequence[MicroBatch], step: int) -> None:  # noqa: B027 (few need it)
        """Do what must precede the passes of a step, on every rank: of a teacher, its own pass.

        Args:
            batches: this replica's microbatches, in the order in which :meth:`per_token` is called;
                stages between the first and the last may find zeros in place of the text.
            step: counted from 0.
        """

    def planned(self) -> dict[str, Any]:
        """Return fields of `planning.work.Work` that the term adds."""
        return {}

    @abstractmethod
    def per_token(self, batch: MicroBatch, cross_entropy: Tensor, logits: Tensor | None) -> Tensor:
        """Return the term of each token, differentiable, [b, s].

        Called by the ranks of the last stage, once a microbatch. Collective over the tensor group,
        if it communicates.

        Args:
            batch: the microbatch.
            cross_entropy: of the next token, nats, float32 [b, s].
            logits: this rank's slice of the vocabulary, [b, s, vocab/tp], where
                ``needs_logits``, in the precision of the model; they must not be changed in place.
                Columns of padding, which a
                vocabulary has that tensor ranks do not divide, are minus infinity.
        """


class CrossEntropy(LossTerm):
    """The cross entropy of the next token: language modelling.

    Args:
        weight: factor in the loss.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__("cross-entropy", weight=weight)

    def per_token(self, batch: MicroBatch, cross_entropy: Tensor, logits: Tensor | None) -> Tensor:
        """Return ``cross_entropy``."""
        return cross_entropy
