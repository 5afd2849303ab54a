"""evaluate and reference-loss: from checkpoints to losses per domain."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.checkpoint.description import (
    TOKENIZER,
    Description,
    find_iteration,
    read_description,
)
from megashear.checkpoint.store import agree_on_iteration, load_weights
from megashear.config import EvaluateRun, ModelConfig, ReferenceLossRun, TargetConfig
from megashear.conversion.sharded_hf import describe, load_hf
from megashear.data.held_out import HeldOutSet
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.reference_loss import MEASURED, PARAMETERS, SEQUENCE_LENGTH, Model, read_models
from megashear.files import durable
from megashear.files.output import check_writable, writing
from megashear.masks.target_flags import target_shape
from megashear.models.llama import build_chunks, check_layout
from megashear.parallel.agree import check_same, raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.shape import read_shape
from megashear.train.evaluate import evaluate_domains
from megashear.train.inputs import check_vocabulary, held_out_sets
from megashear.train.objectives import LanguageModelling
from megashear.train.result import STANDARD_ERROR
from megashear.train.start import check_no_masks, check_weights

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateRun) -> dict[str, Any]:
    """Held-out loss per domain over all held-out sequences. Collective over the processes torchrun
    started.

    Returns:
        Losses by domain, their standard errors and mean, tokens, parameters.

    Raises:
        ValueError: anything a user can mend.
    """
    measured = check_evaluate(config)
    with distributed(config.parallel, config.model) as groups:
        summary = measured.losses(groups)
        if config.output is not None and groups.rank == 0:
            with writing("--output", config.output):
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                durable.replace(Path(config.output), json.dumps(summary, indent=2) + "\n")
    return summary


def check_evaluate(config: EvaluateRun) -> _Measured:
    """Refuse what `evaluate` refuses before processes meet.

    Raises:
        ValueError: anything a user can mend.
    """
    if config.output is not None and Path(config.output).exists():
        raise ValueError(f"--output {config.output} exists; choose another or remove it first")
    if config.output is not None:
        check_writable("--output", config.output)
    return _Measured.check(config)


def measure_models(config: ReferenceLossRun) -> tuple[list[Model], int | None]:
    """The models of ``megashear reference-loss``, those of --load evaluated one after the other,
    and the parameters of what --target names.

    Collective over the processes torchrun started where there is something to evaluate.

    Raises:
        ValueError: anything a user can mend, found before processes meet.
    """
    known, runs, params = check_models(config)
    if not runs:
        return known, params
    with distributed(config.parallel, config.model) as groups:
        check_same(
            {
                "models of --losses": known,
                "--load": [run.directory for run in runs],
                "shapes of the models": [run.description.shape.to_dict() for run in runs],
                "data": [run.manifest.names for run in runs],
            }
        )
        for run in runs:
            found = run.losses(groups)
            known.append(
                Model(
                    name=found["checkpoint"],
                    parameters=found[PARAMETERS],
                    losses=found[MEASURED],
                    sequence_length=found[SEQUENCE_LENGTH],
                )
            )
    return known, params


def check_models(config: ReferenceLossRun) -> tuple[list[Model], list[_Measured], int | None]:
    """Read what `measure_models` reads before processes meet.

    Returns:
        The models whose losses are known, those to evaluate, and the target's parameters.

    Raises:
        ValueError: anything a user can mend.
    """
    known = read_models(config.losses)
    runs = [_Measured.check(run) for run in _evaluations(config)]
    params = config.params
    if config.target is not None:
        if runs:
            source = min((run.description.shape for run in runs), key=lambda s: s.num_params())
            params = target_shape(TargetConfig(target=config.target), source).num_params()
        else:
            params = read_shape(config.target, flag="--target").num_params()
    return known, runs, params


def _evaluations(config: ReferenceLossRun) -> list[EvaluateRun]:
    assert config.data_path is not None or not config.load  # by the configuration
    return [
        EvaluateRun(
            parallel=config.parallel,
            model=config.model,
            # every Hugging Face model has this file
            **{"load_hf" if (Path(name) / "config.json").is_file() else "load": name},
            data_path=config.data_path or "",
            seq_length=config.seq_length,
            micro_batch_size=config.micro_batch_size,
            verify_checkpoint=config.verify_checkpoint,
        )
        for name in config.load
    ]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A model to evaluate, checked as far as files and flags alone can tell."""

    config: EvaluateRun
    directory: Path
    description: Description
    manifest: DataManifest
    seq_length: int
    held_out: Sequence[HeldOutSet]

    @classmethod
    def check(cls, config: EvaluateRun) -> _Measured:
        """Read what is read before processes meet.

        Raises:
            ValueError: anything a user can mend.
        """
        if config.load_hf is not None:
            directory = tokenizer = Path(config.load_hf)
            description = describe(directory)
        else:
            assert config.load is not None
            directory = find_iteration(config.load)
            tokenizer = directory / TOKENIZER
            description = read_description(directory)
            check_no_masks(directory, description)
            check_weights(directory)
        check_layout(description.shape, config.parallel)
        manifest = read_manifest(config.data_path)
        check_vocabulary(manifest, description.shape, tokenizer)
        seq_length = _sequence_length(config, description, directory)
        config.parallel.check_sequence(seq_length)
        description.shape.check_window(seq_length)
        return cls(
            config=config,
            directory=directory,
            description=description,
            manifest=manifest,
            seq_length=seq_length,
            held_out=held_out_sets(manifest, seq_length, _as_trained(config.model, description)),
        )

    def losses(self, groups: ParallelGroups) -> dict[str, Any]:
        """What ``megashear evaluate`` writes. Collective over the world."""
        config, directory, shape = self.config, self.directory, self.description.shape
        if config.load is not None:
            whole = agree_on_iteration(config.load, groups, contents=config.verify_checkpoint)
            with raise_together():
                if whole != directory:  # damaged, or no more the newest
                    directory, description = whole, read_description(whole)
                    check_no_masks(directory, description)
                    check_weights(directory)
                    shape = description.shape
        chunks = build_chunks(
            shape, groups, config.parallel, config.model, variant=config.model.transformer_impl
        )
        if config.load_hf is not None:
            load_hf(directory, chunks, groups)
        else:
            load_weights(directory, chunks)
        found = evaluate_domains(
            LanguageModelling(chunks),
            "loss",
            self.manifest.names,
            self.held_out,
            [range(len(part)) for part in self.held_out],
            groups,
            micro_batch_size=config.micro_batch_size,
        )
        return {
            "checkpoint": str(directory),
            PARAMETERS: shape.num_params(),
            "sequence length": self.seq_length,
            MEASURED: found.losses,
            STANDARD_ERROR: found.known_errors,
            "mean": found.mean,
            "tokens": found.tokens,
        }


def _as_trained(model: ModelConfig, description: Description) -> ModelConfig:
    """With documents kept apart as the run did that made the checkpoint, or as flags ask for."""
    saved = description.known.flags
    names = ("reset_attention_mask", "eod_mask_loss")
    asked = {name: getattr(model, name) or getattr(saved, name) for name in names}
    for name in names:
        if asked[name] and not getattr(model, name):
            logger.info("--%s, as the run that made the checkpoint", name.replace("_", "-"))
    return dataclasses.replace(model, **asked)


def _sequence_length(config: EvaluateRun, description: Description, directory: Path) -> int:
    """As asked for, or that of the run that made the checkpoint: other lengths give other losses.

    Raises:
        ValueError: neither is known.
    """
    if config.seq_length is not None:
        return config.seq_length
    if (length := description.known.flags.seq_length) is None:
        raise ValueError(
            f"--seq-length is not given and {directory}, of stage {description.stage!r}, was not "
            f"trained by megashear; give the length of the losses to compare with, tokens"
        )
    return length
