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
    """Length and batches of the run, and what it logs, saves and evaluates."""

    train_iters: Annotated[Steps, COMMON] = 100
    """Optimizer steps of the run."""
    micro_batch_size: Annotated[Sequences, COMMON] = 1
    """Sequences per replica in one forward pass."""
    global_batch_size: Annotated[Sequences, COMMON] = 8
    """Sequences per optimizer step, summed over all replicas."""
    seq_length: Annotated[Length, COMMON] = 128
    """Tokens per sequence."""
    seed: Seed = SEED
    """Seed of the data order, the mask noise and fresh weights."""
    log_interval: Steps = 10
    """Steps between lines of the log, which are also points in TensorBoard."""
    eval_interval: Annotated[StepsOrNever, COMMON] = 50
    """Steps between evaluations, each of which reweights the mixture; 0 never evaluates."""
    eval_sequences: Steps | None = None
    """Held-out sequences per domain in an evaluation: always the same ones, chosen by --seed. The
    last evaluation reads all. 64 unless this, --eval-tokens or --eval-share is given; a resumed run
    keeps its number."""
    eval_tokens: Tokens | None = None
    """Held-out tokens per domain in an evaluation, in place of --eval-sequences; rounded down to
    whole sequences."""
    eval_share: Share | None = None
    """Share of the run's training compute that evaluations may cost, in place of --eval-sequences:
    0.02 is 2 percent. Calculated at the start, with a forward pass as a third of a training
    pass."""
    eval_micro_batch_size: Sequences | None = None
    """Sequences per replica in one forward pass of an evaluation, which keeps no activations and so
    has room for more. --micro-batch-size unless given."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks or groups of lm-evaluation-harness to score while the model is trained, also between
    commas, and at the end: cheap ones, for the run waits. While masks are learned, of the model
    that would be cut. Needs `pip install "megashear[eval]"`."""
    eval_tasks_interval: StepsOrNever = 0
    """Steps between the scores of --eval-tasks; 0 asks them only at the end."""
    eval_tasks_limit: Steps | None = None
    """Documents of each task of --eval-tasks to ask, the first ones; all unless given."""
    include_path: str | None = None
    """Directory with task files (.yaml) of your own for --eval-tasks, which are looked at first.
    They may read local JSON lines."""
    text_samples: Annotated[int, Between(0, 100)] = 3
    """Number of held-out texts that the model continues at the end of the run, for the log and the
    report: up to 48 tokens each, the likeliest ones. After a run that learns masks, the model that
    would be cut writes. 0 for none."""
    save: Annotated[str | None, COMMON] = None
    """Directory for checkpoints."""
    save_interval: Annotated[StepsOrNever, COMMON] = 0
    """Steps between checkpoints; 0 saves only at the end."""
    async_save: bool = False
    """Train on while a checkpoint is written. Needs host memory for a copy of the checkpoint. The
    run does not end before its last checkpoint is written."""
    keep: Annotated[StepsOrNever, COMMON] = 0
    """Number of newest checkpoints to keep in --save. Older ones are deleted once a new one is
    whole and a step was taken from it; the one the run started from is never deleted. 0 keeps
    all."""
    load: Annotated[str | None, COMMON] = None
    """Checkpoint directory to start from. A run of the same kind is resumed from it; another kind
    of run takes only its weights."""
    load_hf: Annotated[str | None, COMMON] = None
    """Hugging Face directory to start from, in place of --load; each rank reads only its slices."""
    resume: Annotated[bool, COMMON] = False
    """Resume from the newest checkpoint in --save; if there is none, start from --load."""
    finetune: bool = False
    """Take only the weights of --load, even if a run of the same kind saved them, and start at step
    0."""
    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its checksum before a run starts from it. Turned off,
    only names and sizes are compared."""
    tensorboard_dir: Annotated[str | None, COMMON] = None
    """Directory for TensorBoard event files."""
    jsonl_log: str | None = None
    """File of JSON lines with the scalars of TensorBoard, a line for each step that has any. Must
    not exist, unless the run is resumed or --resume is given."""
    wandb_project: str | None = None
    """Project of Weights & Biases that receives scalars, images and histograms; needs wandb."""
    wandb_entity: str | None = None
    """User or team that owns the W&B project; the account's default unless given."""
    wandb_exp_name: str | None = None
    """Name of the run in W&B, which invents one unless given."""
    wandb_save_dir: str | None = None
    """Directory for the local files of W&B; --tensorboard-dir, or else --save, unless given."""
    exit_interval: StepsOrNever = 0
    """Save and stop at a step that is divisible by this number; 0 never does."""
    exit_duration_in_mins: Minutes = 0
    """Save and stop at the first step that ends this many minutes after the start; 0 never does."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGINT save after the current step and exit with 128 + the signal's number."""
    max_skipped_steps: StepsOrNever = 3
    """Number of steps in a row that may be skipped, because loss or gradient is not finite or the
    loss is a spike; one more stops the run. 0 stops at the first."""
    loss_spike_factor: Annotated[float, Between(0, 1e6)] = 0.0
    """Skip a step whose loss is above this many times the mean of recent losses; 0 skips none."""
    distributed_timeout_minutes: Annotated[float, Between(1e-3, 1e5)] = TIMEOUT_MINUTES
    """Minutes without progress after which a rank counts as hung and the job ends. A collective
    fails after the same time if a rank does not enter it."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self._check_eval_size()
        for name in ("eval_tasks_interval", "eval_tasks_limit", "include_path"):
            if getattr(self, name) and not self.eval_tasks:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is for --eval-tasks, which "
                    f"is not given"
                )
        given = [n for n in ("entity", "exp_name", "save_dir") if getattr(self, f"wandb_{n}")]
        if given and self.wandb_project is None:
            flags = " and ".join(f"--wandb-{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags} need --wandb-project, which is not given")
        if self.resume and self.save is None:
            raise ValueError("--resume resumes from --save, and --save is not given")
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
                f"{' and '.join(given)} set the size of an evaluation; give one of them"
            )
        if self.eval_tokens is not None and self.eval_tokens < self.seq_length:
            raise ValueError(
                f"--eval-tokens {self.eval_tokens} is less than one sequence of --seq-length "
                f"{self.seq_length}; give at least {self.seq_length}"
            )

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Return the number of microbatches of one replica in one step.

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
    """AdamW for the weights, and the learning-rate schedule that masks and multipliers share."""

    lr: Annotated[Rate, COMMON] = 1e-4
    """Peak learning rate of the weights."""
    min_lr: Annotated[float, Between(0, MOST_RATE)] | None = None
    """Lowest learning rate of the weights; a tenth of --lr unless given."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate's decay after the warm-up."""
    lr_warmup_iters: Annotated[StepsOrNever, COMMON] = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: Steps | None = None
    """Step at which the learning rate reaches its lowest value; --train-iters unless given."""
    weight_decay: Annotated[float, Between(0, 10)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Part = ADAM_BETAS[0]
    """Decay of Adam's first moment, per step."""
    adam_beta2: Part = ADAM_BETAS[1]
    """Decay of Adam's second moment, per step."""
    adam_eps: Epsilon = ADAM_EPS
    """Number added to the root of Adam's second moment."""
    clip_grad: Annotated[float, Between(1e-6, 1e9)] = CLIP_GRAD
    """Largest gradient norm of the weights. Masks and multipliers together are clipped to it
    too."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"--min-lr is {self.min_lr}; wanted 0 to --lr {self.lr}")


def check_one_source(load: str | None, load_hf: str | None) -> None:
    """Refuse two sources of weights.

    Raises:
        ValueError: both are given.
    """
    if load is not None and load_hf is not None:
        raise ValueError(
            f"--load {load} and --load-hf {load_hf} exclude each other; a run starts from one model"
        )


def check_source_given(load: str | None, load_hf: str | None) -> None:
    """Refuse a command without a model.

    Raises:
        ValueError: neither is given.
    """
    if load is None and load_hf is None:
        raise ValueError(
            "--load is not given; name a checkpoint, or a Hugging Face directory with --load-hf"
        )
