"""Configurations of runs: trees of frozen dataclasses, with Megatron-LM's names and defaults.

Each field is a YAML key and a flag of the same name (``tensor_model_parallel_size`` is
``--tensor-model-parallel-size``); the string under a field is its help text. What can be judged
from the configuration alone is judged here, before any process meets another.
"""

from megashear.config.budget import BudgetConfig
from megashear.config.commands import (
    ConvertConfig,
    CutConfig,
    InspectConfig,
    PlanConfig,
    PlotMixtureConfig,
    PreprocessConfig,
    QuickstartConfig,
    ReportConfig,
)
from megashear.config.data import ChatDataConfig, DataConfig, NamedNumbers, Reweight, WhenExhausted
from megashear.config.distill import DistillConfig
from megashear.config.masks import Constraint, MaskConfig, Masks, TargetConfig, check_streams
from megashear.config.model import ModelConfig, TransformerImpl
from megashear.config.parallel import ParallelConfig
from megashear.config.runs import (
    EvaluateRun,
    FinetuneRun,
    GenerateRun,
    PretrainRun,
    PruneRun,
    ReferenceLossRun,
    ScoreRun,
    TrainingRun,
)
from megashear.config.train import DEFAULT_EVAL_SEQUENCES, OptimizerConfig, TrainConfig

__all__ = [
    "DEFAULT_EVAL_SEQUENCES",
    "BudgetConfig",
    "ChatDataConfig",
    "Constraint",
    "ConvertConfig",
    "CutConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateRun",
    "FinetuneRun",
    "GenerateRun",
    "InspectConfig",
    "MaskConfig",
    "Masks",
    "ModelConfig",
    "NamedNumbers",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "PlotMixtureConfig",
    "PreprocessConfig",
    "PretrainRun",
    "PruneRun",
    "QuickstartConfig",
    "ReferenceLossRun",
    "ReportConfig",
    "Reweight",
    "ScoreRun",
    "TargetConfig",
    "TrainConfig",
    "TrainingRun",
    "TransformerImpl",
    "WhenExhausted",
    "check_streams",
]
