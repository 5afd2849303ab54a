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
    """How the model computes; its shape comes from the checkpoint."""

    bf16: Annotated[bool, COMMON] = False
    """Compute in bfloat16 with float32 master weights. Masks stay float32."""
    fp16: bool = False
    """Refused: loss scaling would scale the gates' gradients too. Use --bf16."""
    transformer_impl: TransformerImpl = "local"
    """Layers for continued pretraining; transformer_engine needs CUDA, and pruning refuses it."""
    recompute_granularity: Annotated[Literal["full"] | None, COMMON] = None
    """Recompute whole layers in the backward pass to save activation memory."""
    recompute_method: RecomputeMethod = "uniform"
    """With --recompute-granularity: uniform chunks of layers, or the first N layers of a stage."""
    recompute_num_layers: Extent = 1
    """With --recompute-granularity: layers per chunk (uniform) or per stage (block)."""
    deterministic_mode: bool = False
    """Use deterministic kernels only, so that a resumed run repeats bit for bit on a GPU."""
    reset_attention_mask: bool = False
    """Keep the documents packed into a sequence apart: no token attends to another document. Takes
    a mask of sequence length squared bytes for each sequence in flight."""
    reset_position_ids: bool = False
    """Count positions anew in every document. Needs --reset-attention-mask, and changes nothing
    beside it but rounding: rotary positions act through their distances alone."""
    eod_mask_loss: bool = False
    """Leave the first token of every document out of the loss: what comes before it says nothing
    about it."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.reset_position_ids and not self.reset_attention_mask:
            raise ValueError(
                "--reset-position-ids without --reset-attention-mask would let tokens of one "
                "document take tokens of another for their neighbours; add "
                "--reset-attention-mask, or drop the flag"
            )
        if self.reset_attention_mask and self.transformer_impl == "transformer_engine":
            raise ValueError(
                "--reset-attention-mask is not there with --transformer-impl transformer_engine, "
                "whose causal attention would pass over the mask; use --transformer-impl local"
            )
        if self.fp16:
            raise ValueError(
                "--fp16 is refused: its loss scaling would reach the gradients of the gates; "
                "use --bf16"
            )

    def check_recompute(self, layers: int) -> None:
        """Refuse chunks of recomputed layers that do not divide a stage.

        Args:
            layers: of a stage, or of a model chunk where it has several.

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
