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
from megashear.config.budget import BudgetConfig
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
    """`megashear plot-mixture`: draw weights and losses per domain over a run."""

    tensorboard_dir: tuple[str, ...]
    """Directories of TensorBoard event files. One that begins after the first step of the directory
    before it continues that run; any other is a run of its own, drawn after the others."""
    output: str
    """Figure to write: a .png, .pdf or .svg file that does not exist."""
    title: str = ""
    """Line above the figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """`megashear report`: write a finished or running run as one HTML page."""

    run: tuple[str, ...]
    """--save directories of runs that belong together, in their order, or the folder of a
    quickstart; the TensorBoard directory of a run that has saved nothing yet. Words after the
    command stand for this flag."""
    tensorboard_dir: tuple[str, ...] = ()
    """Directories of TensorBoard event files that were moved after the run: several of one run, or
    one for each run."""
    output: str | None = None
    """HTML file to write; report.html in the first directory of --run unless given."""
    source_loss: str | None = None
    """Output of `megashear evaluate` for the model before pruning. Figures show its loss as a line,
    and the top of the page how far above it the runs end."""
    overwrite: bool = False
    """Replace --output if it exists, say for a run that is still training."""
    images: str | None = None
    """Directory to write every figure to as a PNG file, too; must not exist."""
    title: str | None = None
    """Title of the page; the kinds of the runs unless given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """`megashear inspect`: show what a checkpoint keeps and drops, or how two differ."""

    load: str
    """Model to show: a checkpoint directory (its newest whole iteration is shown), the directory of
    one iteration, a Hugging Face directory, another model that `megashear convert` reads, or a file
    of `megashear score`. The first word after the command stands for this flag."""
    compare: str | None = None
    """Second model to compare with --load: descriptions, masks gate by gate, weights by distance.
    The second word after the command stands for this flag."""
    mode: Literal["exact", "expected"] = "exact"
    """Which gates count as kept in the map, --image and a comparison: as many as the target has in
    every row, as the cut keeps them (exact), or as many as the masks ask for (expected)."""
    image: str | None = None
    """Figure of a pruning run's masks, or of scores, to write: a .png, .svg or .pdf file that does
    not exist."""
    json: str | None = None
    """JSON file to write with everything in full: numbers of the kept units, log_alpha, all
    differences; must not exist."""
    weights: bool = True
    """Measure the distance of every weight for --compare, which reads both models, one weight at a
    time."""
    verify_checkpoint: bool = False
    """Compare every file of a checkpoint with its checksum first. Turned off, only names and sizes
    are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """`megashear preprocess`: turn text per domain into Megatron .bin/.idx and held-out sets."""

    input: str
    """Directory with one data file, or one folder of data files, per domain: JSON lines or arrays
    (.jsonl, .json), plain text (.txt, a document each), either as .gz or .zst, parquet, MDS shards
    of tokens, Megatron's .bin with .idx."""
    output: str
    """Directory to write; must not exist. An interrupted run is resumed from OUTPUT.tmp."""
    tokenizer_model: str
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or a directory with one."""
    json_key: str = field(default=JSON_KEY, metadata={"aliases": ("json_keys",)})
    """Key of the text in each JSON object, or column of a parquet file (also --json-keys)."""
    append_eod: bool = True
    """End each document with the tokenizer's EOS. Input that is tokens already is not changed."""
    prepend_bos: bool = True
    """Begin each document with the tokenizer's BOS. Input that is tokens already is not changed."""
    held_out_fraction: Annotated[float, Between(1e-9, 1, below=True)] = HELD_OUT_FRACTION
    """Share of documents in the held-out set; the hash of a document's text decides."""
    chat_format: Literal["template", "sheared"] | None = None
    """Read conversations for `megashear finetune`, JSON objects with messages, conversations, or
    prompt and response, and write them by the chat template of the tokenizer (template) or in the
    prompt of Sheared-LLaMA-ShareGPT (sheared). Each record is text unless given."""
    first_turn: bool = False
    """Keep each conversation up to its first answer. For --chat-format."""
    tokens_dtype: Literal["uint16", "int32", "uint32", "int64"] = TOKENS_DTYPE
    """Type of the token ids in MDS shards, which do not name it; LLM-Shearing writes uint16."""
    max_document_mb: Annotated[int, Between(1, MOST_DOCUMENT_MB)] = MAX_DOCUMENT_MB
    """Longest document, in MB of the unpacked file. A longer one is refused with its place. The
    longest document needs about 10 times its size in memory."""
    workers: Workers = 1
    """Processes that tokenize. The output does not depend on their number."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.first_turn and self.chat_format is None:
            raise ValueError(
                "--first-turn is of conversations, which --chat-format reads; add that flag, or "
                "leave this one out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """`megashear convert`: turn a model of Hugging Face, Megatron-LM or LLM-Shearing into a
    checkpoint, or a checkpoint into a Hugging Face directory."""

    input: str | None = None
    """Model to convert: a Hugging Face directory, a checkpoint, a Megatron-LM checkpoint
    (torch_dist) or a .pt file of LLM-Shearing. The kind is detected."""
    output: str | None = None
    """Directory to write; must not exist."""
    output_format: Literal["auto", "checkpoint", "hf"] = "auto"
    """What to write: a checkpoint or a Hugging Face directory (hf). auto writes hf for a
    checkpoint, and a checkpoint for any other input."""
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = "as-is"
    """Precision of the written weights. as-is keeps the precision of each weight, except that a
    Hugging Face directory of a --bf16 run, or of its cut, is bfloat16."""
    tokenizer: str | None = None
    """Directory or file of the tokenizer to copy, if the input has none."""
    head_dim: Extent | None = None
    """Width of one head of an LLM-Shearing model, whose file does not have it; 128 unless given."""
    norm_epsilon: Epsilon | None = None
    """Epsilon of the norms of an LLM-Shearing model; 1e-5 unless given."""
    rotary_base: Annotated[float, Between(TINY, 1e12)] | None = None
    """Base of the rotary embedding of an LLM-Shearing model; 10000 unless given."""
    max_position_embeddings: Extent | None = None
    """Longest sequence of an LLM-Shearing model, tokens; 4096 unless given."""
    vocab_size: Extent | None = None
    """Tokens in the vocabulary of a Megatron-LM checkpoint whose arguments do not have the number;
    further rows are padding."""
    workers: Workers | None = None
    """Threads that convert, each with a few weights in memory; one per core, at most 4, unless
    given."""
    verify: bool = False
    """Compare logits with transformers before the output appears. Needs memory for the model in
    float32, 4 bytes per parameter."""
    verify_tokens: Annotated[tuple[int, ...], Between(0, MOST_EXTENT)] = ()
    """Token ids on which --verify compares logits; random ones unless given."""
    model_card: bool = True
    """Write a model card, README.md, into a Hugging Face directory: what the model was made from
    and how, its text, its held-out losses, how to load it."""
    base_model: str | None = None
    """Model that --input was made from, for the card and for checkpoints made of it: its name on
    the hub, ORGANISATION/NAME. What the Hugging Face directory or the checkpoint says unless
    given."""
    license: str | None = None
    """Licence of that model, by its name on the hub, for the same; that of the README.md in the
    Hugging Face directory unless given."""
    task_results: str | None = None
    """JSON file of scores that lm-evaluation-harness wrote for this model, for the card."""
    check: str | None = None
    """Converted directory to compare with its certificate; nothing is converted."""

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
class CutConfig(TargetConfig):
    """`megashear cut`: fold the learned masks into the weights and drop the units they closed, or
    keep the units of the highest importance scores."""

    load: str
    """Checkpoint directory of a pruning run; with --scores, of the model that was scored."""
    output: str
    """Checkpoint directory to write; must not exist."""
    exact_target: Annotated[bool, COMMON] = False
    """Keep exactly as many units as the target has, the most open ones, where the masks keep
    another number."""
    scores: Annotated[str | None, COMMON] = None
    """File of `megashear score`. The units of the highest scores are kept, as many as the target
    has, in a model without masks: a one-shot cut. Needs --target or --target-* extents, which a
    pruning run has already."""

    def __post_init__(self) -> None:
        check_bounds(self)
        given = [
            f"--{one.name.replace('_', '-')}"
            for one in dataclasses.fields(TargetConfig)
            if getattr(self, one.name) != one.default
        ]
        if self.scores is None and given:
            raise ValueError(
                f"{' and '.join(given)} set the target of a cut by --scores, which is not given; "
                f"the target of a pruning run is in its checkpoint"
            )
        if self.scores is not None and self.exact_target:
            raise ValueError(
                f"--exact-target is for learned masks, and --scores {self.scores} keeps exactly "
                f"the target's units in any case; leave one of them out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(TargetConfig):
    """`megashear plan`: calculate which layouts fit, how long a run takes and what it costs; or
    which shape to prune to."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    model: str
    """Model to start from: a preset, a Hugging Face directory (its config.json is enough), a
    checkpoint, or a JSON file of extents."""
    prune_config: Annotated[str | None, COMMON] = None
    """YAML file of a `megashear prune` to plan for. Its target, steps, batches, noise streams,
    evaluations and layout are used; flags of the plan override them."""
    pretrain_config: Annotated[str | None, COMMON] = None
    """YAML file of a `megashear pretrain` to plan for, after a pruning run or alone; flags of the
    plan override its keys."""
    any_layout: bool = False
    """List all layouts that fit, not only the ones of --prune-config and --pretrain-config."""
    gpus: Annotated[Ranks | None, COMMON] = None
    """Number of GPUs. Needed unless a budget is given; with a budget, the first proposed shape is
    planned for."""
    gpu: Annotated[str, COMMON] = "H100-80G"
    """Kind of the GPUs; an unknown name lists all kinds."""
    gpus_per_node: Annotated[Ranks, COMMON] = 8
    """GPUs per node, which the fast link connects; tensor parallelism is kept within a node."""
    network_gbit: Annotated[float, Between(1e-3, 1e6)] | None = None
    """Network between nodes, Gbit/s per GPU; what the kind of GPU is usually sold with unless
    given."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence; those of the YAML files, or 4096, unless given."""
    pruning_tokens: Annotated[Annotated[float, Between(1, 1e18)] | None, COMMON] = None
    """Tokens of the pruning run; those of --prune-config, or of 3200 steps, unless given."""
    pruning_global_batch_size: Sequences | None = None
    """Sequences per step of the pruning run; those of --prune-config, or 32, unless given."""
    pruning_eval_interval: StepsOrNever | None = None
    """Steps between evaluations of the pruning run, 0 for none; those of --prune-config, or 50,
    unless given."""
    pruning_eval_sequences: Steps | None = None
    """Held-out sequences per domain in an evaluation of the pruning run; those of --prune-config,
    or 32, unless given."""
    mask_noise_streams: Sequences | None = None
    """Number of independent draws of the masks per global batch; that of --prune-config, or 8,
    unless given."""
    pretraining_tokens: Annotated[Annotated[float, Between(1, 1e18)] | None, COMMON] = None
    """Tokens of the continued pretraining; those of --pretrain-config, or of 48000 steps, unless
    given."""
    pretraining_global_batch_size: Sequences | None = None
    """Sequences per step of the continued pretraining; those of --pretrain-config, or 256, unless
    given."""
    pretraining_eval_interval: StepsOrNever | None = None
    """Steps between evaluations of the continued pretraining, 0 for none; those of
    --pretrain-config, or 400, unless given."""
    pretraining_eval_sequences: Steps | None = None
    """Held-out sequences per domain in an evaluation of the continued pretraining; those of
    --pretrain-config, or 500, unless given."""
    distill: bool = False
    """Plan both runs with a teacher, as with --distill-from: --model unless --teacher is given. A
    YAML file that has distill_from is planned so in any case, with the teacher it names where that
    is here."""
    teacher: str | None = None
    """Model that both runs learn from, in all that --model takes; in place of the teacher that a
    YAML file names, say where that is not here."""
    eval_domains: Sequences | None = None
    """Number of domains that both runs evaluate; that of the YAML files' domain_weights, or 7,
    unless given."""
    tensor_model_parallel_size: Ranks | None = None
    """List only layouts with this many tensor-parallel ranks, and with a budget only shapes that
    divide over them."""
    pipeline_model_parallel_size: Ranks | None = None
    """List only layouts with this many pipeline stages, and with a budget only shapes that divide
    over them."""
    num_virtual_stages_per_pipeline_rank: Ranks | None = None
    """List only layouts with this many model chunks per pipeline rank."""
    micro_batch_size: Sequences | None = None
    """List only layouts with this many sequences per forward pass."""
    recompute_granularity: Literal["full"] | None = None
    """Recompute layers even if memory suffices without; as few as memory allows unless given."""
    recompute_method: RecomputeMethod = "uniform"
    """What --recompute-granularity recomputes: all layers of a stage in equal chunks (uniform), or
    its first layers (block)."""
    recompute_num_layers: Extent = 1
    """Layers per chunk (uniform) or per stage (block) of --recompute-method."""
    pruning_mfu: Share | None = None
    """Share of the GPU's peak that a pruning run reaches while it computes. Unless given, that of
    --measured, or what was measured on the kind of GPU: 0.28 on A100 (reference implementation of
    Sheared LLaMA), 0.45 on H100 (Megatron-core's, less 5 % for masks), 0.55 on one H200; others are
    assumed to be as A100."""
    mfu: Share | None = None
    """Share of the GPU's peak that continued pretraining reaches while it computes. Unless given,
    that of --measured, or what was measured on the kind of GPU: 0.32 on A100 (reference
    implementation, 2.7B), 0.41 on H100 (Megatron-core, 1.7B), 0.57 on one H200; others are assumed
    to be as A100."""
    measured: Annotated[str | None, COMMON] = None
    """JSON file of `tools/benchmarks/gpu.py --json` on such a GPU, whose shares of the peak are
    taken in place of the defaults of --pruning-mfu and --mfu."""
    memory_reserve_gib: Annotated[float, Between(0, 1e4)] = 5.0
    """Memory of each GPU that tensors cannot use, GiB: CUDA's context, buffers of NCCL and
    libraries, and what the allocator loses. The default is an assumption."""
    top: Sequences = 5
    """Number of layouts to list."""
    json: bool = False
    """Print every layout as JSON, in bytes and seconds, in place of the table."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.gpus is None and not self.budget.flags:
            raise ValueError(
                "--gpus is needed and not given; say how many GPUs to plan for, or what the pruned "
                "model may cost, say with --budget-params"
            )
        if self.target is not None and self.budget.flags:
            raise ValueError(
                f"--target {self.target} is a whole shape, and {self.budget.flags} asks for "
                f"one; leave one of them out, or fix single extents with --target-*"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """`megashear quickstart`: run the whole path on this machine, from text to a sheared HF
    model."""

    output: str = "runs/quickstart"
    """Directory to write; must not exist."""
    data: str | None = None
    """Directory of jsonl files, one per domain; text of this Python installation unless given."""
    seed: Seed = SEED
    """Seed of the data order, the mask noise and fresh weights."""
    short: bool = False
    """Run few steps, only to see that everything works; too few to compare losses."""

    def __post_init__(self) -> None:
        check_bounds(self)
