"""How a run trains: its length, what it saves and evaluates, and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megashear.bounds import (
    COMMON,
    MOST_RATE,
    Between,
    Epsilon,
    Length,
    Minutes,
    Part,
    Rate,
    Seed,
    Sequences,
    Share,
    Steps,
    StepsOrNever,
    Tokens,
    check_bounds,
)
from megashear.config.defaults import ADAM_BETAS, ADAM_EPS, CLIP_GRAD, SEED, TIMEOUT_MINUTES

DEFAULT_EVAL_SEQUENCES = 64
"""Held-out sequences per domain in an evaluation, where no flag says how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at a time, what is logged, saved and evaluated."""

    train_iters: Annotated[Steps, COMMON] = 100
    """Optimizer steps of the run."""
    micro_batch_size: Annotated[Sequences, COMMON] = 1
    """Sequences per replica and forward pass."""
    global_batch_size: Annotated[Sequences, COMMON] = 8
    """Sequences per optimizer step, over all replicas."""
    seq_length: Annotated[Length, COMMON] = 128
    """Tokens per sequence."""
    seed: Seed = SEED
    """Seed of the data order, of the mask noise and of fresh weights."""
    log_interval: Steps = 10
    """Steps between console lines and TensorBoard points."""
    eval_interval: Annotated[StepsOrNever, COMMON] = 50
    """Steps between evaluations, after each of which the mixture is reweighted; 0 is never."""
    eval_sequences: Steps | None = None
    """Held-out sequences per domain in an evaluation, a fixed seeded subsample; the last one reads
    all. 64 unless one of the three --eval-* sizes is given; a resumed run keeps its own."""
    eval_tokens: Tokens | None = None
    """The same in tokens per domain, rounded down to whole sequences."""
    eval_share: Share | None = None
    """The same as a share of the run's training compute, a forward pass counted as a third of a
    training pass: 0.02 lets evaluations cost 2 percent. Settled at the start, by no clock."""
    eval_micro_batch_size: Sequences | None = None
    """Sequences per replica and forward pass of an evaluation, which keeps no activations and has
    room for more; --micro-batch-size unless given."""
    save: Annotated[str | None, COMMON] = None
    """Directory for checkpoints."""
    save_interval: Annotated[StepsOrNever, COMMON] = 0
    """Steps between checkpoints; 0 saves at the end only."""
    async_save: bool = False
    """Go on training while a checkpoint is written; needs host memory for a copy of it. The last
    one, and one before the run leaves, are waited for."""
    keep: Annotated[StepsOrNever, COMMON] = 0
    """Newest checkpoints to keep in --save; older ones are deleted once a new one is whole and
    a step was taken from it, but never the one the run started from. 0 keeps all."""
    load: Annotated[str | None, COMMON] = None
    """Checkpoint directory to start from; a run of the same kind continues, else only its weights
    are taken."""
    load_hf: Annotated[str | None, COMMON] = None
    """Hugging Face directory to start from instead of --load; each rank reads its own slices."""
    resume: Annotated[bool, COMMON] = False
    """Go on from the newest checkpoint in --save if there is one, else start from --load."""
    finetune: bool = False
    """Take only the weights of --load, even from a run of the same kind, and start at step 0."""
    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its checksum before a run starts from it; without,
    only names and sizes."""
    tensorboard_dir: Annotated[str | None, COMMON] = None
    """Directory for TensorBoard event files."""
    jsonl_log: str | None = None
    """File of JSON lines for the scalars that TensorBoard has: a line for each step with points.
    Must not exist, unless the run goes on from a checkpoint or --resume is given."""
    wandb_project: str | None = None
    """Project of Weights & Biases to send scalars, images and histograms to; needs wandb."""
    wandb_entity: str | None = None
    """User or team of the W&B project; the account's own unless given."""
    wandb_exp_name: str | None = None
    """Name of the run in W&B; W&B makes one up unless given."""
    wandb_save_dir: str | None = None
    """Directory for what W&B keeps on disk; --tensorboard-dir, else --save, unless given."""
    exit_interval: StepsOrNever = 0
    """Save and stop when the step is divisible by this; 0 is never."""
    exit_duration_in_mins: Minutes = 0
    """Save and stop at the first step that ends this many minutes after the start; 0 is never."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGINT save after the step and leave, with 128 + the signal's number."""
    max_skipped_steps: StepsOrNever = 3
    """Steps in a row that may be skipped because loss or gradient is not finite, or the loss is a
    spike; one more stops the run. 0 stops at the first."""
    loss_spike_factor: Annotated[float, Between(0, 1e6)] = 0.0
    """Skip a step whose loss is above this many times the mean of the last ones; 0 takes all."""
    distributed_timeout_minutes: Annotated[float, Between(1e-3, 1e5)] = TIMEOUT_MINUTES
    """Minutes without progress after which a rank counts as hung and the job ends, and after which
    a collective that some rank does not enter fails."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self._check_eval_size()
        given = [n for n in ("entity", "exp_name", "save_dir") if getattr(self, f"wandb_{n}")]
        if given and self.wandb_project is None:
            flags = " and ".join(f"--wandb-{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags} say nothing without --wandb-project, which is not given")
        if self.resume and self.save is None:
            raise ValueError("--resume goes on from --save, and --save is not given")
        check_one_source(self.load, self.load_hf)
        if 0 < self.loss_spike_factor <= 1:
            raise ValueError(
                f"--loss-spike-factor is {self.loss_spike_factor}: every second step is above its "
                f"mean; wanted more than 1, say 2, or 0 to take all"
            )

    def _check_eval_size(self) -> None:
        names = ("eval_sequences", "eval_tokens", "eval_share")
        given = [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} both say how much an evaluation reads; give one of them"
            )
        if self.eval_tokens is not None and self.eval_tokens < self.seq_length:
            raise ValueError(
                f"--eval-tokens {self.eval_tokens} is less than one sequence of --seq-length "
                f"{self.seq_length}; give at least {self.seq_length}"
            )

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Microbatches of one replica in one step.

        Raises:
            ValueError: the global batch does not divide.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_pass:
            below = self.global_batch_size // per_pass
            fitting = [str(n * per_pass) for n in (below, below + 1) if n]
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size * data-parallel size = {self.micro_batch_size} * "
                f"{data_parallel_size}; the nearest that are: {' and '.join(fitting)}"
            )
        return self.global_batch_size // per_pass


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of the weights, and the schedule that masks and multipliers share."""

    lr: Annotated[Rate, COMMON] = 1e-4
    """Peak learning rate of the weights."""
    min_lr: Annotated[float, Between(0, MOST_RATE)] | None = None
    """Floor of the schedule; a tenth of --lr unless given."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    lr_warmup_iters: Annotated[StepsOrNever, COMMON] = 0
    """Steps of linear warm-up from 0."""
    lr_decay_iters: Steps | None = None
    """Step at which the floor is reached; --train-iters unless given."""
    weight_decay: Annotated[float, Between(0, 10)] = 0.0
    """AdamW weight decay."""
    adam_beta1: Part = ADAM_BETAS[0]
    """Decay of the first moment."""
    adam_beta2: Part = ADAM_BETAS[1]
    """Decay of the second moment."""
    adam_eps: Epsilon = ADAM_EPS
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Between(1e-6, 1e9)] = CLIP_GRAD
    """Largest gradient norm of the weights, and, apart from it, of masks with multipliers."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"--min-lr is {self.min_lr}; it must lie between 0 and --lr {self.lr}")


def check_one_source(load: str | None, load_hf: str | None) -> None:
    """Refuse two places to take weights from.

    Raises:
        ValueError: both are given.
    """
    if load is not None and load_hf is not None:
        raise ValueError(
            f"--load {load} and --load-hf {load_hf} exclude each other; a run starts from one model"
        )
