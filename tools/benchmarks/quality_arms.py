"""What `quality.py` compares: sizes of the experiment, its arms, and what an arm computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megashear.quickstart.recipe import SOURCE, TARGET
from megashear.shape import ModelShape

MASK_SHARE = 0.2
"""Share of an arm's tokens on which masks learn, where its recipe names no other."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes and lengths of the experiment; rates are the same for all arms."""

    source: ModelShape
    target: ModelShape
    source_steps: int
    """Steps of the source, at least 8 tokens a parameter."""
    source_batch: int
    """Sequences in a step of the source."""
    arm_steps: int
    """Steps of an arm in all, masks and recovery, at equal tokens."""
    batch: int
    """Sequences in a step of an arm."""
    seq_length: int
    """Tokens in a sequence."""
    score_sequences: int
    """Sequences that importance is measured on."""
    eval_interval: int
    """Steps between two points of a curve; divides the steps of every arm at equal tokens."""
    eval_sequences: int
    """Held-out sequences of each domain in a point of a curve."""
    source_lr: float = 2e-3
    mask_phase_lr: float = 2e-3
    """Rate of the weights while masks learn, of arms with and without a teacher."""
    recover_lr: float = 2e-3
    """Rate of recovery, and of the model from scratch."""
    init_method_std: float = 0.05
    ranks: int = 2
    """Processes, data parallel."""
    noise_streams: int = 4
    """Independent draws of the masks in a step."""
    seeds: tuple[int, ...] = (1, 2, 3)
    use_gpu: bool = False
    """Whether to compute on GPUs, in bfloat16."""
    held_out_fraction: float = 0.01
    domain_bytes: int = 12_000_000
    """Most bytes of a domain of text."""


_TINY = ModelShape(
    num_layers=6,
    hidden_size=96,
    num_attention_heads=6,
    num_query_groups=6,
    head_dim=16,
    ffn_hidden_size=256,
    vocab_size=2048,
    max_position_embeddings=128,
)
_GPU = replace(
    _TINY,
    num_layers=12,
    hidden_size=384,
    head_dim=64,
    ffn_hidden_size=1152,
    max_position_embeddings=512,
)
SIZES = {
    # 1.06 M parameters and 8.5 M tokens, 0.45 M and 1.0 M tokens an arm: an hour or two
    "tiny": Size(
        source=_TINY,
        target=replace(
            _TINY,
            num_layers=4,
            hidden_size=64,
            num_attention_heads=4,
            num_query_groups=4,
            ffn_hidden_size=160,
        ),
        source_steps=4150,
        source_batch=16,
        arm_steps=1000,
        batch=8,
        seq_length=128,
        score_sequences=256,
        eval_interval=50,
        eval_sequences=16,
    ),
    # 3.4 M parameters and 28 M tokens, 1.3 M and 3.1 M tokens an arm: a night
    "small": Size(
        source=SOURCE,
        target=TARGET,
        source_steps=13_700,
        source_batch=16,
        arm_steps=3000,
        batch=8,
        seq_length=128,
        score_sequences=512,
        eval_interval=50,
        eval_sequences=16,
    ),
    # 24.6 M parameters and 200 M tokens, 7.9 M and 16 M tokens an arm; --minutes fits it to a lease
    "gpu": Size(
        source=_GPU,
        target=replace(
            _GPU,
            num_layers=8,
            hidden_size=256,
            num_attention_heads=4,
            num_query_groups=4,
            ffn_hidden_size=768,
        ),
        source_steps=6100,
        source_batch=64,
        arm_steps=1000,
        batch=32,
        seq_length=512,
        score_sequences=1024,
        eval_interval=50,
        eval_sequences=32,
        source_lr=1.5e-3,
        mask_phase_lr=1e-3,
        recover_lr=1e-3,
        init_method_std=0.02,
        ranks=1,
        use_gpu=True,
        domain_bytes=60_000_000,
    ),
    # to see that everything runs; its numbers say nothing
    "smoke": Size(
        source=replace(_TINY, num_layers=2, hidden_size=64, ffn_hidden_size=96),
        target=replace(
            _TINY,
            num_layers=1,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=4,
            ffn_hidden_size=64,
        ),
        source_steps=20,
        source_batch=4,
        arm_steps=40,
        batch=4,
        seq_length=32,
        score_sequences=8,
        eval_interval=2,
        eval_sequences=2,
        ranks=1,
        seeds=(1,),
        held_out_fraction=0.1,
    ),
}

SIZES["tiny-long"] = replace(SIZES["tiny"], arm_steps=4000, eval_interval=200)
"""Four times as many tokens an arm, from the same source, to see how differences change."""

Start = Literal["scratch", "random", "importance", "masks"]
Budget = Literal["tokens", "arithmetic"]
"""What all arms have the same of: tokens of training, or operations, a teacher's and the source's
under masks among them."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to a model of the target's shape."""

    label: str
    """Its name in tables and figures."""
    start: Start
    """Where its weights come from: nowhere, or units of the source that are chosen so."""
    distilled: bool = False
    """Whether the source is the teacher, in recovery and while masks learn."""
    depth_first: bool = False
    """Whether importance drops the layers at once, and masks learn the widths of the others."""
    dynamic: bool = False
    """Whether held-out losses move the mixture."""
    mask_share: float = MASK_SHARE
    """Share of the tokens on which masks learn."""
    mask_flags: Mapping[str, object] = field(default_factory=dict)
    """Further flags of `megashear prune`."""

    @property
    def is_scored(self) -> bool:
        """Return whether it needs importance scores."""
        return self.start == "importance" or self.depth_first


ARMS = {
    "importance": Arm(label="importance", start="importance"),
    "importance-kd": Arm(label="importance, distilled", start="importance", distilled=True),
    "masks": Arm(label="masks", start="masks"),
    "masks-kd": Arm(label="masks, distilled", start="masks", distilled=True),
    **{
        f"masks-kd-{share:02d}": Arm(
            label=f"masks on {share} % of the tokens, distilled",
            start="masks",
            distilled=True,
            mask_share=share / 100,
        )
        for share in (5, 10)
    },
    "widths-kd-05": Arm(
        label="importance for layers, masks for widths on 5 % of the tokens, distilled",
        start="masks",
        distilled=True,
        depth_first=True,
        mask_share=0.05,
    ),
    "masks-kd-10-slow": Arm(
        label="masks on 10 % of the tokens at a twentieth of the rate, distilled",
        start="masks",
        distilled=True,
        mask_share=0.1,
        mask_flags={"lr": 1e-4},
    ),
    "scratch": Arm(label="from scratch", start="scratch"),
    "scratch-kd": Arm(label="from scratch, distilled", start="scratch", distilled=True),
    "random": Arm(label="random units", start="random"),
    "random-kd": Arm(label="random units, distilled", start="random", distilled=True),
    "importance-kd-dynamic": Arm(
        label="importance, distilled, dynamic mixture",
        start="importance",
        distilled=True,
        dynamic=True,
    ),
}
"""Arms by the names that --arms takes, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of an arm."""

    mask_steps: int
    recover_steps: int

    @property
    def steps(self) -> int:
        """Return all its steps."""
        return self.mask_steps + self.recover_steps


def plan(arm: Arm, size: Size, budget: Budget) -> Plan:
    """Return the steps of an arm.

    At equal arithmetic it may compute as much as recovery alone does on the tokens of all arms,
    without a teacher; of what scoring leaves, masks and recovery get their shares of tokens.
    """
    share = arm.mask_share if arm.start == "masks" else 0.0
    total = float(size.arm_steps)
    if budget == "arithmetic":
        step_tokens = size.batch * size.seq_length
        allowed = size.arm_steps * step_tokens * size.target.training_flops(size.seq_length)
        per_step = step_tokens * (
            share * _mask_flops(arm, size) + (1 - share) * _recover_flops(arm, size)
        )
        total = (allowed - _score_flops(arm, size)) / per_step
    mask_steps = round(total * share)
    return Plan(mask_steps=mask_steps, recover_steps=round(total) - mask_steps)


def arithmetic(arm: Arm, size: Size, plan: Plan) -> float:
    """Return the floating-point operations of an arm: training, its teacher's, scoring.

    Training counts three forward passes, 6N and attention a token. A masked step counts at the
    source's shape, because every unit is computed; so does the teacher's one forward pass.
    """
    step_tokens = size.batch * size.seq_length
    return _score_flops(arm, size) + step_tokens * (
        plan.mask_steps * _mask_flops(arm, size) + plan.recover_steps * _recover_flops(arm, size)
    )


def _teacher_flops(arm: Arm, size: Size) -> float:
    return size.source.training_flops(size.seq_length) / 3 if arm.distilled else 0.0


def _mask_flops(arm: Arm, size: Size) -> float:
    layers = size.target.num_layers if arm.depth_first else size.source.num_layers
    masked = replace(size.source, num_layers=layers)
    return masked.training_flops(size.seq_length) + _teacher_flops(arm, size)


def _recover_flops(arm: Arm, size: Size) -> float:
    return size.target.training_flops(size.seq_length) + _teacher_flops(arm, size)


def _score_flops(arm: Arm, size: Size) -> float:
    tokens = size.score_sequences * size.seq_length if arm.is_scored else 0
    return tokens * size.source.training_flops(size.seq_length) / 3
