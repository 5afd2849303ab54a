"""evaluate and reference-loss: from models on disk to losses by domain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.config import EvaluateRun, ReferenceLossRun, TargetConfig
from megashear.data.batch import DocumentBorders
from megashear.data.held_out import HeldOutSet
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.reference_loss import MEASURED, PARAMETERS, SEQUENCE_LENGTH, Model, read_models
from megashear.files import durable
from megashear.files.output import check_new_file, writing
from megashear.masks.target_flags import target_shape
from megashear.parallel.agree import check_same
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.shape import read_shape
from megashear.train.evaluate import DomainLosses, evaluate_domains
from megashear.train.inputs import check_vocabulary, held_out_sets
from megashear.train.result import STANDARD_ERROR
from megashear.train.stored_model import StoredModel, find_model


def evaluate(config: EvaluateRun) -> dict[str, Any]:
    """Measure the losses of a model on all held-out text. Collective over the processes torchrun
    started.

    Returns:
        Losses by domain, their standard errors and mean, tokens, parameters.

    Raises:
        ValueError: anything a user can correct.
    """
    prepared = prepare_evaluate(config)
    with distributed(config.parallel, config.model) as groups:
        summary = prepared.measure(groups).summary()
        if config.output is not None and groups.rank == 0:
            with writing("--output", config.output):
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                durable.replace(Path(config.output), json.dumps(summary, indent=2) + "\n")
    return summary


def prepare_evaluate(config: EvaluateRun) -> PreparedEvaluation:
    """Prepare `evaluate` before processes meet.

    Raises:
        ValueError: anything a user can correct.
    """
    if config.output is not None:
        check_new_file("--output", config.output)
    return _prepare(config)


def measure_models(config: ReferenceLossRun) -> tuple[list[Model], int | None]:
    """Return the models of ``megashear reference-loss``, and the parameters of its target.

    Models of --load are evaluated one after the other. Collective over the processes torchrun
    started where there is something to evaluate.

    Raises:
        ValueError: anything a user can correct, found before processes meet.
    """
    known, runs, params = prepare_models(config)
    if not runs:
        return known, params
    with distributed(config.parallel, config.model) as groups:
        check_same(
            {
                "models of --losses": known,
                "--load": [run.model.directory for run in runs],
                "shapes of the models": [run.model.shape.to_dict() for run in runs],
                "data": [run.manifest.names for run in runs],
            }
        )
        for run in runs:
            found = run.measure(groups)
            known.append(
                Model(
                    name=str(found.model.directory),
                    parameters=found.model.shape.num_params(),
                    losses=found.losses.losses,
                    sequence_length=found.seq_length,
                )
            )
    return known, params


def prepare_models(
    config: ReferenceLossRun,
) -> tuple[list[Model], list[PreparedEvaluation], int | None]:
    """Prepare `measure_models` before processes meet.

    Returns:
        The models whose losses are known, those to evaluate, and the target's parameters.

    Raises:
        ValueError: anything a user can correct.
    """
    known = read_models(config.losses)
    runs = [_prepare(run) for run in _evaluations(config)]
    params = config.params
    if config.target is not None:
        if runs:
            source = min((run.model.shape for run in runs), key=lambda s: s.num_params())
            params = target_shape(TargetConfig(target=config.target), source).num_params()
        else:
            params = read_shape(config.target, flag="--target").num_params()
    return known, runs, params


@dataclass(frozen=True, kw_only=True)
class ModelLosses:
    """What an evaluation of a model found."""

    model: StoredModel
    seq_length: int
    """Tokens per sequence."""
    losses: DomainLosses
    """By domain, on all held-out text."""

    def summary(self) -> dict[str, Any]:
        """Return plain values, in words that people and scripts read."""
        return {
            "checkpoint": str(self.model.directory),
            PARAMETERS: self.model.shape.num_params(),
            SEQUENCE_LENGTH: self.seq_length,
            MEASURED: self.losses.losses,
            STANDARD_ERROR: self.losses.known_errors,
            "mean": self.losses.mean,
            "tokens": self.losses.tokens,
        }


@dataclass(frozen=True, kw_only=True)
class PreparedEvaluation:
    """A model and the text to evaluate it on, found and checked."""

    config: EvaluateRun
    model: StoredModel
    manifest: DataManifest
    seq_length: int
    """Tokens per sequence."""
    held_out: Sequence[HeldOutSet]
    """Held-out text of every domain, in the manifest's order."""

    def measure(self, groups: ParallelGroups) -> ModelLosses:
        """Load the model and evaluate it. Collective over the world."""
        config = self.config
        model = self.model.settle(groups, verify=config.verify_checkpoint)
        losses = evaluate_domains(
            model.open(groups, config.parallel, config.model),
            self.manifest.names,
            self.held_out,
            [range(len(part)) for part in self.held_out],
            groups,
            micro_batch_size=config.micro_batch_size,
        )
        return ModelLosses(model=model, seq_length=self.seq_length, losses=losses)


def _prepare(config: EvaluateRun) -> PreparedEvaluation:
    model = find_model(load=config.load, load_hf=config.load_hf, masks=config.masks)
    model.check_runnable(config.parallel, config.model)
    assert config.data_path is not None  # by the configuration
    manifest = read_manifest(config.data_path)
    check_vocabulary(manifest, model.shape, model.tokenizer)
    seq_length = model.sequence_length(config.seq_length)
    config.parallel.check_sequence(seq_length)
    model.shape.check_window(seq_length)
    return PreparedEvaluation(
        config=config,
        model=model,
        manifest=manifest,
        seq_length=seq_length,
        held_out=held_out_sets(
            manifest, seq_length, DocumentBorders.of(model.as_trained(config.model))
        ),
    )


def _evaluations(config: ReferenceLossRun) -> list[EvaluateRun]:
    assert config.data_path is not None or not config.load  # by the configuration
    # every Hugging Face model has this file
    are_hf = [(Path(name) / "config.json").is_file() for name in config.load]
    return [
        EvaluateRun(
            parallel=config.parallel,
            model=config.model,
            load=None if is_hf else name,
            load_hf=name if is_hf else None,
            data_path=config.data_path or "",
            seq_length=config.seq_length,
            micro_batch_size=config.micro_batch_size,
            verify_checkpoint=config.verify_checkpoint,
        )
        for name, is_hf in zip(config.load, are_hf)
    ]
