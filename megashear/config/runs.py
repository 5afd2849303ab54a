"""Commands that load a model on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megashear.bounds import (
    COMMON,
    TINY,
    Between,
    Extent,
    Length,
    Seed,
    Sequences,
    Share,
    Steps,
    Tokens,
    check_bounds,
)
from megashear.config.data import ChatDataConfig, DataConfig
from megashear.config.defaults import INIT_METHOD_STD, SEED
from megashear.config.distill import DistillConfig
from megashear.config.masks import MaskConfig, Masks
from megashear.config.model import ModelConfig
from megashear.config.parallel import ParallelConfig
from megashear.config.train import (
    OptimizerConfig,
    TrainConfig,
    check_one_source,
    check_source_given,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRun:
    """`megashear prune`: learn masks and weights together."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig
    masks: MaskConfig = field(default_factory=MaskConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    then_pretrain: Annotated[str | None, COMMON] = None
    """YAML file of a `megashear pretrain` that follows in the same job, at a layout of its own: the
    model is cut in memory, with float32 masters and Adam's moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRun:
    """`megashear pretrain`: train on language modelling, from a checkpoint or from fresh
    weights."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig
    distill: DistillConfig = field(default_factory=DistillConfig)
    init_shape: Annotated[str | None, COMMON] = None
    """Shape of fresh weights to start from, in place of --load: a preset or a JSON file of
    extents."""
    init_method_std: Annotated[float, Between(TINY, 10)] = INIT_METHOD_STD
    """Standard deviation of fresh weights."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRun:
    """`megashear finetune`: teach a model to answer, from conversations."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: ChatDataConfig
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        if self.data.pack and self.model.transformer_impl == "transformer_engine":
            raise ValueError(
                "--pack does not work with --transformer-impl transformer_engine, whose causal "
                "attention ignores the mask between conversations; use --transformer-impl local, "
                "or leave --pack out"
            )


TrainingRun = PruneRun | PretrainRun | FinetuneRun
"""A run that trains, saves and is resumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModelRun:
    """A command that reads one model and trains nothing."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    load: Annotated[str | None, COMMON] = None
    """Checkpoint directory of the model."""
    load_hf: Annotated[str | None, COMMON] = None
    """Hugging Face directory of the model, in place of --load; each rank reads only its slices."""
    verify_checkpoint: bool = True
    """Compare every file of the checkpoint with its checksum first. Turned off, only names and
    sizes are compared."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_one_source(self.load, self.load_hf)
        check_source_given(self.load, self.load_hf)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedModelRun(StoredModelRun):
    """A command that reads one model, which may be a pruning run's."""

    masks: Masks = "exact"
    """Masks of a pruning run to apply: those with as many units as the target (exact, which
    `megashear cut --exact-target` folds in), or with as many as the masks expect to keep
    (expected). A model without masks ignores the flag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRun(MaskedModelRun):
    """`megashear evaluate`: measure the held-out loss of a model by domain, or its scores in
    tasks."""

    data_path: Annotated[str | None, COMMON] = None
    """Directory that `megashear preprocess` wrote, to measure losses on its held-out text."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence of held-out text; those of the run that made the checkpoint unless
    given."""
    tasks: Annotated[tuple[str, ...], COMMON] = ()
    """Tasks or groups of lm-evaluation-harness to score, in place of --data-path, also between
    commas: --tasks arc_easy,piqa. sheared stands for the eleven of Sheared LLaMA with their numbers
    of examples. Needs `pip install "megashear[eval]"`."""
    include_path: str | None = None
    """Directory with task files (.yaml) of your own, which are looked at first. They may read local
    JSON lines."""
    num_fewshot: Annotated[int, Between(0, 1000)] | None = None
    """Examples before each question of --tasks; each task's own number unless given."""
    limit: Steps | None = None
    """Documents of each task to ask, the first ones; all unless given."""
    tokenizer_model: str | None = None
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or a directory with one, for
    --tasks; the model's own unless given."""
    prepend_bos: bool = True
    """Begin each text of --tasks with the tokenizer's BOS, as `megashear preprocess` begins
    documents."""
    micro_batch_size: Annotated[Sequences, COMMON] = 1
    """Sequences per replica in one forward pass."""
    output: Annotated[str | None, COMMON] = None
    """JSON file to write: the losses and their standard errors, or the scores of --tasks in the
    format of lm-evaluation-harness."""

    def __post_init__(self) -> None:
        MaskedModelRun.__post_init__(self)  # not super(): slots make the class anew
        if self.data_path is None and not self.tasks:
            raise ValueError(
                "--data-path is not given; name the directory that `megashear preprocess` wrote, "
                "for losses on its held-out text, or tasks with --tasks"
            )
        if self.data_path is not None and self.tasks:
            raise ValueError(
                f"--data-path {self.data_path} is for losses and --tasks {' '.join(self.tasks)} "
                f"for scores; run the command once for each"
            )
        names = ("include_path", "num_fewshot", "limit", "tokenizer_model")
        given = [name.replace("_", "-") for name in names if getattr(self, name) is not None]
        given += [] if self.prepend_bos else ["no-prepend-bos"]
        if given and not self.tasks:
            raise ValueError(f"--{given[0]} is for --tasks, which is not given; leave it out")
        if self.seq_length is not None and self.tasks:
            raise ValueError(
                f"--seq-length {self.seq_length} is for the held-out text of --data-path, and "
                f"--tasks {' '.join(self.tasks)} reads as much as the model can; leave it out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRun(MaskedModelRun):
    """`megashear generate`: print how a model continues a text."""

    tokenizer_model: str | None = None
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or a directory with one; the
    model's own unless given."""
    prompt: Annotated[tuple[str, ...], COMMON] = ()
    """Texts to continue, each a word of its own: --prompt "The function" "Once upon"."""
    prompt_file: Annotated[str | None, COMMON] = None
    """File of texts to continue, a text on each line; empty lines are skipped."""
    prepend_bos: bool = True
    """Begin each text with the tokenizer's BOS, as `megashear preprocess` begins documents."""
    chat: Annotated[bool, COMMON] = False
    """Take each text for a user's message and write it by the chat template of the tokenizer, which
    `megashear finetune` leaves with a model; the template writes BOS."""
    max_new_tokens: Annotated[Length, COMMON] = 64
    """Tokens to add to a text at most; fewer where the model ends the text, or where the text
    becomes as long as the model can read."""
    temperature: Annotated[float, Between(0, 1e3), COMMON] = 0.0
    """Divide logits by this number and draw tokens by their probabilities; 0 takes the likeliest
    token always."""
    top_k: Extent | None = None
    """Draw from this many likeliest tokens; from all unless given. Needs --temperature."""
    top_p: Share | None = None
    """Draw from the likeliest tokens whose probabilities add up to this share; from all unless
    given. Needs --temperature."""
    seed: Seed = SEED
    """Seed of the draws. The text is the same at every layout, up to rounding."""
    micro_batch_size: Sequences = 8
    """Texts per replica in one forward pass."""

    def __post_init__(self) -> None:
        MaskedModelRun.__post_init__(self)  # not super(): slots make the class anew
        if not self.prompt and self.prompt_file is None:
            raise ValueError(
                "--prompt is not given; give texts to continue, or a file of them with "
                "--prompt-file"
            )
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} chooses what tokens are "
                    f"drawn from, and --temperature 0 draws none; give, say, --temperature 0.8"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRun(StoredModelRun):
    """`megashear score`: measure how important each unit of a model is, for `megashear cut`."""

    data_path: str
    """Directory that `megashear preprocess` wrote; its training text is read, all domains in
    proportion to their tokens."""
    output: str
    """JSON file to write, for --scores of `megashear cut`; must not exist."""
    num_sequences: Annotated[Steps, COMMON] = 1024
    """Sequences to read, summed over all domains and replicas; none is read twice."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence; those of the run that made the checkpoint unless given."""
    micro_batch_size: Annotated[Sequences, COMMON] = 1
    """Sequences per replica in one forward pass."""
    seed: Seed = SEED
    """Seed of the choice of sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLossRun:
    """`megashear reference-loss`: find the loss that each domain should reach, for prune and
    pretrain."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    output: str
    """YAML file to write, for --reference-loss of prune and pretrain; must not exist."""
    load: Annotated[tuple[str, ...], COMMON] = ()
    """Checkpoint directories of the models to evaluate on --data-path."""
    losses: Annotated[tuple[str, ...], COMMON] = ()
    """Files of known losses: outputs of `megashear evaluate`, or YAML of `parameters: {domain:
    loss}` with a line for each model."""
    target: Annotated[str | None, COMMON] = None
    """Size of the pruned model, to evaluate the fit at: a preset or a JSON file of extents."""
    params: Tokens | None = None
    """Parameters of the pruned model with embeddings, in place of --target."""
    method: Literal["auto", "scaling-law", "power-law", "own-loss"] = "auto"
    """Law of the loss L of a model with N parameters: L = a N^-b + c through three or more models
    (scaling-law), L = a N^-b through two (power-law), or the smallest model's own loss. auto takes
    the one that fits the number of models."""
    data_path: Annotated[str | None, COMMON] = None
    """Directory that `megashear preprocess` wrote, for --load."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence, for --load; those of the run that made the checkpoint unless given."""
    micro_batch_size: Sequences = 1
    """Sequences per replica in one forward pass."""
    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its checksum first. Turned off, only names and sizes
    are compared."""

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
