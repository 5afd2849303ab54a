"""How a model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megashear.bounds import COMMON, Extent, check_bounds

TransformerImpl = Literal["local", "transformer_engine"]
"""Implementations of the layers."""
RecomputeMethod = Literal["uniform", "block"]
"""Which layers of a stage are recomputed together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """How the model computes. Its shape comes from the checkpoint."""

    bf16: Annotated[bool, COMMON] = False
    """Compute in bfloat16, with float32 master weights. Masks are float32 in any case."""
    fp16: bool = False
    """Always refused, because loss scaling would scale the gradients of gates too. Use --bf16."""
    transformer_impl: TransformerImpl = "local"
    """Implementation of the layers. transformer_engine needs CUDA and is for continued pretraining;
    pruning refuses it."""
    recompute_granularity: Annotated[Literal["full"] | None, COMMON] = None
    """Recompute whole layers in the backward pass, to save memory of activations."""
    recompute_method: RecomputeMethod = "uniform"
    """What --recompute-granularity recomputes: all layers of a stage in equal chunks (uniform), or
    its first layers (block)."""
    recompute_num_layers: Extent = 1
    """Layers per chunk (uniform) or per stage (block) of --recompute-method."""
    deterministic_mode: bool = False
    """Use only deterministic kernels, so that a resumed run repeats bit for bit on a GPU."""
    reset_attention_mask: bool = False
    """Let no token attend to another document of its sequence. Costs a mask of (sequence length)^2
    bytes for each sequence in flight."""
    reset_position_ids: bool = False
    """Count positions from 0 in every document. Needs --reset-attention-mask, with which it changes
    only rounding, because rotary positions act only through their distances."""
    eod_mask_loss: bool = False
    """Leave the first token of every document out of the loss, because the text before it belongs
    to another document."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.reset_position_ids and not self.reset_attention_mask:
            raise ValueError(
                "--reset-position-ids without --reset-attention-mask would let tokens of one "
                "document take tokens of another document for their neighbours; add "
                "--reset-attention-mask, or drop the flag"
            )
        if self.reset_attention_mask and self.transformer_impl == "transformer_engine":
            raise ValueError(
                "--reset-attention-mask does not work with --transformer-impl transformer_engine, "
                "whose causal attention ignores the mask; use --transformer-impl local"
            )
        if self.fp16:
            raise ValueError(
                "--fp16 is refused: its loss scaling would reach the gradients of the gates; "
                "use --bf16"
            )

    def check_recompute(self, layers: int) -> None:
        """Refuse chunks of recomputed layers that do not divide a stage.

        Args:
            layers: number of layers of a stage, or of a model chunk where a stage has several.

        Raises:
            ValueError: with both numbers and those that divide.
        """
        uniform = self.recompute_granularity is not None and self.recompute_method == "uniform"
        if uniform and layers % self.recompute_num_layers:
            fitting = [n for n in range(1, layers + 1) if layers % n == 0]
            raise ValueError(
                f"--recompute-num-layers {self.recompute_num_layers} does not divide the {layers} "
                f"layers of a stage, as --recompute-method uniform wants; possible: "
                f"{', '.join(map(str, fitting))}"
            )
