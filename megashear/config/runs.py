"""Commands that load a model on all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megashear.bounds import (
    COMMON,
    TINY,
    Between,
    Length,
    Seed,
    Sequences,
    Steps,
    Tokens,
    check_bounds,
)
from megashear.config.data import DataConfig
from megashear.config.defaults import INIT_METHOD_STD, SEED
from megashear.config.distill import DistillConfig
from megashear.config.masks import MaskConfig
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
    """YAML file of a `megashear pretrain` that follows in the same job: the model is cut in memory,
    with float32 masters and Adam's moments, at the same layout."""


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
class EvaluateRun:
    """`megashear evaluate`: measure the held-out loss of a checkpoint, per domain."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    load: Annotated[str | None, COMMON] = None
    """Checkpoint directory to evaluate."""
    load_hf: Annotated[str | None, COMMON] = None
    """Hugging Face directory to evaluate, in place of --load; each rank reads only its slices."""
    data_path: str
    """Directory that `megashear preprocess` wrote."""
    seq_length: Annotated[Length | None, COMMON] = None
    """Tokens per sequence; those of the run that made the checkpoint unless given."""
    micro_batch_size: Annotated[Sequences, COMMON] = 1
    """Sequences per replica in one forward pass."""
    output: Annotated[str | None, COMMON] = None
    """JSON file to write, with the losses and their standard errors."""
    verify_checkpoint: bool = True
    """Compare every file of the checkpoint with its checksum first. Turned off, only names and
    sizes are compared."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_one_source(self.load, self.load_hf)
        check_source_given(self.load, self.load_hf)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRun:
    """`megashear score`: measure how important each unit of a model is, for `megashear cut`."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    load: Annotated[str | None, COMMON] = None
    """Checkpoint directory of a model without masks to score."""
    load_hf: Annotated[str | None, COMMON] = None
    """Hugging Face directory to score, in place of --load; each rank reads only its slices."""
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
    verify_checkpoint: bool = True
    """Compare every file of the checkpoint with its checksum first. Turned off, only names and
    sizes are compared."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_one_source(self.load, self.load_hf)
        check_source_given(self.load, self.load_hf)


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
