"""What files and flags alone can get wrong, checked before processes meet; and the domains."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
)
from megashear.data.batch import DocumentBorders
from megashear.data.held_out import HeldOutSet
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.mixture import DomainMixture, WhenExhausted, normalise_weights
from megashear.data.phases import PhasedMixture, Phases, read_phases
from megashear.data.reference_loss import read_reference
from megashear.data.reweight import SCORES, Reweighting
from megashear.data.sequences import DomainSequences
from megashear.data.shares import ShareLimits, Vector, limits_of, weights_of
from megashear.models.llama import check_layout
from megashear.monitor.sinks import check_sinks
from megashear.parallel import cpu_megatron
from megashear.shape import ModelShape
from megashear.train.evaluate import subsample_size
from megashear.train.optim import check_schedule
from megashear.train.pruning import modes_of_evaluation
from megashear.train.start import Start

logger = logging.getLogger(__name__)

EVAL_SEQUENCES = "eval_sequences"
"""Key under which a checkpoint keeps the sequences per domain of its run's evaluations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What flags and files say of the mixture, read and checked."""

    manifest: DataManifest
    weights: Vector
    """Weight of each domain at the start."""
    references: Vector | None
    """Loss that each domain should have, nats per token; None where none are given."""
    reweighting: Reweighting | None
    """Moves the weights after evaluations; None leaves them alone."""
    phases: Phases | None
    """Move the weights at samples settled before."""
    eval_sequences: int
    """Held-out sequences per domain in an evaluation within the run."""

    def replicated(self) -> dict[str, object]:
        """What must be equal on all ranks, by name; files of other hosts may differ."""
        phases = self.phases and (self.phases.unit, self.phases.starts)
        shares = [] if self.phases is None else [part.tolist() for part in self.phases.weights]
        return {
            "tokens of the data": [domain.tokens for domain in self.manifest.domains],
            "reference losses": None if self.references is None else self.references.tolist(),
            "phases": (phases, shares),
        }

    def mixture(
        self,
        train: TrainConfig,
        start: Start,
        *,
        available: Sequence[int],
        when_exhausted: WhenExhausted,
    ) -> DomainMixture:
        """The mixture as the run begins or goes on; its state is yet to be loaded.

        Args:
            train: batch size and sequence length.
            start: where the run begins.
            available: sequences that each domain has.
            when_exhausted: what happens once they are read.
        """
        limit = None if when_exhausted == "repeat" else available
        if changes := self.changes(train, start):
            return PhasedMixture(changes, available=limit, when_exhausted=when_exhausted)
        return DomainMixture(self.weights, available=limit, when_exhausted=when_exhausted)

    def changes(self, train: TrainConfig, start: Start) -> dict[int, Vector]:
        """Weights of the phases by their first sample; nothing where there are no phases."""
        if self.phases is None:
            return {}
        drawn = 0
        if start.continues:
            assert start.description is not None
            drawn = start.description.details["consumed_samples"]
            self._check_tokens(train, start.description.details["loader"])
        return self.phases.changes(
            seq_length=train.seq_length,
            global_batch_size=train.global_batch_size,
            first_step=start.first_step,
            first_sample=drawn,
        )

    def _check_tokens(self, train: TrainConfig, saved: Mapping[str, Any]) -> None:
        """Refuse phases that count tokens where samples were of several lengths."""
        assert self.phases is not None
        changed = any(first for first, _ in saved.get("origins", []))
        if self.phases.unit == "start_token" and (
            changed or saved["sequence_length"] != train.seq_length
        ):
            raise ValueError(
                f"--domain-phases begin at tokens and --seq-length is {train.seq_length}, but the "
                f"saved run read samples of another length ({saved['sequence_length']} last); give "
                f"start_step or start_sample in the file, or the saved --seq-length"
            )


def check_inputs(
    config: PruneRun | PretrainRun, start: Start, *, is_dry_run: bool = False
) -> Inputs:
    """Read what the mixture follows, and refuse what does not fit the run.

    Args:
        config: the run.
        start: where it begins.
        is_dry_run: whether nothing will be started; without WORLD_SIZE in the environment, one
            replica is taken then.

    Raises:
        ValueError: layout, batches, schedule, checkpoint, data and references that do not
            fit each other; equal on every rank, before any of them waits for another.
    """
    parallel, train, data = config.parallel, config.train, config.data
    alone = parallel.model_parallel_size if is_dry_run else 1
    replicas = parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", alone)))
    cpu_megatron.install()
    check_layout(start.shape, parallel)
    if start.checkpoint is not None:
        # names and shapes, from the index: a rank that found out while loading would be late
        CheckpointWeights(start.checkpoint)
    parallel.check_microbatches(train.num_microbatches(replicas))
    parallel.check_sequence(train.seq_length)
    start.shape.check_window(train.seq_length)
    _check_recompute(parallel, config.model, start.shape)
    check_sinks(train)
    if train.save is None:
        logger.warning("--save is not given: nothing of this run will be kept")
    check_schedule(config.optimizer, train.train_iters)
    _check_precision(start, config.model)
    manifest = read_manifest(data.data_path)
    check_vocabulary(manifest, start.shape, start.tokenizer)
    limits = limits_of(data.domain_floor, data.domain_cap, manifest.names)
    weights = starting_weights(data, manifest, limits)
    training_sequences(manifest, train)
    held_out_sets(manifest, train.seq_length, config.model)
    if train.seq_length > start.shape.max_position_embeddings:
        logger.warning(
            "--seq-length %d is longer than the %d positions the model was made for",
            train.seq_length,
            start.shape.max_position_embeddings,
        )
    phases = None
    if data.domain_phases is not None:
        phases = read_phases(data.domain_phases, manifest.names, limits)
        weights = phases.weights[0]
    shares = np.max(phases.weights if phases else [weights], axis=0)
    for name, share in zip(manifest.names, shares):
        if share > data.dominant_share and not start.continues:
            logger.warning(
                "%s takes %.1f %% of the mixture by its given weight, more than "
                "--dominant-share %g",
                *(name, 100 * share, data.dominant_share),
            )
    references = _references(data, manifest, is_evaluated=train.eval_interval > 0)
    reweighting = None
    if data.reweight in SCORES and references is not None:
        reweighting = Reweighting(
            policy=data.reweight,
            eta=data.reweight_eta,
            references=references,
            domains=manifest.names,
            smoothing=data.reweight_smoothing,
            limits=limits,
            dominant_share=data.dominant_share,
        )
    return Inputs(
        manifest=manifest,
        weights=weights,
        references=references,
        reweighting=reweighting,
        phases=phases,
        eval_sequences=_eval_sequences(config, start, len(manifest.names)),
    )


def check_vocabulary(manifest: DataManifest, shape: ModelShape, directory: Path | None) -> None:
    """Refuse data of another tokenizer than the model's.

    Args:
        manifest: of the data.
        shape: of the model.
        directory: of the model's own tokenizer files, if it carries any.

    Raises:
        ValueError: ids without an embedding, or another tokenizer than the checkpoint carries.
    """
    manifest.check_vocab(shape.vocab_size)
    if directory is None:
        return
    # the checkpoint may carry the tokenizer in two formats; the data were made with one of them
    carried = [directory / name for name in ("tokenizer.model", "tokenizer.json")]
    known = [hashlib.sha256(path.read_bytes()).hexdigest() for path in carried if path.is_file()]
    if known and manifest.tokenizer_fingerprint not in known:
        raise ValueError(
            f"{manifest.directory} was tokenised with another tokenizer than the model's in "
            f"{directory}; preprocess again with --tokenizer-model {directory}"
        )


def starting_weights(data: DataConfig, manifest: DataManifest, limits: ShareLimits) -> Vector:
    """Weight of each domain at the start: as given, or by training tokens within the limits.

    Raises:
        ValueError: weights that are none, of other domains, or outside the limits.
    """
    if not data.domain_weights:
        tokens = np.array([domain.tokens for domain in manifest.domains], dtype=np.float64)
        return limits.project(tokens / tokens.sum()) if limits.bind else tokens / tokens.sum()
    given = weights_of(data.domain_weights, manifest.names, flag="--domain-weights")
    weights = normalise_weights(given, len(manifest.names))
    if outside := limits.violations(weights, manifest.names):
        raise ValueError(
            f"--domain-weights: {'; '.join(outside)}, its --domain-floor or --domain-cap; change "
            f"one of the two"
        )
    return weights


def training_sequences(manifest: DataManifest, train: TrainConfig) -> list[DomainSequences]:
    """Training text of every domain, in the manifest's order."""
    return [
        DomainSequences(manifest.prefix(name), train.seq_length, train.seed, number)
        for number, name in enumerate(manifest.names)
    ]


def held_out_sets(manifest: DataManifest, seq_length: int, model: ModelConfig) -> list[HeldOutSet]:
    """Held-out text of every domain, in sequences of ``seq_length`` tokens, with the document
    borders that ``model`` asks for."""
    borders = DocumentBorders.of(model)
    return [
        HeldOutSet(manifest.held_out_prefix(name), seq_length, domain_index=number, borders=borders)
        for number, name in enumerate(manifest.names)
    ]


def _references(data: DataConfig, manifest: DataManifest, *, is_evaluated: bool) -> Vector | None:
    if data.reference_loss is not None:
        try:
            return read_reference(data.reference_loss, manifest.names)
        except ValueError as error:
            raise ValueError(f"--reference-loss: {error}") from None
    if data.reweight in ("constant", "schedule") or not is_evaluated:
        return None
    raise ValueError(
        f"--reweight {data.reweight} compares losses with --reference-loss, which is not given; "
        f"make one with `megashear reference-loss`, or use --reweight constant"
    )


def _eval_sequences(config: PruneRun | PretrainRun, start: Start, num_domains: int) -> int:
    """As the flags say, or as the run that is gone on with has it: its curve goes on."""
    num_modes = len(modes_of_evaluation(config.masks)) if isinstance(config, PruneRun) else 1
    asked = subsample_size(config.train, num_domains=num_domains, num_modes=num_modes)
    saved = start.description.details.get(EVAL_SEQUENCES) if start.description else None
    if not start.continues or saved is None:
        return asked
    if saved != asked:
        logger.info(
            "evaluations read %d sequences a domain as in the saved run, not %d as the flags say; "
            "--finetune would start a run of its own",
            *(saved, asked),
        )
    return int(saved)


def _check_recompute(parallel: ParallelConfig, model: ModelConfig, shape: ModelShape) -> None:
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    model.check_recompute(shape.num_layers // stages)


def _check_precision(start: Start, model: ModelConfig) -> None:
    if not start.continues or start.description is None:
        return
    saved = start.description.details.get("run", {}).get("model", {}).get("bf16", model.bf16)
    if saved != model.bf16:
        raise ValueError(
            f"{start.checkpoint} was trained {'with' if saved else 'without'} --bf16, and its "
            f"optimizer state has that form; go on the same way, or add --finetune to start again "
            f"from its weights"
        )
