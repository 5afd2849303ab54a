"""Work: one training step of a model, and the extents that each rank has of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megashear.config import ModelConfig, ParallelConfig
from megashear.models.weight_table import padded_vocab_size
from megashear.shape import ModelShape

GIB = 2**30
"""Bytes of a GiB."""
FLOAT32 = 4
"""Bytes of a float32."""
BFLOAT16 = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One training step of a model, and how a layout divides it."""

    shape: ModelShape
    parallel: ParallelConfig
    model: ModelConfig
    seq_length: int
    """Tokens per sequence."""
    micro_batch_size: int
    """Sequences per replica and forward pass."""
    num_microbatches: int
    """Microbatches of a replica in one step."""
    data_size: int = 1
    """Replicas."""
    masks: frozenset[str] = frozenset()
    """Kinds of mask of `masks.kinds.KINDS`; empty in continued pretraining."""
    noise_streams: int = 1
    """Noise streams of one step, over all replicas."""
    teacher: ModelShape | None = None
    """Model that is distilled from, at the same layout and precision."""
    has_entropy: bool = True
    """Whether the cross entropy is in the loss beside the divergence from the teacher."""

    @property
    def tensor(self) -> int:
        """Return the tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        """Return the number of pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def virtual(self) -> int:
        """Return the number of model chunks of a stage."""
        return self.parallel.num_virtual_stages_per_pipeline_rank

    @property
    def of_teacher(self) -> Work:
        """Return the work of the teacher, as if it were trained."""
        assert self.teacher is not None
        return replace(
            self,
            shape=self.teacher,
            model=replace(self.model, recompute_granularity=None),
            masks=frozenset(),
            noise_streams=1,
            teacher=None,
        )

    @property
    def element(self) -> int:
        """Return the bytes of an element of weights and activations."""
        return BFLOAT16 if self.model.bf16 else FLOAT32

    @property
    def tokens(self) -> int:
        """Return the tokens of a microbatch."""
        return self.seq_length * self.micro_batch_size

    @property
    def own_tokens(self) -> int:
        """Return the tokens of a microbatch that a rank holds outside attention and MLP."""
        return self.tokens // (self.tensor if self.parallel.sequence_parallel else 1)

    @property
    def own_streams(self) -> int:
        """Return the most noise streams of a replica in one step.

        Replicas and streams both divide the batch into equal runs of neighbouring sequences. A
        replica whose first stream begins in an earlier replica has one stream more.
        """
        streams, replicas = self.noise_streams, self.data_size
        return 1 + -(-(streams - math.gcd(streams, replicas)) // replicas)

    @property
    def chunk_layers(self) -> int:
        """Return the number of layers of a model chunk."""
        return self.shape.num_layers // (self.pipeline * self.virtual)

    @property
    def own_vocab(self) -> int:
        """Return the rows of the embedding on a tensor rank, with padding."""
        return padded_vocab_size(self.shape, self.tensor) // self.tensor

    @property
    def own_query(self) -> int:
        """Return the width of a tensor rank's queries."""
        return self.shape.num_attention_heads * self.shape.head_dim // self.tensor

    @property
    def own_key(self) -> int:
        """Return the width of a tensor rank's keys, which is that of its values."""
        return self.shape.num_query_groups * self.shape.head_dim // self.tensor

    @property
    def own_ffn(self) -> int:
        """Return the number of neurons of a tensor rank."""
        return self.shape.ffn_hidden_size // self.tensor
