"""Commands that need no ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megashear.bounds import (
    COMMON,
    MOST_EXTENT,
    TINY,
    Between,
    Epsilon,
    Extent,
    Length,
    Ranks,
    Seed,
    Sequences,
    Share,
    Steps,
    StepsOrNever,
    Workers,
    check_bounds,
)
from megashear.config.defaults import (
    HELD_OUT_FRACTION,
    JSON_KEY,
    MAX_DOCUMENT_MB,
    MOST_DOCUMENT_MB,
    SEED,
    TOKENS_DTYPE,
)
from megashear.config.masks import TargetConfig
from megashear.config.model import RecomputeMethod


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
    json_key: str = field(default=JSON_KEY, metadata={"aliases": ("json_keys",)})
    """Key of the text in each line, or column of a parquet file (also --json-keys)."""
    append_eod: bool = True
    """End each document with the tokenizer's EOS; input that is tokens already stays as it is."""
    prepend_bos: bool = True
    """Begin each document with the tokenizer's BOS; input that is tokens already stays as it is."""
    held_out_fraction: Annotated[float, Between(1e-9, 1, below=True)] = HELD_OUT_FRACTION
    """Share of documents, by hash of their text, that go to the held-out set."""
    tokens_dtype: Literal["uint16", "int32", "uint32", "int64"] = TOKENS_DTYPE
    """Type of the token ids in MDS shards, which do not say; LLM-Shearing writes uint16."""
    max_document_mb: Annotated[int, Between(1, MOST_DOCUMENT_MB)] = MAX_DOCUMENT_MB
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
    norm_epsilon: Epsilon | None = None
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
    recompute_method: RecomputeMethod = "uniform"
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
    seed: Seed = SEED
    """Seed of data order, mask noise and fresh weights."""
    short: bool = False
    """Run few steps, only to see that everything works; its losses compare nothing."""

    def __post_init__(self) -> None:
        check_bounds(self)
