"""One training step of a model, and the extents that a layout leaves a rank of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """Kinds of mask, of `masks.kinds.KINDS`; none in continued pretraining."""
    noise_streams: int = 1
    """Mask draws of one step, over all replicas."""

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def virtual(self) -> int:
        """Model chunks of a stage."""
        return self.parallel.num_virtual_stages_per_pipeline_rank

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return BFLOAT16 if self.model.bf16 else FLOAT32

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.seq_length * self.micro_batch_size

    @property
    def own_tokens(self) -> int:
        """Tokens of a microbatch that this rank holds outside attention and MLP."""
        return self.tokens // (self.tensor if self.parallel.sequence_parallel else 1)

    @property
    def own_streams(self) -> int:
        """Mask draws that a replica holds in one step, at most.

        Replicas and streams each divide the batch into equal runs of neighbouring sequences; a
        replica meets one stream more than it holds whole where its first begins before it.
        """
        streams, replicas = self.noise_streams, self.data_size
        return 1 + -(-(streams - math.gcd(streams, replicas)) // replicas)

    @property
    def chunk_layers(self) -> int:
        """Layers of a model chunk."""
        return self.shape.num_layers // (self.pipeline * self.virtual)

    @property
    def own_vocab(self) -> int:
        """Rows of the embedding on a tensor rank, with the padding that makes all equal."""
        return padded_vocab_size(self.shape, self.tensor) // self.tensor

    @property
    def own_query(self) -> int:
        """Width of a tensor rank's queries."""
        return self.shape.num_attention_heads * self.shape.head_dim // self.tensor

    @property
    def own_key(self) -> int:
        """Width of a tensor rank's keys, and of its values."""
        return self.shape.num_query_groups * self.shape.head_dim // self.tensor

    @property
    def own_ffn(self) -> int:
        """Neurons of a tensor rank."""
        return self.shape.ffn_hidden_size // self.tensor
