"""A run as a tree of frozen dataclasses; names and defaults of Megatron-LM where it has them.

Each field is a YAML key and a flag of the same name (``tensor_model_parallel_size`` is
``--tensor-model-parallel-size``); the string under a field is its help text. What can be judged
from the configuration alone is judged here, before any process meets another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


def check_one_source(load: str | None, load_hf: str | None) -> None:
    """Refuse two places to take weights from.

    Raises:
        ValueError: both are given.
    """
    if load is not None and load_hf is not None:
        raise ValueError(
            f"--load {load} and --load-hf {load_hf} exclude each other; a run starts from one model"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How processes are divided; data parallelism takes what tensor and pipeline leave over."""

    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks. Divides query groups, intermediate size and vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages. Divides the number of layers."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks per pipeline rank (interleaved schedule); 1 is the plain 1F1B schedule."""
    context_parallel_size: int = 1
    """Context-parallel ranks; only 1 is supported."""
    sequence_parallel: bool = False
    """Split the sequence over tensor ranks outside attention and MLP. Needs tensor parallelism."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks. Refused for now: its state does not resume
    exactly as megatron-core 0.16.1 ships it."""
    overlap_p2p_communication: bool = False
    """Overlap pipeline sends with compute (interleaved schedule only)."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_virtual_stages_per_pipeline_rank",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """How the model computes; its shape comes from the checkpoint."""

    bf16: bool = False
    """Compute in bfloat16 with float32 master weights. Masks stay float32."""
    fp16: bool = False
    """Refused: loss scaling would scale the gates' gradients too. Use --bf16."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layers for continued pretraining; transformer_engine needs CUDA. Pruning is always local."""
    recompute_granularity: Literal["full"] | None = None
    """Recompute whole layers in the backward pass to save activation memory."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With --recompute-granularity: uniform chunks of layers, or the first N layers of a stage."""
    recompute_num_layers: int = 1
    """With --recompute-granularity: layers per chunk (uniform) or per stage (block)."""
    deterministic_mode: bool = False
    """Use deterministic kernels only, so that a resumed run repeats bit for bit on a GPU."""

    def __post_init__(self) -> None:
        if self.fp16:
            raise ValueError(
                "--fp16 is refused: its loss scaling would reach the gradients of the gates; "
                "use --bf16"
            )
        if self.recompute_num_layers < 1:
            raise ValueError(f"--recompute-num-layers is {self.recompute_num_layers}; at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at a time, what is logged, saved and evaluated."""

    train_iters: int = 100
    """Optimizer steps of the run."""
    micro_batch_size: int = 1
    """Sequences per replica and forward pass."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all replicas."""
    seq_length: int = 128
    """Tokens per sequence."""
    seed: int = 1234
    """Seed of the data order, of the mask noise and of fresh weights."""
    log_interval: int = 10
    """Steps between console lines and TensorBoard points."""
    eval_interval: int = 50
    """Steps between evaluations, after each of which the mixture is reweighted; 0 is never."""
    eval_sequences: int = 64
    """Held-out sequences per domain in an evaluation, a fixed seeded subsample; the last one reads
    all."""
    save: str | None = None
    """Directory for checkpoints."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    load: str | None = None
    """Checkpoint directory to start from; a run of the same kind continues, else only its weights
    are taken."""
    load_hf: str | None = None
    """Hugging Face directory to start from instead of --load; each rank reads its own slices."""
    resume: bool = False
    """Go on from the newest checkpoint in --save if there is one, else start from --load."""
    finetune: bool = False
    """Take only the weights of --load, even from a run of the same kind, and start at step 0."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard event files."""
    exit_interval: int = 0
    """Save and stop when the step is divisible by this; 0 is never."""

    def __post_init__(self) -> None:
        for name in (
            "train_iters",
            "micro_batch_size",
            "global_batch_size",
            "seq_length",
            "log_interval",
            "eval_sequences",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.resume and self.save is None:
            raise ValueError("--resume goes on from --save, and --save is not given")
        check_one_source(self.load, self.load_hf)
        for name in ("eval_interval", "save_interval", "exit_interval"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; 0 turns it off")

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Microbatches of one replica in one step.

        Raises:
            ValueError: the global batch does not divide.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size * data-parallel size = {self.micro_batch_size} * "
                f"{data_parallel_size}; the nearest that are: "
                f"{max(1, self.global_batch_size // per_pass) * per_pass} and "
                f"{(self.global_batch_size // per_pass + 1) * per_pass}"
            )
        return self.global_batch_size // per_pass


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of the weights, and the schedule that masks and multipliers share."""

    lr: float = 1e-4
    """Peak learning rate of the weights."""
    min_lr: float | None = None
    """Floor of the schedule; a tenth of --lr unless given."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    lr_decay_iters: int | None = None
    """Step at which the floor is reached; --train-iters unless given."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest gradient norm of the weights, and, apart from it, of masks with multipliers."""

    def __post_init__(self) -> None:
        for name in ("lr", "adam_eps", "clip_grad"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; wanted 0 <= beta < 1")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--min-lr is {self.min_lr}; it must lie between 0 and --lr {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The domains, how they start out, and how losses move their weights."""

    data_path: str
    """Directory that `megashear preprocess` wrote."""
    domain_weights: tuple[float, ...] = ()
    """Starting weight of each domain, in the order of the data directory; by tokens if empty."""
    num_workers: int = 2
    """Processes per rank that read training sequences ahead; 0 reads in the rank itself. What is
    read does not depend on it."""
    reweight: Literal["signed", "clipped", "bandit", "constant"] = "signed"
    """How evaluations move the weights: by excess loss (signed, or clipped at 0 as in the paper),
    bandit, or not at all."""
    reference_loss: str | None = None
    """YAML of `domain: loss`, what each domain's loss should be, or what `megashear evaluate
    --output` wrote; needed unless --reweight is constant."""
    reweight_eta: float = 1.0
    """Step size of the exponential update of the weights."""
    reweight_smoothing: float = 1e-4
    """Share of the uniform distribution mixed into each update."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(
                f"--num-workers is {self.num_workers}; wanted 0 (read in the rank itself) or more"
            )
        if not (math.isfinite(self.reweight_eta) and self.reweight_eta >= 0):
            raise ValueError(f"--reweight-eta is {self.reweight_eta}; wanted 0 or more")
        if not 0 <= self.reweight_smoothing < 1:
            raise ValueError(
                f"--reweight-smoothing is {self.reweight_smoothing}; wanted a share, 0 <= c < 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """What the model shall become, and how the masks learn it."""

    target: str | None = None
    """Preset (llama2-2.7b, llama2-1.3b, llama2-370m), or give the --target-* extents."""
    target_num_layers: int | None = None
    """Layers to keep; the source's unless given."""
    target_hidden_size: int | None = None
    """Hidden dimensions to keep; the source's unless given."""
    target_num_attention_heads: int | None = None
    """Query heads to keep. In a grouped-query model the same number goes from every key/value head,
    and given alone it keeps all key/value heads; the source's unless given."""
    target_num_query_groups: int | None = None
    """Key/value heads to keep, of a grouped-query model; given alone, each keeps all its query
    heads. The source's unless given; without grouped queries it follows the heads."""
    target_ffn_hidden_size: int | None = None
    """MLP neurons to keep; the source's unless given."""
    target_tensor_model_parallel_size: int | None = None
    """Tensor-parallel ranks that the cut model shall divide over; those of the pruning run unless
    given."""
    sparsity_warmup_iters: int = 640
    """Steps over which the target sparsity rises from 0."""
    mask_lr: float = 1.0
    """Peak learning rate of log_alpha and of the multipliers."""
    mask_noise_streams: int = 1
    """Independent mask draws per global batch."""
    lambda2_max: float = 500.0
    """Bound of the quadratic multiplier."""
    force_lambda2_max: bool = False
    """Allow --lambda2-max below 100, where the constraint loses control."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mask_lr) and self.mask_lr > 0):
            raise ValueError(f"--mask-lr is {self.mask_lr}; it must be positive")
        if (tp := self.target_tensor_model_parallel_size) is not None and tp < 1:
            raise ValueError(f"--target-tensor-model-parallel-size is {tp}; at least 1")
        if self.mask_noise_streams < 1:
            raise ValueError(f"--mask-noise-streams is {self.mask_noise_streams}; at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRun:
    """`megashear prune`: learn masks and weights together."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig
    masks: MaskConfig = field(default_factory=MaskConfig)
    then_pretrain: str | None = None
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
    init_shape: str | None = None
    """Start from fresh weights of this shape: a preset or a JSON file of extents; else --load."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRun:
    """`megashear evaluate`: held-out loss per domain of a checkpoint."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    load: str | None = None
    """Checkpoint directory."""
    load_hf: str | None = None
    """Hugging Face directory to evaluate instead of --load; each rank reads its own slices."""
    data_path: str
    """Directory that `megashear preprocess` wrote."""
    seq_length: int | None = None
    """Tokens per sequence; that of the run that made the checkpoint unless given."""
    micro_batch_size: int = 1
    """Sequences per replica and forward pass."""
    output: str | None = None
    """JSON file to write the losses to."""

    def __post_init__(self) -> None:
        check_one_source(self.load, self.load_hf)
        if self.load is None and self.load_hf is None:
            raise ValueError(
                "--load is not given; name a checkpoint, or a Hugging Face directory with --load-hf"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """`megashear preprocess`: text per domain to Megatron .bin/.idx and held-out sets."""

    input: str
    """Directory with one data file, or one folder of data files, per domain: jsonl, jsonl.gz,
    jsonl.zst, parquet, MDS shards of tokens, Megatron's .bin with .idx."""
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
    held_out_fraction: float = 0.02
    """Share of documents, by hash of their text, that go to the held-out set."""
    tokens_dtype: Literal["uint16", "int32", "uint32", "int64"] = "uint16"
    """Type of the token ids in MDS shards, which do not say; LLM-Shearing writes uint16."""
    workers: int = 1
    """Processes that tokenize; the output does not depend on their number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """`megashear convert`: Hugging Face directory to checkpoint, or back."""

    input: str
    """Hugging Face directory or checkpoint directory; which of the two is found out."""
    output: str
    """Directory to write; must not exist."""
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = "as-is"
    """Precision of the written weights."""
    tokenizer: str | None = None
    """Directory or file of the tokenizer to copy, where the input carries none."""


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
class QuickstartConfig:
    """`megashear quickstart`: the whole path on this machine, from text to a sheared HF model."""

    output: str = "runs/quickstart"
    """Directory to write; must not exist."""
    data: str | None = None
    """Directory of jsonl files, one a domain; text of this Python installation unless given."""
    seed: int = 1234
    """Seed of data order, mask noise and fresh weights."""
    short: bool = False
    """Run few steps, only to see that everything works; its losses compare nothing."""
