"""Training steps that benchmarks compare: ours, masked and unmasked, and transformers' LLaMA."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megashear.config import (
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TransformerImpl,
)
from megashear.data.batch import DocumentBorders, MicroBatch, micro_batch
from megashear.models import folded
from megashear.models.llama import build_llama
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.guard import StepGuard
from megashear.train.objectives import LanguageModelling, Objective
from megashear.train.optim import build_optimizer, build_schedule
from megashear.train.pruning import StructuredPruning
from megashear.train.step import TrainStep

SEED = 1234
OPTIMIZER = OptimizerConfig(lr=1e-5, lr_decay_style="constant")
WHOLE = "whole"
"""Name of the whole step, which contains all parts."""
MASKS = MaskConfig(sparsity_warmup_iters=10)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Shape and batch of a step."""

    shape: ModelShape
    seq_length: int
    micro_batch_size: int
    num_microbatches: int = 1
    """Of each replica."""
    num_streams: int = 1
    """Noise streams of a masked step, over all replicas."""

    @property
    def tokens(self) -> int:
        """Return the tokens of one replica's step."""
        return self.seq_length * self.micro_batch_size * self.num_microbatches

    def flops(self) -> float:
        """Return the floating-point operations of the matrix products of one replica's step.

        A product of weights takes 2 a token and weight forward and 4 backward; causal attention
        2 * 2 * s / 2 a token and unit of its width, and twice that backward. What recompute does
        again is not counted.

        Source: Narayanan et al. 2021 (arXiv:2104.04473), appendix, with causal attention at half.
        """
        shape = self.shape
        weights = shape.num_layers * shape.layer_params() + shape.vocab_size * shape.hidden_size
        width = shape.num_attention_heads * shape.head_dim
        attention = shape.num_layers * 2 * self.seq_length * width
        return 3.0 * self.tokens * (2 * weights + attention)

    def microbatches(self, groups: ParallelGroups) -> list[MicroBatch]:
        """Return the microbatches of this replica, of random tokens."""
        generator = torch.Generator().manual_seed(SEED + groups.data_rank)
        size = self.micro_batch_size
        found = []
        for number in range(self.num_microbatches):
            text = torch.randint(
                self.shape.vocab_size, (size, self.seq_length + 1), generator=generator
            )
            first = (groups.data_rank * self.num_microbatches + number) * size
            # as the loader makes them, pinned for a GPU
            found.append(
                micro_batch(
                    text[:, :-1].contiguous(),
                    text[:, 1:].contiguous(),
                    [0] * size,
                    range(first, first + size),
                    size,
                    borders=DocumentBorders(),
                )
            )
        return found


class Parts:
    """Seconds of the parts of a step by name, one step at a time.

    Time of a part within another counts only for the inner one, so parts add up to `WHOLE` at most.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []  # seconds of parts inside each part that runs
        self._patched: list[tuple[Any, str, Any]] = []

    def clear(self) -> None:
        """Forget the parts of the last step."""
        self.seconds = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``."""
        device.synchronize()
        begin = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            device.synchronize()
            took, within = time.perf_counter() - begin, self._within.pop()
            own = took if part == WHOLE else took - within
            self.seconds[part] = self.seconds.get(part, 0.0) + own
            if self._within:
                self._within[-1] += took

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of an attribute of ``owner``, until `restore`."""
        real = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(part):
                return real(*args, **kwargs)

        self.replace(owner, name, timed)

    def replace(self, owner: Any, name: str, other: Any) -> None:
        """Put ``other`` in the place of an attribute of ``owner``, until `restore`."""
        self._patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, other)

    def restore(self) -> None:
        """Undo all calls of `watch` and `replace`."""
        for owner, name, real in reversed(self._patched):
            setattr(owner, name, real)
        self._patched = []


class OurStep:
    """A training step of the trainer, on random tokens.

    Args:
        work: what it computes.
        groups: where this rank stands.
        parallel: the layout.
        model: precision, recompute.
        target: shape to prune to; None trains without masks.
        variant: of the layers; local ones where there is a target.
    """

    def __init__(
        self,
        work: Work,
        groups: ParallelGroups,
        parallel: ParallelConfig,
        model: ModelConfig,
        *,
        target: ModelShape | None = None,
        variant: TransformerImpl = "local",
    ) -> None:
        self.chunks = build_llama(work.shape, groups, parallel, model, variant=variant, seed=SEED)
        objective: Objective = LanguageModelling(self.chunks)
        if target is not None:
            batch = work.micro_batch_size * work.num_microbatches * groups.data_size
            objective = StructuredPruning(
                self.chunks,
                groups,
                source=work.shape,
                target=target,
                config=replace(MASKS, mask_noise_streams=work.num_streams),
                seed=SEED,
                global_batch_size=batch,
                sequence_parallel=parallel.sequence_parallel,
            )
            _open_some(objective)
        optimizer = build_optimizer(
            self.chunks, OPTIMIZER, bf16=model.bf16, sharded=parallel.use_distributed_optimizer
        )
        self.train_step = TrainStep(
            chunks=self.chunks,
            objective=objective,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, OPTIMIZER, TrainConfig().train_iters),
            # masks learn at a rate of 0, so that every round computes the same
            peak_lr=math.inf,
            groups=groups,
            guard=StepGuard(TrainConfig()),
        )
        self.batches = work.microbatches(groups)
        self.steps = 0
        self.loss = float("nan")

    def __call__(self) -> None:
        """Make one step. Collective over the world."""
        taken = self.train_step(self.batches, self.steps)
        assert taken.skipped is None, taken.skipped
        self.steps += 1
        if taken.losses:
            last = taken.losses[-1]
            self.loss = float(last.sums.sum() / last.counts.sum())

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.train_step.objective

    def unmasked(self) -> OurStep:
        """Return a step of the same model and optimizer without masks."""
        plain = copy.copy(self)
        plain.train_step = replace(self.train_step, objective=LanguageModelling(self.chunks))
        return plain

    def watch(self, parts: Parts) -> None:
        """Time the parts of this step, until `Parts.restore`."""
        from megatron.core.pipeline_parallel import schedules

        parts.watch(schedules, "forward_step", "forward")
        parts.watch(schedules, "backward_step", "backward")
        objective = self.objective
        optimizer = self.train_step.optimizer
        parts.watch(optimizer, "prepare_grads", "optimizer")
        parts.watch(optimizer, "get_grad_norm", "optimizer")
        parts.watch(optimizer, "step_with_ready_grads", "optimizer")
        if isinstance(objective, StructuredPruning):
            parts.watch(objective.masks, "draw_ahead", "masks: noise of the next step")
            parts.watch(objective.masks, "sample", "masks: sampling")
            parts.watch(objective.binding, "bind", "masks: binding")
            # within forward and backward, and taken off them
            parts.watch(folded, "fold", "masks: folding")
            parts.watch(folded, "unfold", "masks: unfolding")
            parts.watch(objective.binding, "backward", "masks: gradients")
            parts.watch(objective.masks, "closed_sums", "masks: penalty")
            parts.watch(objective.binding, "whole_sums", "masks: penalty")
            parts.watch(objective.constraint, "penalty", "masks: penalty")
            parts.watch(objective, "norms", "masks: update")
            parts.watch(objective, "update", "masks: update")


def _open_some(objective: Objective) -> None:
    """Set masks as in the middle of a run: some gates closed, some open, some between."""
    assert isinstance(objective, StructuredPruning)
    generator = torch.Generator().manual_seed(SEED)
    for log_alpha in objective.masks.state_dict().values():
        log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator) * 2 + 1)


class TransformersStep:
    """A step of transformers' LLaMA with SDPA and torch's AdamW: the plain model, one process.

    Args:
        work: what it computes.
        groups: where this rank stands.
        model: precision.
        fused: whether AdamW is torch's fused one, which is faster, or its default.
    """

    def __init__(
        self, work: Work, groups: ParallelGroups, model: ModelConfig, *, fused: bool = True
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = work.shape
        config = LlamaConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            rms_norm_eps=shape.norm_epsilon,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=False,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(SEED)
        dtype = torch.bfloat16 if model.bf16 else torch.float32
        plain: torch.nn.Module = LlamaForCausalLM(config)
        self.model = plain.to(device=device.device(), dtype=dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=OPTIMIZER.lr, betas=(0.9, 0.95), fused=fused
        )
        self.batches = [
            (batch.tokens.to(device.device()), batch.labels.to(device.device()))
            for batch in work.microbatches(groups)
        ]

    def __call__(self) -> None:
        """Make one step."""
        self.optimizer.zero_grad()
        for tokens, labels in self.batches:
            logits = self.model(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            (loss / len(self.batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_grad)
        self.optimizer.step()


def target_of(shape: ModelShape) -> ModelShape:
    """Return a target that prunes units of every kind, about as 7B to 2.7B does."""
    heads = max(1, shape.heads_per_group * 5 // 8) if shape.heads_per_group > 1 else 1
    groups = max(1, shape.num_query_groups * 5 // 8)
    return replace(
        shape,
        num_layers=max(1, shape.num_layers * 3 // 4),
        hidden_size=shape.hidden_size * 5 // 8,
        num_query_groups=groups,
        num_attention_heads=groups * heads,
        ffn_hidden_size=shape.ffn_hidden_size * 5 // 8,
    )


class Storages:
    """Storages of tensors, each counted once, and the most bytes held at once.

    Args:
        known: tensors whose memory is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._held: dict[int, int] = {}  # times, by address
        self._bytes = 0
        self.most = 0

    def leave_out(self, tensor: Tensor) -> None:
        """Stop counting the memory of a tensor."""
        self._known.add(tensor.untyped_storage().data_ptr())

    def hold(self, tensor: Tensor) -> _Held:
        """Count a tensor's memory until the returned object is deleted."""
        storage = tensor.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._known:
            return _Held(tensor, lambda: None)
        times = self._held[at] = self._held.get(at, 0) + 1
        if times == 1:
            self._bytes += size
            self.most = max(self.most, self._bytes)

        def let_go() -> None:
            self._held[at] -= 1
            if not self._held[at]:
                self._bytes -= size

        return _Held(tensor, let_go)


class _Held:
    """A tensor, with a function to call when nobody holds it any longer."""

    def __init__(self, tensor: Tensor, let_go: Callable[[], None]) -> None:
        self.tensor, self._let_go = tensor, let_go

    def __del__(self) -> None:
        self._let_go()


def kept_bytes(step: OurStep) -> dict[str, int]:
    """Return the bytes that a step keeps on this rank, each storage counted once.

    Returns:
        "saved": the most that autograd keeps at once from forward passes for backward ones, without
        weights, folded or not. "folded": folded weights, one set for each noise stream, which stay
        from step to step. "apart": gradients that are collected apart for streams. "weights": of
        the model.
    """
    weights = [parameter for chunk in step.chunks for parameter in chunk.parameters()]
    saved, own, made = Storages(weights), Storages(), Storages()
    apart = Storages(weight.main_grad for weight in weights)
    held = [own.hold(weight) for weight in weights]
    fold, unfold = folded.fold, folded.unfold

    def noted_fold(*given: Any, **named: Any) -> Tensor:
        result = fold(*given, **named)
        saved.leave_out(result)
        held.append(made.hold(result))
        return result

    def noted_unfold(raw: Tensor, *given: Any) -> None:
        held.append(apart.hold(raw))
        unfold(raw, *given)

    parts = Parts()
    parts.replace(folded, "fold", noted_fold)
    parts.replace(folded, "unfold", noted_unfold)
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.hold, lambda kept: kept.tensor):
            step()
    finally:
        parts.restore()
    return {
        "saved": saved.most,
        "folded": made.most,
        "apart": apart.most,
        "weights": own.most,
    }
