"""A run as a tree of frozen dataclasses; names and defaults of Megatron-LM where it has them.

Each field is a YAML key and a flag of the same name (``tensor_model_parallel_size`` is
``--tensor-model-parallel-size``); the string under a field is its help text. What can be judged
from the configuration alone is judged here, before any process meets another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megashear.bounds import COMMON, MOST_EXTENT, TINY, Between, check_bounds

NamedNumbers = tuple[float | str, ...]
"""Numbers, or words ``name=number``; in YAML also a mapping of names to numbers, or one number."""

MOST_RATE = 1e4
"""Largest learning rate, of weights and masks."""

Ranks = Annotated[int, Between(1, 2**20)]
"""Processes, devices, or parts of a model among them."""
Steps = Annotated[int, Between(1, 10**9)]
StepsOrNever = Annotated[int, Between(0, 10**9)]
Sequences = Annotated[int, Between(1, 2**20)]
"""Sequences that are held at once."""
Length = Annotated[int, Between(1, 2**24)]
"""Tokens of a sequence."""
Tokens = Annotated[int, Between(1, 10**18)]
Minutes = Annotated[int, Between(0, 10**6)]
Extent = Annotated[int, Between(1, MOST_EXTENT)]
Workers = Annotated[int, Between(1, 4096)]
Seed = Annotated[int, Between(0, 2**53)]
"""Every whole number up to it survives JSON; offsets for stages and ranks still fit beside it."""
Share = Annotated[float, Between(1e-9, 1)]
Part = Annotated[float, Between(0, 1, below=True)]
Rate = Annotated[float, Between(TINY, MOST_RATE)]

DEFAULT_EVAL_SEQUENCES = 64
"""Held-out sequences per domain in an evaluation, where no flag says how many."""


def check_one_source(load: str | None, load_hf: str | None) -> None:
    """Refuse two places to take weights from.

    Raises:
        ValueError: both are given.
    """
    if load is not None and load_hf is not None:
        raise ValueError(
            f"--load {load} and --load-hf {load_hf} exclude each other; a run starts from one model"
        )


def check_streams(num_streams: int, *, global_batch_size: int, micro_batch_size: int) -> None:
    """Refuse noise streams that would split a microbatch.

    Raises:
        ValueError: with numbers and the nearest that divide.
    """
    fits = [
        n
        for n in range(1, global_batch_size // micro_batch_size + 1)
        if global_batch_size % (n * micro_batch_size) == 0
    ]
    if num_streams not in fits:
        raise ValueError(
            f"--mask-noise-streams {num_streams} does not divide --global-batch-size "
            f"{global_batch_size} into whole microbatches of {micro_batch_size}; possible: "
            f"{', '.join(map(str, fits))}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How processes are divided; data parallelism takes what tensor and pipeline leave over."""

    tensor_model_parallel_size: Annotated[Ranks, COMMON] = 1
    """Tensor-parallel ranks. Divides query groups, intermediate size and vocabulary."""
    pipeline_model_parallel_size: Annotated[Ranks, COMMON] = 1
    """Pipeline stages. Divides the number of layers."""
    num_virtual_stages_per_pipeline_rank: Ranks = 1
    """Model chunks per pipeline rank (interleaved schedule); 1 is the plain 1F1B schedule."""
    context_parallel_size: Ranks = 1
    """Context-parallel ranks; only 1 is supported."""
    sequence_parallel: Annotated[bool, COMMON] = False
    """Split the sequence over tensor ranks outside attention and MLP. Needs tensor parallelism."""
    use_distributed_optimizer: Annotated[bool, COMMON] = False
    """Shard moments and float32 masters over data-parallel ranks, each of which steps its part.
    Checkpoints are the same with and without it."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still computes others."""
    overlap_param_gather: bool = False
    """Gather stepped weights of other data-parallel ranks while the forward pass computes. Needs
    --use-distributed-optimizer and --overlap-grad-reduce."""
    ddp_bucket_size: Extent | None = None
    """Weights whose gradients are reduced together under --overlap-grad-reduce; the larger of 40
    million and a million a data-parallel rank unless given."""
    overlap_p2p_communication: bool = False
    """Overlap pipeline sends with compute (interleaved schedule only)."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.context_parallel_size != 1:
            raise ValueError(
                f"--context-parallel-size {self.context_parallel_size} is not supported; use 1 and "
                f"--sequence-parallel or --recompute-granularity full to save activation memory"
            )
        if self.num_virtual_stages_per_pipeline_rank > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--num-virtual-stages-per-pipeline-rank "
                f"{self.num_virtual_stages_per_pipeline_rank} needs "
                f"--pipeline-model-parallel-size of at least 2, found 1"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "--sequence-parallel splits the sequence over tensor ranks and "
                "--tensor-model-parallel-size is 1; raise it to 2 or more, or drop the flag"
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            missing = (
                "overlap-grad-reduce"
                if self.use_distributed_optimizer
                else ("use-distributed-optimizer")
            )
            raise ValueError(
                f"--overlap-param-gather gathers what sharded optimizers stepped, as gradients are "
                f"reduced; give --{missing} too, or drop the flag"
            )
        if self.ddp_bucket_size is not None and not self.overlap_grad_reduce:
            raise ValueError(
                f"--ddp-bucket-size {self.ddp_bucket_size} divides gradients that are reduced "
                f"during the backward pass, and --overlap-grad-reduce is not given; give both or "
                f"neither"
            )
        if self.overlap_p2p_communication and self.num_virtual_stages_per_pipeline_rank == 1:
            raise ValueError(
                "--overlap-p2p-communication needs --num-virtual-stages-per-pipeline-rank of at "
                "least 2; the plain 1F1B schedule cannot overlap"
            )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Number of model replicas among ``world_size`` processes.

        Raises:
            ValueError: the processes cannot be divided so.
        """
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"world size {world_size} is not a multiple of --tensor-model-parallel-size * "
                f"--pipeline-model-parallel-size = {self.tensor_model_parallel_size} * "
                f"{self.pipeline_model_parallel_size}; start a multiple of "
                f"{self.model_parallel_size} processes (torchrun --nproc-per-node) or lower one "
                f"of the two"
            )
        return world_size // self.model_parallel_size

    def check_microbatches(self, num_microbatches: int) -> None:
        """Refuse microbatches of a replica that the interleaved schedule cannot share out.

        Raises:
            ValueError: with both numbers.
        """
        stages = self.pipeline_model_parallel_size
        if self.num_virtual_stages_per_pipeline_rank > 1 and num_microbatches % stages:
            raise ValueError(
                f"the interleaved schedule wants a multiple of --pipeline-model-parallel-size "
                f"{stages} microbatches per replica, found {num_microbatches}; change "
                f"--global-batch-size or --micro-batch-size"
            )

    def check_sequence(self, seq_length: int) -> None:
        """Refuse a sequence that sequence parallelism cannot split.

        Raises:
            ValueError: with both numbers.
        """
        tensor = self.tensor_model_parallel_size
        if self.sequence_parallel and seq_length % tensor:
            raise ValueError(
                f"--seq-length {seq_length} is not a multiple of --tensor-model-parallel-size "
                f"{tensor}, over which --sequence-parallel splits it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """How the model computes; its shape comes from the checkpoint."""

    bf16: Annotated[bool, COMMON] = False
    """Compute in bfloat16 with float32 master weights. Masks stay float32."""
    fp16: bool = False
    """Refused: loss scaling would scale the gates' gradients too. Use --bf16."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layers for continued pretraining; transformer_engine needs CUDA, and pruning refuses it."""
    recompute_granularity: Annotated[Literal["full"] | None, COMMON] = None
    """Recompute whole layers in the backward pass to save activation memory."""
    recompute_method: Literal["uniform", "block"] = "uniform"
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
    seed: Seed = 1234
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
    distributed_timeout_minutes: Annotated[float, Between(1e-3, 1e5)] = 10.0
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
    adam_beta1: Part = 0.9
    """Decay of the first moment."""
    adam_beta2: Part = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[float, Between(TINY, 1)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Between(1e-6, 1e9)] = 1.0
    """Largest gradient norm of the weights, and, apart from it, of masks with multipliers."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"--min-lr is {self.min_lr}; it must lie between 0 and --lr {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The domains, how they start out, and how losses move their weights."""

    data_path: str
    """Directory that `megashear preprocess` wrote."""
    domain_weights: Annotated[Annotated[NamedNumbers, Between(0, 1e6)], COMMON] = ()
    """Starting weight of each domain, as name=weight or in the order of the data directory; by
    tokens if empty."""
    data_exhausted: Literal["repeat", "redistribute", "stop"] = "repeat"
    """What happens when a domain's text was read once: repeat it in another order, redistribute
    its share over the other domains in proportion, or stop the run (it saves and evaluates)."""
    num_workers: Annotated[int, Between(0, 256)] = 2
    """Processes per rank that read training sequences ahead; 0 reads in the rank itself. What is
    read does not depend on it."""
    reweight: Annotated[Literal["signed", "clipped", "bandit", "constant", "schedule"], COMMON] = (
        "signed"
    )
    """How evaluations move the weights: by excess loss (signed, or clipped at 0 as in the paper),
    bandit, or not at all (constant, or schedule: by the phases of --domain-phases)."""
    domain_phases: str | None = None
    """With --reweight schedule: YAML list of phases, each with start_step, start_sample or
    start_token, and weights."""
    domain_floor: Annotated[NamedNumbers, Between(0, 1)] = ()
    """Least share of a domain, one number for all and name=share where one differs."""
    domain_cap: Annotated[NamedNumbers, Between(0, 1)] = ()
    """Largest share of a domain, one number for all and name=share where one differs."""
    dominant_share: Share = 0.6
    """Share of the mixture from which one domain is warned of."""
    reference_loss: Annotated[str | None, COMMON] = None
    """YAML of `domain: loss`, what each domain's loss should be, or what `megashear reference-loss`
    or `megashear evaluate --output` wrote; needed unless --reweight is constant or schedule."""
    reweight_eta: Annotated[float, Between(0, 1e3)] = 1.0
    """Step size of the exponential update of the weights."""
    reweight_smoothing: Part = 1e-4
    """Share of the uniform distribution mixed into each update."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.domain_phases is None) is (self.reweight == "schedule"):
            raise ValueError(
                "--reweight schedule follows the phases of --domain-phases, which is not given"
                if self.domain_phases is None
                else f"--domain-phases {self.domain_phases} is followed by --reweight schedule "
                f"only, not by {self.reweight}; give one with the other"
            )
        if self.domain_phases is not None and self.domain_weights:
            raise ValueError(
                f"--domain-weights and --domain-phases {self.domain_phases} both say how the "
                f"mixture starts; leave --domain-weights out, the first phase begins at 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """What the model shall become."""

    target: Annotated[str | None, COMMON] = None
    """Preset (llama2-2.7b, llama2-1.3b, llama2-370m) or JSON file of extents; or give the
    --target-* extents."""
    target_num_layers: Annotated[Extent | None, COMMON] = None
    """Layers to keep; the source's unless given."""
    target_hidden_size: Annotated[Extent | None, COMMON] = None
    """Hidden dimensions to keep; the source's unless given."""
    target_num_attention_heads: Annotated[Extent | None, COMMON] = None
    """Query heads to keep. In a grouped-query model the same number goes from every key/value head,
    and given alone it keeps all key/value heads; the source's unless given."""
    target_num_query_groups: Extent | None = None
    """Key/value heads to keep, of a grouped-query model; given alone, each keeps all its query
    heads. The source's unless given; without grouped queries it follows the heads."""
    target_ffn_hidden_size: Annotated[Extent | None, COMMON] = None
    """Neurons of the MLP to keep; the source's unless given."""
    force_unloadable_target: bool = False
    """Take a target that stock runtimes refuse to load, such as a LLaMA whose heads do not divide
    its hidden size."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig(TargetConfig):
    """What the model shall become, and how the masks learn it."""

    target_tensor_model_parallel_size: Ranks | None = None
    """Tensor-parallel ranks that the cut model shall divide over; those of the pruning run unless
    given."""
    sparsity_warmup_iters: Annotated[StepsOrNever, COMMON] = 640
    """Steps over which the target sparsity rises from 0."""
    mask_lr: Rate = 1.0
    """Peak learning rate of log_alpha and of the multipliers."""
    mask_noise_streams: Annotated[Sequences, COMMON] = 1
    """Independent mask draws per global batch."""
    eval_relaxed_masks: bool = False
    """Evaluate under masks sampled as in training too, so that the loss of closing gates for good
    shows. Costs a third pass over the evaluation's text, half of what evaluations cost without."""
    lambda2_max: Annotated[float, Between(TINY, 1e9)] = 500.0
    """Bound of the quadratic multiplier."""
    force_lambda2_max: bool = False
    """Allow --lambda2-max below 100, where the constraint loses control."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRun:
    """`megashear prune`: learn masks and weights together."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig
    masks: MaskConfig = field(default_factory=MaskConfig)
    then_pretrain: Annotated[str | None, COMMON] = None
    """YAML file of a `megashear pretrain` to go on with in the same job: the model is cut where it
    lies, with float32 masters and Adam's moments, at the same layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRun:
    """`megashear pretrain`: language modelling, from a checkpoint or from fresh weights."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig
    init_shape: Annotated[str | None, COMMON] = None
    """Start from fresh weights of this shape: a preset or a JSON file of extents; else --load."""
    init_method_std: Annotated[float, Between(TINY, 10)] = 0.02
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRun:
    """`megashear evaluate`: held-out loss per domain of a checkpoint."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    load: Annotated[str | None, COMMON] = None
    """Checkpoint directory."""
    load_hf: Annotated[str | None, COMMON] = None
    """Hugging Face directory to evaluate instead of --load; each rank reads its own slices."""
    data_path: str
    """Directory that `megashear preprocess` wrote."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence; that of the run that made the checkpoint unless given."""
    micro_batch_size: Annotated[Sequences, COMMON] = 1
    """Sequences per replica and forward pass."""
    output: Annotated[str | None, COMMON] = None
    """JSON file to write the losses and their standard errors to."""
    verify_checkpoint: bool = True
    """Compare every file of the checkpoint with its checksum first; without, only names and
    sizes."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_one_source(self.load, self.load_hf)
        if self.load is None and self.load_hf is None:
            raise ValueError(
                "--load is not given; name a checkpoint, or a Hugging Face directory with --load-hf"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLossRun:
    """`megashear reference-loss`: what each domain's loss should be, for prune and pretrain."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    output: str
    """YAML file to write, for --reference-loss; must not exist."""
    load: Annotated[tuple[str, ...], COMMON] = ()
    """Checkpoint directories to evaluate on --data-path, one after the other."""
    losses: Annotated[tuple[str, ...], COMMON] = ()
    """Files of losses known already: of `megashear evaluate --output`, or YAML of `parameters:
    {domain: loss}` with a line for each model."""
    target: Annotated[str | None, COMMON] = None
    """What the model shall become, for the fit: a preset or a JSON file of extents; or --params."""
    params: Tokens | None = None
    """Parameters of what the model shall become, embeddings included; in place of --target."""
    method: Literal["auto", "scaling-law", "power-law", "own-loss"] = "auto"
    """Fit L(N) = a N^-b + c through three or more sizes, a N^-b through two, or take the loss of
    the smallest model as it is; auto fits where it can."""
    data_path: Annotated[str | None, COMMON] = None
    """With --load: directory that `megashear preprocess` wrote."""
    seq_length: Annotated[Length | None, COMMON] = None
    """With --load: tokens per sequence; that of the run that made the checkpoint unless given."""
    micro_batch_size: Sequences = 1
    """Sequences per replica and forward pass."""
    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its checksum first; without, only names and sizes."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.load and not self.losses:
            raise ValueError(
                "no model is named; give checkpoints with --load, or files of losses with --losses"
            )
        if self.load and self.data_path is None:
            raise ValueError(
                "--load is evaluated on --data-path, which is not given; name the directory that "
                "`megashear preprocess` wrote"
            )
        if self.target is not None and self.params is not None:
            raise ValueError(
                f"--target {self.target} and --params {self.params} both say how large the target "
                f"is; give one"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotMixtureConfig:
    """`megashear plot-mixture`: weights and losses per domain over a run, as a figure."""

    tensorboard_dir: tuple[str, ...]
    """Directories of TensorBoard event files. One that begins after the first step of the one
    before continues its run; others are runs of their own, drawn one after the other."""
    output: str
    """Figure to write, .png, .pdf or .svg; must not exist."""
    title: str = ""
    """Line above the figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """`megashear report`: a finished or running run as one HTML page."""

    run: tuple[str, ...]
    """--save directories of runs that belong together, in their order; or a quickstart's folder.
    Also the words after the command. Of a run that has saved nothing yet: its TensorBoard
    directory."""
    tensorboard_dir: tuple[str, ...] = ()
    """Directories of event files, where they are not where the run says: all of one run, or one for
    each."""
    output: str | None = None
    """HTML file to write; report.html in the first of --run unless given."""
    source_loss: str | None = None
    """What `megashear evaluate --output` wrote of the model before pruning: its loss becomes a line
    in the figures, and what the runs end above it stands at the top."""
    overwrite: bool = False
    """Replace --output if it is there, as for a run that goes on."""
    images: str | None = None
    """Directory to write every figure to as a PNG, too; must not exist."""
    title: str | None = None
    """Title of the page; what the runs are, unless given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """`megashear inspect`: what a checkpoint keeps and drops, or how two differ."""

    load: str
    """Checkpoint directory (its newest whole iteration) or one iteration's, of any stage; a Hugging
    Face directory; or whatever else `megashear convert` reads. Also the first word after the
    command."""
    compare: str | None = None
    """Another one to hold it to: descriptions, masks gate by gate, weights by distance. Also the
    second word after the command."""
    mode: Literal["exact", "expected"] = "exact"
    """Which gates the map, --image and a comparison show: exact, the target's number in every row,
    which is cut; or expected, as many as the masks ask for."""
    image: str | None = None
    """Figure to write of a pruning run's masks, .png, .svg or .pdf; must not exist."""
    json: str | None = None
    """JSON file to write everything to, unabridged: kept units by number, log_alpha, all
    differences; must not exist."""
    weights: bool = True
    """With --compare, measure the distance of every weight; reads both models, one weight at a
    time."""
    verify_checkpoint: bool = False
    """Compare every file of a checkpoint with its checksum first; without, only names and sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """`megashear preprocess`: text per domain to Megatron .bin/.idx and held-out sets."""

    input: str
    """Directory with one data file, or one folder of data files, per domain: JSON lines or arrays
    (.jsonl, .json), plain text (.txt, a document each), either as .gz or .zst, parquet, MDS shards
    of tokens, Megatron's .bin with .idx."""
    output: str
    """Directory to write; must not exist. What an interrupted run left in OUTPUT.tmp is used."""
    tokenizer_model: str
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or a directory with one."""
    json_key: str = field(default="text", metadata={"aliases": ("json_keys",)})
    """Key of the text in each line, or column of a parquet file (also --json-keys)."""
    append_eod: bool = True
    """End each document with the tokenizer's EOS; input that is tokens already stays as it is."""
    prepend_bos: bool = True
    """Begin each document with the tokenizer's BOS; input that is tokens already stays as it is."""
    held_out_fraction: Annotated[float, Between(1e-9, 1, below=True)] = 0.02
    """Share of documents, by hash of their text, that go to the held-out set."""
    tokens_dtype: Literal["uint16", "int32", "uint32", "int64"] = "uint16"
    """Type of the token ids in MDS shards, which do not say; LLM-Shearing writes uint16."""
    max_document_mb: Annotated[int, Between(1, 2000)] = 100
    """Longest document, MB as it lies in the unpacked file; a longer one is refused with its place.
    Memory for the longest one is some 10 times its size."""
    workers: Workers = 1
    """Processes that tokenize; the output does not depend on their number."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """`megashear convert`: a model of Hugging Face, Megatron-LM or LLM-Shearing to a checkpoint, or
    a checkpoint back."""

    input: str | None = None
    """Hugging Face directory, checkpoint, Megatron-LM checkpoint (torch_dist) or .pt file of
    LLM-Shearing; which of them is found out."""
    output: str | None = None
    """Directory to write; must not exist."""
    output_format: Literal["auto", "checkpoint", "hf"] = "auto"
    """What to write: a checkpoint, or a Hugging Face directory (hf); auto makes the latter of a
    checkpoint and the former of all else."""
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = "as-is"
    """Precision of the written weights; as-is keeps each weight's own, but a Hugging Face directory
    of a --bf16 run, or of its cut, is bfloat16."""
    tokenizer: str | None = None
    """Directory or file of the tokenizer to copy, where the input carries none."""
    head_dim: Extent | None = None
    """Width of one head of an LLM-Shearing model, whose file does not say it; 128 unless given."""
    norm_epsilon: Annotated[float, Between(TINY, 1)] | None = None
    """Epsilon of the norms of an LLM-Shearing model; 1e-5 unless given."""
    rotary_base: Annotated[float, Between(TINY, 1e12)] | None = None
    """Base of the rotary embedding of an LLM-Shearing model; 10000 unless given."""
    max_position_embeddings: Extent | None = None
    """Longest sequence of an LLM-Shearing model, tokens; 4096 unless given."""
    vocab_size: Extent | None = None
    """Tokens in the vocabulary of a Megatron-LM checkpoint whose arguments do not say it; rows
    beyond are padding."""
    workers: Workers | None = None
    """Threads that convert, each holding a few weights in memory; one a core, at most 4, unless
    given."""
    verify: bool = False
    """Compare logits with transformers before the output appears; needs memory for the model in
    float32, 4 bytes a parameter."""
    verify_tokens: Annotated[tuple[int, ...], Between(0, MOST_EXTENT)] = ()
    """Token ids that --verify compares on; random ones unless given."""
    check: str | None = None
    """Converted directory to hold to its certificate, instead of converting."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.check is not None:
            given = [
                f"--{field.name.replace('_', '-')}"
                for field in dataclasses.fields(self)
                if field.name not in ("check", "workers")
                and getattr(self, field.name) != field.default
            ]
            if given:
                raise ValueError(
                    f"--check {self.check} converts nothing: leave {', '.join(given)} out"
                )
        else:
            for name in ("input", "output"):
                if getattr(self, name) is None:
                    raise ValueError(
                        f"--{name} is not given; name --input and --output, or a converted "
                        f"directory with --check"
                    )
        if self.verify_tokens and not self.verify:
            raise ValueError("--verify-tokens is for --verify, which is not given")


@dataclass(frozen=True, kw_only=True, slots=True)
class CutConfig:
    """`megashear cut`: fold the learned masks into the weights and drop what they closed."""

    load: str
    """Checkpoint directory of a pruning run."""
    output: str
    """Checkpoint directory to write; must not exist."""
    exact_target: bool = False
    """Keep the most open units where the masks kept another count than the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(TargetConfig):
    """`megashear plan`: which layouts fit, how long a run takes and what it costs."""

    model: str
    """What there is: a preset, a Hugging Face directory (config.json is enough), a checkpoint, or a
    JSON file of extents."""
    prune_config: Annotated[str | None, COMMON] = None
    """YAML file of the `megashear prune` to plan for: its target, steps, batches, noise streams,
    evaluations and layout. Flags of the plan override it."""
    pretrain_config: Annotated[str | None, COMMON] = None
    """The same of the `megashear pretrain` after it; also where nothing is pruned."""
    any_layout: bool = False
    """List all layouts that fit, not only those of --prune-config and --pretrain-config."""
    gpus: Ranks
    """How many."""
    gpu: Annotated[str, COMMON] = "H100-80G"
    """Their kind; a wrong name lists all."""
    gpus_per_node: Annotated[Ranks, COMMON] = 8
    """How many hang together by the fast link; tensor parallelism stays within a node."""
    network_gbit: Annotated[float, Between(1e-3, 1e6)] | None = None
    """Between nodes, Gbit/s for each GPU; what its kind is usually sold with unless given."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence; those of the recipes, or 4096, unless given."""
    pruning_tokens: Annotated[Annotated[float, Between(1, 1e18)] | None, COMMON] = None
    """Tokens of the pruning run; those of --prune-config, or 3200 steps', unless given."""
    pruning_global_batch_size: Sequences | None = None
    """Sequences per step of the pruning run; those of --prune-config, or 32, unless given."""
    pruning_eval_interval: StepsOrNever | None = None
    """Steps between its evaluations; 0 is never; those of --prune-config, or 50, unless given."""
    pruning_eval_sequences: Steps | None = None
    """Held-out sequences per domain in each of them; those of --prune-config, or 32, unless
    given."""
    mask_noise_streams: Sequences | None = None
    """Independent mask draws per global batch of the pruning run; those of --prune-config, or 8,
    unless given."""
    pretraining_tokens: Annotated[Annotated[float, Between(1, 1e18)] | None, COMMON] = None
    """Tokens of the continued pretraining; those of --pretrain-config, or 48000 steps', unless
    given."""
    pretraining_global_batch_size: Sequences | None = None
    """Sequences per step of the continued pretraining; those of --pretrain-config, or 256, unless
    given."""
    pretraining_eval_interval: StepsOrNever | None = None
    """Steps between its evaluations; 0 is never; those of --pretrain-config, or 400, unless
    given."""
    pretraining_eval_sequences: Steps | None = None
    """Held-out sequences per domain in each of them; those of --pretrain-config, or 500, unless
    given."""
    eval_domains: Sequences | None = None
    """Domains that both runs evaluate; as many as a recipe weighs, or 7, unless given."""
    tensor_model_parallel_size: Ranks | None = None
    """Only layouts with so many tensor ranks."""
    pipeline_model_parallel_size: Ranks | None = None
    """Only layouts with so many stages."""
    num_virtual_stages_per_pipeline_rank: Ranks | None = None
    """Only layouts with so many model chunks per stage."""
    micro_batch_size: Sequences | None = None
    """Only layouts with so many sequences per forward pass."""
    recompute_granularity: Literal["full"] | None = None
    """Recompute layers even where memory does not ask for it; as little as fits unless given."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With --recompute-granularity, as in a run."""
    recompute_num_layers: Extent = 1
    """With --recompute-granularity, as in a run; 1 with uniform recomputes every layer."""
    pruning_mfu: Share = 0.28
    """Share of the GPU's peak that a pruning run reaches while it computes. An assumption: what the
    reference implementation of Sheared LLaMA reached on A100. One H200 measured 0.55."""
    mfu: Share = 0.32
    """The same of continued pretraining. An assumption: what the reference implementation reached
    with 2.7B on A100. Megatron-LM publishes 41 to 48 percent on H100, with Transformer Engine's
    kernels; one H200 measured 0.57."""
    memory_reserve_gib: Annotated[float, Between(0, 1e4)] = 5.0
    """Memory of each GPU that tensors may not take, GiB. An assumption: CUDA's context, NCCL's and
    the libraries' buffers, and what the allocator cannot use."""
    top: Sequences = 5
    """Layouts to list."""
    json: bool = False
    """Print every layout as JSON instead, in bytes and seconds."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """`megashear quickstart`: the whole path on this machine, from text to a sheared HF model."""

    output: str = "runs/quickstart"
    """Directory to write; must not exist."""
    data: str | None = None
    """Directory of jsonl files, one a domain; text of this Python installation unless given."""
    seed: Seed = 1234
    """Seed of data order, mask noise and fresh weights."""
    short: bool = False
    """Run few steps, only to see that everything works; its losses compare nothing."""

    def __post_init__(self) -> None:
        check_bounds(self)
