"""What a model costs whoever runs it, and the share of a budget that this is."""

from __future__ import annotations

from dataclasses import dataclass

from megashear.planning.hardware import GB, Gpu
from megashear.planning.shares import MfuShare
from megashear.planning.time import FORWARD_SHARE
from megashear.planning.work import BFLOAT16
from megashear.shape import ModelShape

KEYS_AND_VALUES = 2


def weight_bytes(shape: ModelShape) -> int:
    """Return the bytes of a model's weights in bfloat16."""
    return BFLOAT16 * shape.num_params()


def kv_bytes(shape: ModelShape) -> int:
    """Return the bytes of keys and values that a model keeps for a token, in bfloat16."""
    return KEYS_AND_VALUES * BFLOAT16 * shape.num_layers * shape.num_query_groups * shape.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardTime:
    """How long a forward pass of a whole model takes on one GPU."""

    sequences: int
    seq_length: int
    """Tokens per sequence."""
    gpu: Gpu
    share: MfuShare
    """Share of the peak that is reached; that of training is taken."""

    def seconds(self, shape: ModelShape) -> float:
        """Return the longer of two times: of its arithmetic, and of reading all weights once."""
        tokens = self.sequences * self.seq_length
        flops = FORWARD_SHARE * shape.training_flops(self.seq_length) * tokens
        arithmetic = flops / (self.gpu.peak_flops * self.share.value)
        return max(arithmetic, weight_bytes(shape) / self.gpu.memory_speed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a pruned model may cost; None where there is no bound."""

    params: float | None
    """Parameters aimed at."""
    weights_gb: float | None
    """Most GB of weights."""
    kv_bytes: float | None
    """Most bytes of KV cache for a token."""
    forward_ms: float | None
    """Most milliseconds of ``forward``."""
    forward: ForwardTime
    flags: str
    """The budgets as the user typed them."""

    def limited(self, shape: ModelShape) -> float:
        """Return the largest share of an upper limit that a model takes; 0 without limits."""
        found = [0.0]
        if self.weights_gb is not None:
            found.append(weight_bytes(shape) / (self.weights_gb * GB))
        if self.kv_bytes is not None:
            found.append(kv_bytes(shape) / self.kv_bytes)
        if self.forward_ms is not None:
            found.append(1e3 * self.forward.seconds(shape) / self.forward_ms)
        return max(found)

    def used(self, shape: ModelShape) -> float:
        """Return the parameters over those aimed at, or else the largest share of a limit."""
        if self.params is not None:
            return shape.num_params() / self.params
        return self.limited(shape)
