"""Distillation: a teacher's next-token distribution as a term of the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megashear.data.batch import MicroBatch
from megashear.models.divergence import vocab_parallel_divergence
from megashear.models.llama import unwrap
from megashear.shape import ModelShape
from megashear.train.schedule import run_forward
from megashear.train.terms import LossTerm


class Teacher:
    """A frozen model whose logits the last stage makes when a microbatch of the student comes.

    Its own pass ends before the output layer: hidden states of all microbatches wait there in a
    small part of the memory of their logits.

    Args:
        chunks: this rank's, at the layout of the student. They return hidden states from now on.
        shape: of the whole model.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], shape: ModelShape) -> None:
        self.shape = shape
        # without the wrapper of mixed precision, which would return hidden states in float32
        self.chunks = [unwrap(chunk).requires_grad_(False) for chunk in chunks]
        last = self.chunks[-1]
        self._head: torch.nn.Module | None = None
        self._tied: Tensor | None = None
        if last.post_process:
            self._head = last.output_layer
            if last.share_embeddings_and_output_weights:
                self._tied = last.shared_embedding_or_output_weight()
            last.post_process = False

    def hidden_states(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the hidden states before the output layer, one entry per microbatch on the last
        stage, none on others. Collective over the replica's model group.

        Returns:
            [s, b, h]; under sequence parallelism this rank's part of the sequence.
        """
        return run_forward(self.chunks, batches)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's slice of the logits, [b, s, vocab/tp], on the last stage.

        Collective over the tensor group.

        Args:
            hidden: of a microbatch, from :meth:`hidden_states`.
        """
        assert self._head is not None, "the last stage has the output layer"
        logits, _ = self._head(hidden, weight=self._tied)
        return logits.transpose(0, 1).contiguous()


class Distillation(LossTerm):
    """Kullback-Leibler divergence of the student's next token from the teacher's, times T^2.

    The factor keeps the size of the gradients at any temperature T. Source: Hinton et al. 2015
    (arXiv:1503.02531), section 2.

    Args:
        teacher: reads the same text as the student.
        tensor_group: ranks that share the vocabulary.
        weight: at the first step.
        last_weight: at the last step; reached linearly.
        num_steps: steps of the run.
        temperature: T.
    """

    needs_logits = True
    needs_entropy = False

    def __init__(
        self,
        teacher: Teacher,
        tensor_group: dist.ProcessGroup,
        *,
        weight: float = 1.0,
        last_weight: float | None = None,
        num_steps: int = 1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__("distillation", weight=weight)
        self.teacher = teacher
        self.temperature = temperature
        self._group = tensor_group
        self._change = 0.0 if last_weight is None else last_weight - weight
        self._last_step = max(1, num_steps - 1)
        self._pending: deque[tuple[MicroBatch, Tensor]] = deque()

    def weight_at(self, step: int) -> float:
        """Return the weight on the line from the first to the last step."""
        return self.weight + self._change * min(1.0, step / self._last_step)

    def prepare(self, batches: Sequence[MicroBatch], step: int) -> None:
        """Run the teacher over the microbatches of a step. Collective over the replica's model
        group."""
        self._pending = deque(zip(batches, self.teacher.hidden_states(batches)))

    def planned(self) -> dict[str, Any]:
        """Return the teacher's shape."""
        return {"teacher": self.teacher.shape}

    def per_token(self, batch: MicroBatch, cross_entropy: Tensor, logits: Tensor | None) -> Tensor:
        """Return the divergence of each token, nats times T^2, [b, s]."""
        assert logits is not None
        of, hidden = self._pending.popleft()
        assert of is batch, "teacher and student read the same text"
        theirs = self.teacher.logits(hidden)
        divergence = vocab_parallel_divergence(
            logits, theirs, self._group, temperature=self.temperature
        )
        return divergence * self.temperature**2
