"""Compare what a converted model computes in transformers and in megatron-core."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint import store
from megashear.checkpoint.description import find_iteration, read_description
from megashear.config import ModelConfig, ParallelConfig
from megashear.models.llama import build_chunks
from megashear.parallel.launch import distributed
from megashear.shape import ModelShape

SAME_WEIGHTS = 1e-5
"""Largest relative difference of logits: both sides hold equal weights, and float32 sums may come
in another order (law 3 of the project's tests)."""
_SEQUENCES, _LENGTH, _SEED = 2, 64, 1234
"""Random tokens to compare on: sequences, tokens in each, and what draws them."""


def check_tokens(tokens: Sequence[int], shape: ModelShape) -> Tensor:
    """Return the tokens to compare on, [b, s]: those given, as one sequence, or random ones.

    Raises:
        ValueError: an id that the vocabulary does not have; more than the model was made for.
    """
    longest = min(shape.max_position_embeddings, shape.sliding_window or _LENGTH)
    if not tokens:
        generator = torch.Generator().manual_seed(_SEED)
        size = (_SEQUENCES, min(_LENGTH, longest))
        return torch.randint(shape.vocab_size, size, generator=generator)
    unknown = [token for token in tokens if not 0 <= token < shape.vocab_size]
    if unknown:
        raise ValueError(
            f"--verify-tokens has {unknown[0]}; the model's vocabulary is 0 to "
            f"{shape.vocab_size - 1}"
        )
    longest = min(shape.max_position_embeddings, shape.sliding_window or len(tokens))
    if len(tokens) > longest:
        raise ValueError(f"--verify-tokens has {len(tokens)} tokens; the model reads {longest}")
    return torch.tensor([list(tokens)])


def require_transformers() -> None:
    """Refuse to begin a conversion that could not be compared.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(
            "--verify compares logits with transformers, which is not installed: pip install "
            '"megashear[verify]", or leave --verify out'
        ) from None


def compare(
    checkpoint: Path | str,
    hf_dir: Path | str,
    tokens: Tensor,
    *,
    rounded_to: torch.dtype | None,
) -> dict[str, Any]:
    """Run both models in float32 on the same tokens, one after the other, in this process.

    In memory is one model in float32 at a time, and at times its largest parameter once more.

    Args:
        checkpoint: of the model, for megatron-core.
        hf_dir: of the model, for transformers.
        tokens: token ids, [b, s].
        rounded_to: the number format that the conversion rounded weights to; both sides are
            rounded to it, so that each computes with what was written. None if it left their
            values alone.

    Returns:
        What was found, as plain values.

    Raises:
        ValueError: transformers cannot load ``hf_dir``; the logits differ by more than the bound.
    """
    theirs = _in_transformers(Path(hf_dir), tokens, rounded_to)
    gc.collect()
    ours = _in_megatron(Path(checkpoint), tokens, rounded_to)
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    found = {
        "relative_error": error,
        "bound": SAME_WEIGHTS,
        "largest_difference": float((ours - theirs).abs().max()),
        "same_next_token": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "tokens": tokens.tolist(),
    }
    if not error <= SAME_WEIGHTS:  # not a number is no agreement
        raise ValueError(
            f"the logits of megatron-core and transformers differ by {error:.3g} of their norm, "
            f"at most {SAME_WEIGHTS:g} is right; nothing was written: report it with the model's "
            f"config.json"
        )
    return found


def _in_transformers(directory: Path, tokens: Tensor, rounded_to: torch.dtype | None) -> Tensor:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory)
    except Exception as error:
        raise ValueError(
            f"transformers cannot load {directory}: {error}; convert without --verify, or with "
            f"another release of transformers"
        ) from error
    model.float().eval()
    _round(model, rounded_to)
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def _in_megatron(checkpoint: Path, tokens: Tensor, rounded_to: torch.dtype | None) -> Tensor:
    """Return logits [b, s, v] of the model in a checkpoint, in one process."""
    shape = read_description(find_iteration(checkpoint)).shape
    parallel, model = ParallelConfig(), ModelConfig()
    with distributed(parallel, model) as groups:
        chunks = build_chunks(shape, groups, parallel, model, variant="local")
        store.load_weights(checkpoint, chunks, exact=True)
        _round(chunks[0], rounded_to)
        here = next(chunks[0].parameters()).device
        positions = torch.arange(tokens.size(1), device=here).expand_as(tokens)
        with torch.no_grad():
            logits: Tensor = chunks[0].eval()(tokens.to(here), positions, None)
    return logits.float().cpu()[..., : shape.vocab_size]


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Round float32 parameters in place to the values of a number format; None leaves them."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
